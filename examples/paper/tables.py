"""Tables in Markdown, of means and sample standard deviations over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from .moments import Record, at_end, at_initialisation, epochs_to, final_loss, moments, trained


def table(groups: dict[str, list[Record]], target: float) -> str:
    """Return a line for each group of seeds: rate, how many train, lowest cosines, speed, loss and accuracy.

    All but the cosine at initialisation is over the runs that train. Those that fail have a column of their own.
    """
    measures = moments(target)
    failures = any(len(trained(records)) < len(records) for records in groups.values())
    lines = []
    for label, records in groups.items():
        good = trained(records)
        bad = [record for record in records if record not in good]
        members = {name: records if measure is at_initialisation else good for name, measure in measures.items()}
        cells = [
            label,
            f"{records[0]['run']['lr']:g}",
            f"{len(good)} of {len(records)}",
            *(
                spread([measure(record) for record in members[name]], missing="not")
                for name, measure in measures.items()
            ),
            *([spread([at_end(record) for record in bad])] if failures else []),
            spread([epochs_to(record, target) for record in good], 1, missing="never"),
            spread([final_loss(record) for record in good], 3),
            spread([100 * record["accuracy"] for record in good], 1),
        ]
        lines.append(cells)
    head = ["network", "learning rate", "runs that train", *measures]
    head[3] = f"min cosine {head[3]}"
    head += [
        *(["at the end, runs that fail"] if failures else []),
        *(f"epochs to loss {target:g}", "final training loss", "test accuracy, %"),
    ]
    return markdown(head, lines)


def spread(values: Sequence[float], digits: int = 2, missing: str = "diverged") -> str:
    """Return mean ± standard deviation of the finite ones, and how many are ``missing``."""
    if not values:
        return "-"
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
