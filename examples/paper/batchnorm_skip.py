"""Study (d): networks of growing depth with BatchNorm and skip connections, with either, and with neither."""

from __future__ import annotations

import math
from pathlib import Path

from .figures import QUALITATIVE, band, canvas, label, save, sizes_on, training_row
from .moments import Record, at_initialisation, epochs_to, moments, trained
from .protocol import Protocol
from .sweep import Finish, chosen, tuned, write_csv
from .tables import markdown, table
from .trends import slopes

LABELS = {"cnn": "neither", "skip": "skip connections", "bn": "BatchNorm", "wrn": "both"}


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    runs = [protocol.run(f"{kind}-{depth}-2") for depth in protocol.depths for kind in LABELS]
    return tuned(runs, protocol, "batchnorm_skip", finish)


def reached(record: Record, target: float) -> float:
    """Return the epochs to a loss, NaN for a run that never gets there."""
    epochs = epochs_to(record, target)
    return epochs if math.isfinite(epochs) else math.nan


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return tables in Markdown; writes ``batchnorm_skip.csv`` and ``batchnorm_skip.png``."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "batchnorm_skip.csv")
    measures = moments(protocol.target)
    by_depth = {kind: [chosen(everything, f"{kind}-{depth}-2") for depth in protocol.depths] for kind in LABELS}
    figure, axes = canvas(2, 3)
    shown = [name for name, measure in measures.items() if measure is not at_initialisation]
    for colour, (kind, groups) in zip(QUALITATIVE, by_depth.items(), strict=False):
        for each, name in zip(axes[0], [shown[0], shown[-1]], strict=False):
            values = [[measures[name](r) if r in trained(group) else math.nan for r in group] for group in groups]
            band(each, protocol.depths, list(zip(*values, strict=True)), colour, LABELS[kind], marker="o", markersize=3)
            each.set(ylabel="lowest cosine of all pairs", title=f"{name}, runs that train")
        epochs = [[reached(record, protocol.target) for record in group] for group in groups]
        band(
            axes[0, 2], protocol.depths, list(zip(*epochs, strict=True)), colour, LABELS[kind], marker="o", markersize=3
        )
    axes[0, 2].set(ylabel="epochs", title=f"epochs to loss {protocol.target:g}, runs that get there")
    for each in axes[0]:
        sizes_on(each, protocol.depths, "depth")
    deepest = protocol.depths[-1]
    at_deepest = {label: by_depth[kind][-1] for kind, label in LABELS.items()}
    training_row(axes[1], at_deepest, QUALITATIVE[: len(at_deepest)])
    axes[1, 0].set_title(f"{deepest} layers, all runs: loss")
    label(figure, axes[1, 0], "With and without BatchNorm and skip connections, width factor 2")
    save(figure, folder / "batchnorm_skip.png")
    trends = [[LABELS[kind], *slopes(protocol.depths, groups, measures)] for kind, groups in by_depth.items()]
    lines = {
        f"{LABELS[kind]}, {depth} layers": group
        for kind, groups in by_depth.items()
        for depth, group in zip(protocol.depths, groups, strict=True)
    }
    head = ["change of min cosine where depth doubles", *measures]
    return "\n\n".join([markdown(head, trends), table(lines, protocol.target)])
