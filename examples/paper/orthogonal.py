"""Study (d): orthogonal and Gaussian initialisation of deep linear and tanh networks, trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .figures import QUALITATIVE, band, canvas, label, save, sizes_on
from .protocol import Protocol
from .sweep import Finish, Record, chosen, curve, tuned, write_csv
from .tables import table

WIDTH = 64
ACTIVATIONS = ("linear", "tanh")
INITIALISATIONS = ("glorot", "orthogonal")  # of equal variance in the square layers, 1 / WIDTH


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    runs = [
        protocol.run(f"{activation}-{depth}-{WIDTH}", init)
        for activation in ACTIVATIONS
        for init in INITIALISATIONS
        for depth in protocol.mlp_depths
    ]
    return tuned(runs, protocol.rates, protocol.seeds, "orthogonal", finish)


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """A table in Markdown; writes ``orthogonal.csv`` and ``orthogonal.png``."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "orthogonal.csv")
    early = max(1, protocol.epochs // 4)
    groups: dict[str, list[Record]] = {}
    figure, axes = canvas(len(ACTIVATIONS), 3)
    for row, activation in zip(axes, ACTIVATIONS, strict=True):
        row[2].set_yscale("log")
        for init, colour in zip(INITIALISATIONS, QUALITATIVE, strict=False):
            of_depth = [chosen(everything, f"{activation}-{depth}-{WIDTH}", init) for depth in protocol.mlp_depths]
            groups |= {
                f"{activation}, {init}, depth {d}": r for d, r in zip(protocol.mlp_depths, of_depth, strict=True)
            }
            columns = [
                [[curve(r, "min_cosine")[0] for r in seeds] for seeds in of_depth],
                [[np.nanmean(curve(r, "min_cosine")[: early + 1]) for r in seeds] for seeds in of_depth],
                [[curve(r, "loss")[early] for r in seeds] for seeds in of_depth],
            ]
            for each, values in zip(row, columns, strict=True):
                band(
                    each, protocol.mlp_depths, np.transpose(values), colour, init.capitalize(), marker="o", markersize=3
                )
        row[0].set(ylabel="lowest cosine of all pairs", title=f"{activation}: at initialisation")
        row[1].set(ylabel="lowest cosine, mean of epochs", title=f"{activation}: epochs 0 to {early}")
        row[2].set(ylabel="training loss (nats)", title=f"{activation}: loss of epoch {early}")
        for each in row:
            sizes_on(each, protocol.mlp_depths, "depth (hidden layers)")
    label(figure, axes[0, 0], f"Orthogonal initialisation, {WIDTH} units wide")
    save(figure, folder / "orthogonal.png")
    return table(groups, protocol.target)
