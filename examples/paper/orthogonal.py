"""Study (e): orthogonal and Gaussian initialisation of deep linear and tanh networks, trained."""

from __future__ import annotations

import math
from pathlib import Path

from .figures import QUALITATIVE, band, canvas, label, plain_logarithm, save, sizes_on
from .moments import Record, curve, moments, trained
from .protocol import Protocol
from .sweep import Finish, chosen, tuned, write_csv
from .tables import markdown, table
from .trends import slopes

WIDTH = 64
ACTIVATIONS = ("linear", "tanh")
INITIALISATIONS = ("glorot", "orthogonal")  # of equal variance in the square layers, 1 / WIDTH


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    runs = [
        protocol.run(f"{activation}-{depth}-{WIDTH}", init)
        for activation in ACTIVATIONS
        for init in INITIALISATIONS
        for depth in protocol.orthogonal_depths
    ]
    return tuned(runs, protocol, "orthogonal", finish)


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return tables in Markdown; writes ``orthogonal.csv`` and ``orthogonal.png``."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "orthogonal.csv")
    depths, measures = protocol.orthogonal_depths, moments(protocol.target)
    first, last = measures["at initialisation"], measures["at the end"]
    early = max(1, protocol.epochs // 6)
    lines: dict[str, list[Record]] = {}
    trends = []
    figure, axes = canvas(len(ACTIVATIONS), 3)
    for row, activation in zip(axes, ACTIVATIONS, strict=True):
        row[2].set_yscale("log")
        for init, colour in zip(INITIALISATIONS, QUALITATIVE, strict=False):
            groups = [chosen(everything, f"{activation}-{depth}-{WIDTH}", init) for depth in depths]
            lines |= {f"{activation}, {init}, depth {d}": r for d, r in zip(depths, groups, strict=True)}
            trends.append([f"{activation}, {init}", *slopes(depths, groups, measures)])
            columns = [
                [[first(r) for r in group] for group in groups],
                [[last(r) if r in trained(group) else math.nan for r in group] for group in groups],
                [[curve(r, "loss")[early] for r in group] for group in groups],
            ]
            for each, values in zip(row, columns, strict=True):
                of_seeds = list(zip(*values, strict=True))
                band(each, depths, of_seeds, colour, init.capitalize(), marker="o", markersize=3)
        row[0].set(ylabel="lowest cosine of all pairs", title=f"{activation}: at initialisation")
        row[1].set(ylabel="lowest cosine of all pairs", title=f"{activation}: at the end, runs that train")
        row[2].set(ylabel="training loss (nats)", title=f"{activation}: loss of epoch {early}")
        plain_logarithm(row[2])
        for each in row:
            sizes_on(each, depths, "depth (hidden layers)")
    label(figure, axes[0, 0], f"Orthogonal initialisation, {WIDTH} units wide")
    save(figure, folder / "orthogonal.png")
    head = ["change of min cosine where depth doubles", *measures]
    return "\n\n".join([markdown(head, trends), table(lines, protocol.target)])
