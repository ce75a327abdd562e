"""The curves and settings of runs, read back from where loggers wrote them: TensorBoard's event files and CSV files."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_gradconf.reports.settings import Settings, settings_from

Curve = dict[int, float]  # {step: value}, in the order of steps


def read_runs(paths: Iterable[str | Path]) -> dict[str, dict[str, Curve]]:
    """Return ``{run: {key: {step: value}}}`` of every run in ``paths``.

    A path is a folder, searched with the folders in it, or a single event file or ``metrics.csv``. A run is a folder
    that holds such files; its name is its path below what all runs share. Raises ``FileNotFoundError`` for a path
    that is not there or without any run.
    """
    return read_sources(list(paths))[0]


def read_settings(paths: Iterable[str | Path], prefix: str = "gradient_confusion") -> dict[str, Settings]:
    """Return ``{run: Settings}`` of those runs in ``paths`` that have logged them under ``prefix``.

    Runs have the names that ``read_runs`` gives them. Raises ``FileNotFoundError`` for a path without any run.
    """
    return read_sources(list(paths), prefix)[1]


def read_sources(
    source: str | Path | Sequence[str | Path] | Mapping[str, str | Path], prefix: str = "gradient_confusion"
) -> tuple[dict[str, dict[str, Curve]], dict[str, Settings]]:
    """Return what `read_runs` and `read_settings` do of a path, of several, or of ``{name: path}``.

    A run has the name of its path, before its own name where the path holds several.
    """
    runs, settings = dict[str, dict[str, Curve]](), dict[str, Settings]()
    for given, where in source.items() if isinstance(source, Mapping) else [("", source)]:
        paths = [where] if isinstance(where, str | Path) else where
        found = _read(paths, prefix)
        for run, (curves, compared) in found.items():
            name = run if not given else given if len(found) == 1 else f"{given}/{run}"
            runs[name] = curves
            if compared is not None:
                settings[name] = compared
    return runs, settings


def with_confusion(
    runs: Mapping[str, dict[str, Curve]], keys: Iterable[str] | None = None, prefix: str = "gradient_confusion"
) -> dict[str, dict[str, Curve]]:
    """Return those of ``runs`` that hold what the callback logs under ``prefix``.

    Raises ``ValueError`` if there is none, or none of them has one of ``keys``.
    """
    chosen = {name: curves for name, curves in runs.items() if f"{prefix}/min_cosine" in curves}
    logged = sorted({key for curves in (chosen or runs).values() for key in curves})
    if not chosen:
        raise ValueError(
            f"No run has {prefix}/min_cosine, only {', '.join(logged) or 'no scalars at all'}: train with "
            "Trainer(callbacks=[GradientConfusionCallback()]), or give the prefix that it logged with."
        )
    if missing := [key for key in keys or () if key not in logged]:
        raise ValueError(f"No run has {', '.join(missing)}: choose from {', '.join(logged)}.")
    return chosen


def loss_keys(keys: Iterable[str]) -> list[str]:
    """Return those of ``keys`` that are losses by name, of training first, one of ``_step`` and ``_epoch`` twins.

    >>> loss_keys(["epoch", "val_loss", "train_loss_step", "train_loss_epoch"])
    ['train_loss_step', 'val_loss']
    """
    return _named(keys, "loss")


def accuracy_keys(keys: Iterable[str]) -> list[str]:
    """Return those of ``keys`` that are accuracies by their names, in the order of ``loss_keys``.

    >>> accuracy_keys(["val_acc", "train_loss", "lr-Adam"])
    ['val_acc']
    """
    return _named(keys, "acc")


def _named(keys: Iterable[str], part: str) -> list[str]:
    named = {key for key in keys if part in key.lower()}
    named = {key for key in named if key.removesuffix("_epoch") + "_step" not in named}
    return sorted(named, key=lambda key: ("train" not in key.lower(), key))


def _read(paths: Iterable[str | Path], prefix: str) -> dict[str, tuple[dict[str, Curve], Settings | None]]:
    """Return the curves of each run, by its name, and its settings if it has logged them under ``prefix``."""
    runs: dict[str, tuple[dict[str, Curve], Settings | None]] = {}
    for name, files in _files_of_runs(paths).items():
        curves, settings = dict[str, Curve](), None
        for file in files:  # a run that was resumed goes on in a second file
            found, row = _read_csv(file, prefix) if file.suffix == ".csv" else _read_events(file, prefix)
            for key, curve in found.items():
                curves[key] = dict(sorted((curves.get(key, {}) | curve).items()))
            settings = settings if row is None else settings_from(row)
        runs[name] = curves, settings
    return runs


def _files_of_runs(paths: Iterable[str | Path]) -> dict[str, list[Path]]:
    """Return the files of each run, by its name."""
    found: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        files = list(_files(path))
        if not files:
            missing = "does not exist" if not path.exists() else "holds no TensorBoard event files and no metrics.csv"
            raise FileNotFoundError(
                f"{path} {missing}: pass the folder that a logger saved to, its save_dir or log_dir"
            )
        for file in files:
            found.setdefault(file.parent.resolve(), []).append(file)
    shared = os.path.commonpath([folder.parent for folder in found]) if found else ""
    return {folder.relative_to(shared).as_posix(): found[folder] for folder in sorted(found)}


def _files(path: Path) -> Iterator[Path]:
    """Yield what can be read in ``path``, csv files first: where both hold a run, TensorBoard's are exact."""
    if path.is_file():
        yield path
        return
    for pattern in ("metrics.csv", "events.out.tfevents.*"):
        yield from sorted(path.rglob(pattern), key=_numbers)


def _numbers(file: Path) -> list[int]:
    """Return what orders the event files of a run: their names hold a time in seconds, a process and a counter."""
    return [int(number) for number in re.findall(r"\d+", file.name)]


def _read_csv(file: Path, prefix: str) -> tuple[dict[str, Curve], dict[str, str] | None]:
    """Return the curves in a CSV file, and the last row of the table of settings beside it."""
    curves: dict[str, Curve] = {}
    for row in _rows(file):
        for key in row.keys() - {"step"}:
            with suppress(KeyError, TypeError, ValueError):  # cells may be empty, or hold text
                curves.setdefault(key, {})[int(row["step"])] = float(row[key])
    table = file.parent / prefix / "settings.csv"
    settings = _rows(table)[-1] if table.is_file() else None
    return {key: curve for key, curve in curves.items() if curve}, settings


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _read_events(file: Path, prefix: str) -> tuple[dict[str, Curve], dict[str, str] | None]:
    """Return the curves in an event file, and the last row of the table of settings in it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every point, 1 the last one.
    sizes = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}
    events: Any = EventAccumulator(str(file), size_guidance=sizes)
    events.Reload()
    tags, table = events.Tags(), f"{prefix}/settings/text_summary"
    curves = {key: {event.step: event.value for event in events.Scalars(key)} for key in tags["scalars"]}
    if table not in tags["tensors"]:
        return curves, None
    columns, _, cells = events.Tensors(table)[-1].tensor_proto.string_val[0].decode().splitlines()
    return curves, dict(zip(_cells(columns), _cells(cells), strict=True))


def _cells(line: str) -> list[str]:
    """Return the cells of a line of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]
