"""Study (c): CNN-l-k through training, deeper and wider, and perceptrons, deeper."""

from __future__ import annotations

from pathlib import Path

from .figures import save, shades, training
from .moments import Record, moments
from .protocol import Protocol
from .sweep import Finish, chosen, tuned, write_csv
from .tables import markdown, table
from .trends import slopes

WIDTH = 64  # of the perceptrons


def series(protocol: Protocol) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Return the sizes and the networks of each figure."""
    return {
        "cnn_depth": (protocol.depths, [f"cnn-{depth}-2" for depth in protocol.depths]),
        "cnn_width": (protocol.widths, [f"cnn-16-{width}" for width in protocol.widths]),
        "mlp_depth": (protocol.mlp_depths, [f"relu-{depth}-{WIDTH}" for depth in protocol.mlp_depths]),
    }


TITLES = {
    "cnn_depth": "CNN-l-2 of growing depth",
    "cnn_width": "CNN-16-k of growing width",
    "mlp_depth": f"Perceptrons of {WIDTH} units and growing depth",
}


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    # CNN-16-2 may be in both
    unique = dict.fromkeys(name for _, names in series(protocol).values() for name in names)
    return tuned([protocol.run(name) for name in unique], protocol, "depth_width", finish)


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return tables in Markdown; writes ``depth_width.csv`` and a figure for each of TITLES."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "depth_width.csv")
    trends, tables = [], []
    measures = moments(protocol.target)
    for what, (sizes, names) in series(protocol).items():
        groups = {name.upper().replace("RELU", "ReLU"): chosen(everything, name) for name in names}
        save(training(groups, shades(len(groups)), TITLES[what]), folder / f"{what}.png")
        trends.append([TITLES[what], *slopes(sizes, list(groups.values()), measures)])
        tables.append(table(groups, protocol.target))
    return "\n\n".join([markdown(["change of min cosine where it doubles", *measures], trends), *tables])
