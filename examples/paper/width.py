"""Study (b): perceptrons of growing width on data that they learn by heart, and on data that they cannot.

The paper's own quantity is the lowest cosine at the end of training. Where all samples are fitted by then, what is left
of the gradients says little about the network: width shows where that cannot happen.
"""

from __future__ import annotations

import math
from pathlib import Path

from .figures import QUALITATIVE, band, canvas, confusion, cosines, label, save, shades, sizes_on
from .moments import Record, at_initialisation, moments, trained
from .protocol import TARGETS, Protocol
from .sweep import Finish, chosen, tuned, write_csv
from .tables import markdown, spread, table
from .trends import slopes

DEPTH = 3
ABOUT = {
    "digits": "1500 digits, fitted",
    "digits-noisy": "endless digits, 10 % wrong labels",
    "digits-parity": "endless pairs, parity",
}


def targets(protocol: Protocol) -> dict[str, float]:
    """Return the data sets and the loss at which networks are compared: all sets of digits, or the one other."""
    mine = {protocol.data: protocol.target}
    return TARGETS | mine if protocol.data in TARGETS else mine


def names(protocol: Protocol) -> list[str]:
    return [f"relu-{DEPTH}-{width}" for width in protocol.mlp_widths]


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    runs = [protocol.run(name, data=data) for data in targets(protocol) for name in names(protocol)]
    return tuned(runs, protocol, "width", finish)


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return tables in Markdown; writes ``width.csv`` and ``width.png``."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "width.csv")
    goals = targets(protocol)
    colours = shades(len(protocol.mlp_widths))
    figure, axes = canvas(2, len(goals))
    trends, samples, tables = [], [], []
    for column, (data, target) in enumerate(goals.items()):
        title = ABOUT.get(data, data)
        of_width = {width: chosen(everything, f"relu-{DEPTH}-{width}", data=data) for width in protocol.mlp_widths}
        groups = {f"width {width}": members for width, members in of_width.items()}
        confusion(axes[0, column], groups, colours, title)
        measures = moments(target)
        for colour, (name, measure) in zip(QUALITATIVE, measures.items(), strict=False):
            values = [
                [measure(r) if measure is at_initialisation or r in trained(members) else math.nan for r in members]
                for members in groups.values()
            ]
            kind = "at equal loss" if name.startswith("at loss") else name
            of_seeds = list(zip(*values, strict=True))
            band(axes[1, column], protocol.mlp_widths, of_seeds, colour, kind, marker="o", markersize=3)
        axes[1, column].set(ylabel="lowest cosine of all pairs", title=f"{title}; equal loss: {target:g}")
        cosines(axes[1, column])
        sizes_on(axes[1, column], protocol.mlp_widths, "units of a hidden layer")
        trends.append([title, *slopes(protocol.mlp_widths, list(groups.values()), measures)])
        samples.append([title, *(spread([r["samples_in_effect"] for r in trained(g)], 1) for g in groups.values())])
        tables.append(f"{title}:\n\n{table(groups, target)}")
    axes[0, 0].legend(frameon=False, fontsize=7, ncols=2)
    label(figure, axes[1, 0], f"Perceptrons with {DEPTH} hidden layers of growing width")
    save(figure, folder / "width.png")
    head = ["change of min cosine where width doubles", "at initialisation", "early", "at equal loss", "at the end"]
    effect = [
        f"samples behind the gradient of {protocol.batch_size}, at the end",
        *(str(w) for w in protocol.mlp_widths),
    ]
    return "\n\n".join([markdown(head, trends), markdown(effect, samples), *tables])
