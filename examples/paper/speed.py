"""Study (f): how fast all networks of the other studies learned, against their gradient confusion."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from . import batchnorm_skip, depth_width, orthogonal, width
from .figures import PALE, QUALITATIVE, canvas, label, save
from .moments import Measure, Record, epochs_to, failed, moments, trained
from .protocol import Protocol
from .sweep import Finish, is_tuning, write_summary
from .tables import markdown, spread
from .trends import UNKNOWN, Estimate, bootstrap

FAMILIES = {
    "CNN": ("cnn",),
    "with skip or BatchNorm": ("skip", "bn", "wrn"),
    "ReLU perceptrons": ("relu",),
    "linear and tanh": ("linear", "tanh"),
}
FEWEST = 5  # networks, of which a rank correlation is given


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return tables in Markdown; writes ``speed.csv``, a line for each run, and ``speed.png``."""
    parts = (width, depth_width, batchnorm_skip, orthogonal)
    everything = [record for part in parts for record in part.records(protocol, finish)]
    everything = list({json.dumps(record["run"]): record for record in everything}.values())  # some are in two
    write_summary(everything, width.targets(protocol), folder / "speed.csv")
    records = [r for r in everything if not is_tuning(r) and r["run"]["data"] == protocol.data]
    sets = {name: [r for r in records if kind(r) in kinds] for name, kinds in FAMILIES.items()} | {"all": records}
    measures = moments(protocol.target)
    correlations, failures = [], []
    for name, measure in measures.items():
        cells = [str(correlation(trained(members), measure, protocol.target)) for members in sets.values()]
        correlations.append([name, *cells])
        bad, good = ([measure(r) for r in records if failed(r) == state] for state in (True, False))
        failures.append([name, spread(bad, missing="not"), spread(good, missing="not")])
    save(scatter(records, protocol, measures), folder / "speed.png")
    sizes = [f"{name} ({len(by_network(trained(members)))} networks)" for name, members in sets.items()]
    number = sum(failed(record) for record in records)
    head = ["min cosine", f"of the {number} runs that fail", f"of the {len(records) - number} that train"]
    return f"{markdown(['confusion', *sizes], correlations)}\n\n{markdown(head, failures)}"


def correlation(records: Sequence[Record], measure: Measure, target: float) -> Estimate:
    """Return Spearman's correlation of epochs to a loss with confusion, the negative of a cosine.

    1: the more confused of two runs always is the slower one. Runs that train without coming to the loss share the last
    rank. The interval is over networks and their seeds together. Unknown for fewer than FEWEST networks.
    """
    pairs = [
        [
            (min(epochs_to(record, target), 1e9), -measure(record))
            for record in network
            if math.isfinite(measure(record))
        ]
        for network in by_network(records)
    ]
    pairs = [network for network in pairs if network]
    if len(pairs) < FEWEST:
        return UNKNOWN
    return bootstrap(pairs, lambda _, entries: spearman([pair for network in entries for pair in network]))


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the rank correlation, NaN where one side is constant."""
    first, second = zip(*pairs, strict=True)
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(spearmanr(first, second).statistic)


def by_network(records: Sequence[Record]) -> list[list[Record]]:
    """Return the runs of each network, its seeds."""
    networks: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        networks.setdefault((record["run"]["model"], record["run"]["init"]), []).append(record)
    return list(networks.values())


def scatter(records: Sequence[Record], protocol: Protocol, measures: dict[str, Measure]) -> Figure:
    """Draw a point for each run; above the line those that train too slowly, and those that fail."""
    figure, (row,) = canvas(1, len(measures))
    never, failing = 1.1 * protocol.epochs, 1.22 * protocol.epochs
    ticks = [protocol.epochs * part / 3 for part in range(4)]
    for axes, (title, measure) in zip(row, measures.items(), strict=True):
        for (name, kinds), colour in zip(FAMILIES.items(), QUALITATIVE, strict=False):
            members = [r for r in records if kind(r) in kinds]
            x = [measure(record) for record in members]
            y = [failing if failed(r) else min(epochs_to(r, protocol.target), never) for r in members]
            axes.scatter(x, y, s=16, facecolor=colour, edgecolor="white", linewidth=0.4, label=name)
        axes.axhline(1.04 * protocol.epochs, color=PALE, linewidth=1)
        axes.set_yticks([*ticks, never, failing], [*(f"{tick:g}" for tick in ticks), "never", "fails"])
        axes.set(
            xlabel="lowest cosine of all pairs", ylabel=f"epochs to training loss {protocol.target:g}", title=title
        )
    label(figure, row[0], "All trained runs at their best rate")
    return figure


def kind(record: Record) -> str:
    return str(record["run"]["model"]).partition("-")[0]
