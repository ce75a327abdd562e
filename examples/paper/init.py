"""Study (a): gradient confusion of single samples at initialisation, against depth and against width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from .figures import QUALITATIVE, band, canvas, label, save, sizes_on
from .protocol import TARGETS, Protocol
from .run import Run
from .sweep import Finish, write_csv
from .tables import markdown, spread

# (activation, initialisation, its name in the figure): the first of each pair is Gaussian, the second orthogonal.
LINES = (
    ("relu", "msra", "ReLU, MSRA"),
    ("relu", "orthogonal", "ReLU, orthogonal"),
    ("tanh", "glorot", "tanh, Glorot"),
    ("tanh", "orthogonal", "tanh, orthogonal"),
    ("linear", "glorot", "linear, Glorot"),
    ("linear", "orthogonal", "linear, orthogonal"),
)
DEPTH, WIDTH = 8, 64  # held fixed while the other changes


def runs(protocol: Protocol, activation: str, init: str) -> list[list[Run]]:
    """Return the runs against depth, then those against width, of all seeds; of the digits with their own labels."""
    data = "digits" if protocol.data in TARGETS else protocol.data
    names = [
        [f"{activation}-{depth}-{WIDTH}" for depth in protocol.init_depths],
        [f"{activation}-{DEPTH}-{width}" for width in protocol.init_widths],
    ]
    return [
        [
            replace(protocol.run(name, init, data), epochs=0, num_units=protocol.init_samples, unit_size=1, seed=seed)
            for seed in range(protocol.init_seeds)
            for name in row
        ]
        for row in names
    ]


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return two tables in Markdown; writes ``init.csv`` and ``init.png``."""
    planned = {line: runs(protocol, *line[:2]) for line in LINES}
    todo = [run for pair in planned.values() for part in pair for run in part]
    records = finish(todo, "init")
    by_run = dict(zip(todo, records, strict=True))
    write_csv(records, folder / "init.csv")

    sizes = (protocol.init_depths, protocol.init_widths)
    cells: dict[str, list[list[str]]] = {"min_cosine": [], "eta": []}
    figure, axes = canvas(2, 2)
    for i, (line, pair) in enumerate(planned.items()):
        style = {"linestyle": "--" if line[1] == "orthogonal" else "-", "marker": "o", "markersize": 3}
        for row, key in enumerate(cells):
            cells[key].append([line[2]])
            for column, part in enumerate(pair):
                flat = [by_run[run]["rows"][0][key] for run in part]
                values = np.reshape(flat, (protocol.init_seeds, -1))
                axes[row, column].set_yscale("log" if key == "eta" else "linear")
                band(axes[row, column], sizes[column], values, QUALITATIVE[i // 2], line[2], **style)
                cells[key][-1] += [spread(values[:, end].tolist(), 2 if row == 0 else 0) for end in (0, -1)]
    fixed = (f"{WIDTH} units wide", f"{DEPTH} hidden layers")
    for column, name in enumerate(("depth (hidden layers)", "width (units of a hidden layer)")):
        axes[0, column].set(
            ylabel="lowest cosine of all pairs", title=f"{protocol.init_samples} samples, {fixed[column]}"
        )
        axes[1, column].set(ylabel="eta (squared gradient norm)")
        for each in axes[:, column]:
            sizes_on(each, sizes[column], name)
    label(figure, axes[0, 0], "At initialisation: gradients of single samples", columns=3)
    save(figure, folder / "init.png")
    ends = [f"{name} {part[end]}" for name, part in zip(("depth", "width"), sizes, strict=True) for end in (0, -1)]
    return "\n\n".join(markdown([f"{key} at", *ends], lines) for key, lines in cells.items())
