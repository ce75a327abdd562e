"""Tables in Markdown, of means and sample standard deviations over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from .sweep import Record, confusion_until, curve, epochs_to, final_loss


def table(groups: dict[str, list[Record]], target: float) -> str:
    """A line for each group of seeds: learning rate, lowest cosine, speed, loss and accuracy."""
    lines = []
    for label, records in groups.items():
        epochs = [epochs_to(record, target) for record in records]
        reached = [value for value in epochs if math.isfinite(value)]
        speed = (
            f"{spread(reached, 1)} ({len(reached)} of {len(epochs)} runs)"
            if reached
            else f"never (0 of {len(epochs)} runs)"
        )
        cells = [
            label,
            f"{records[0]['run']['lr']:g}",
            spread([curve(record, "min_cosine")[0] for record in records]),
            spread([confusion_until(record, target) for record in records]),
            spread([curve(record, "min_cosine")[-1] for record in records]),
            speed,
            spread([final_loss(record) for record in records], 3),
            spread([100 * record["accuracy"] for record in records], 1),
        ]
        lines.append(cells)
    head = [
        *("network", "learning rate", "min cosine at initialisation", f"mean min cosine until loss {target:g}"),
        "min cosine at the end",
        *(f"epochs to loss {target:g}", "final training loss", "test accuracy, %"),
    ]
    return markdown(head, lines)


def spread(values: Sequence[float], digits: int = 2, missing: str = "diverged") -> str:
    """Mean ± standard deviation of the finite ones, and how many are ``missing``."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return missing
    text = number(statistics.fmean(finite), digits)
    if len(finite) > 1:
        text += f" ± {number(statistics.stdev(finite), digits)}"
    return text if len(finite) == len(values) else f"{text} ({len(values) - len(finite)} {missing})"


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])
