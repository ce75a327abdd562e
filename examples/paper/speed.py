"""Study (e): how fast all networks of the other studies learned, against their gradient confusion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from . import batchnorm_skip, depth_width, orthogonal
from .figures import PALE, QUALITATIVE, canvas, label, save
from .protocol import Protocol
from .sweep import Finish, Record, confusion_until, curve, epochs_to, is_tuning, write_summary
from .tables import markdown, number, spread

FAMILIES = {
    "CNN": ("cnn",),
    "with skip or BatchNorm": ("skip", "bn", "wrn"),
    "linear": ("linear",),
    "tanh": ("tanh",),
}


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """A table in Markdown; writes ``speed.csv`` and ``speed.png``."""
    records = [r for part in (depth_width, batchnorm_skip, orthogonal) for r in part.records(protocol, finish)]
    records = list({json.dumps(record["run"]): record for record in records}.values())  # CNN-28-2 is in two
    write_summary(records, protocol.target, folder / "speed.csv")
    chosen = [record for record in records if not is_tuning(record)]
    sets = {name: [r for r in chosen if kind(r) in kinds] for name, kinds in FAMILIES.items()}
    measures: dict[str, Callable[[Record], float]] = {
        "at initialisation": lambda record: float(curve(record, "min_cosine")[0]),
        f"mean until loss {protocol.target:g}": lambda record: confusion_until(record, protocol.target),
        "mean over all epochs": lambda record: float(np.nanmean(curve(record, "min_cosine"))),
    }
    lines = []
    for name, measure in measures.items():
        cells = [
            spread(by_seed(members, measure, protocol), missing="constant") for members in [*sets.values(), chosen]
        ]
        lines.append([name, *cells, number(rank_correlation(records, measure, protocol.target))])
    save(scatter(records, protocol, measures), folder / "speed.png")
    sizes = [f"{name} ({len(members)})" for name, members in {**sets, "all": chosen}.items()]
    return markdown(["confusion", *sizes, f"all, and the runs at other rates ({len(records)})"], lines)


def rank_correlation(records: Sequence[Record], measure: Callable[[Record], float], target: float) -> float:
    """Spearman's rho of the epochs to a loss with confusion, the negative of a cosine; 1: more confused is slower.

    Runs that never reach the loss share the last rank. NaN if all are equal.
    """
    epochs = [min(epochs_to(record, target), 1e9) for record in records]
    confusion = [-measure(record) for record in records]
    if len(set(epochs)) < 2 or len(set(confusion)) < 2:
        return math.nan
    return float(spearmanr(epochs, confusion).statistic)


def by_seed(records: Sequence[Record], measure: Callable[[Record], float], protocol: Protocol) -> list[float]:
    """The rank correlation among the runs of each seed."""
    seeds = [[r for r in records if r["run"]["seed"] == seed] for seed in range(protocol.seeds)]
    return [rank_correlation(members, measure, protocol.target) for members in seeds]


def scatter(records: Sequence[Record], protocol: Protocol, measures: dict[str, Callable[[Record], float]]) -> Figure:
    """A point for each run, those that never reach the loss above a line; one panel for each measure of confusion."""
    figure, (row,) = canvas(1, len(measures))
    never = 1.12 * protocol.epochs
    ticks = np.linspace(0, protocol.epochs, 5)
    for axes, (title, measure) in zip(row, measures.items(), strict=True):
        for (name, kinds), colour in zip(FAMILIES.items(), QUALITATIVE, strict=False):
            for tuning in (True, False):
                members = [r for r in records if kind(r) in kinds and is_tuning(r) == tuning]
                x = [measure(record) for record in members]
                y = [min(epochs_to(record, protocol.target), never) for record in members]
                filled = {"facecolor": "none", "alpha": 0.5} if tuning else {"facecolor": colour, "label": name}
                axes.scatter(x, y, s=18, edgecolor=colour, linewidth=0.9, **filled)
        axes.axhline(1.06 * protocol.epochs, color=PALE, linewidth=1)
        axes.set_yticks([*ticks, never], [*(f"{tick:g}" for tick in ticks), "never"])
        axes.set(
            xlabel="lowest cosine of all pairs", ylabel=f"epochs to training loss {protocol.target:g}", title=title
        )
    label(figure, row[0], "All trained runs; hollow: at the learning rates tried, with one seed")
    return figure


def kind(record: Record) -> str:
    return str(record["run"]["model"]).partition("-")[0]
