"""Study (c): a deep network with BatchNorm and skip connections, with either, and with neither."""

from __future__ import annotations

from pathlib import Path

from .figures import QUALITATIVE, save, training
from .protocol import Protocol
from .sweep import Finish, Record, chosen, tuned, write_csv
from .tables import table

LABELS = {"cnn": "neither", "skip": "skip connections", "bn": "BatchNorm", "wrn": "both"}


def records(protocol: Protocol, finish: Finish) -> list[Record]:
    runs = [protocol.run(f"{kind}-{protocol.deep}-2") for kind in LABELS]
    return tuned(runs, protocol.rates, protocol.seeds, "batchnorm_skip", finish)


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """A table in Markdown; writes ``batchnorm_skip.csv`` and ``batchnorm_skip.png``."""
    everything = records(protocol, finish)
    write_csv(everything, folder / "batchnorm_skip.csv")
    groups = {label: chosen(everything, f"{kind}-{protocol.deep}-2") for kind, label in LABELS.items()}
    title = f"{protocol.deep} layers of width factor 2, with and without BatchNorm and skip connections"
    save(training(groups, QUALITATIVE[: len(groups)], title), folder / "batchnorm_skip.png")
    return table(groups, protocol.target)
