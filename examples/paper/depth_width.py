"""Study (b): CNN-l-k through training, deeper and wider."""

from __future__ import annotations

from pathlib import Path

from .figures import save, shades, training
from .protocol import Protocol
from .sweep import Finish, Record, chosen, tuned, write_csv
from .tables import table


def names(protocol: Protocol) -> dict[str, list[str]]:
    return {
        "depth": [f"cnn-{depth}-2" for depth in protocol.depths],
        "width": [f"cnn-16-{width}" for width in protocol.widths],
    }


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    # CNN-16-2 may be in both
    unique = dict.fromkeys(name for series in names(protocol).values() for name in series)
    runs = [protocol.run(name) for name in unique]
    return tuned(runs, protocol.rates, protocol.seeds, "depth_width", finish)


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """A table in Markdown; writes ``depth_width.csv``, ``depth.png`` and ``width.png``."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "depth_width.csv")
    tables = []
    for what, series in names(protocol).items():
        groups = {name.upper(): chosen(everything, name) for name in series}
        save(training(groups, shades(len(groups)), f"CNN-l-k of growing {what}"), folder / f"{what}.png")
        tables.append(table(groups, protocol.target))
    return "\n\n".join(tables)
