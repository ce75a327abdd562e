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
    runs: dict[str, dict[str, Curve]] = {}
    for name, files in _files_of_runs(paths).items():
        run = runs.setdefault(name, {})
        for file in files:
            for key, curve in _read(file).items():  # a run that was resumed goes on in a second file
                run[key] = dict(sorted((run.get(key, {}) | curve).items()))
    return runs


def read_settings(paths: Iterable[str | Path], prefix: str = "gradient_confusion") -> dict[str, Settings]:
    """Return ``{run: Settings}`` of those runs in ``paths`` that have logged them under ``prefix``.

    Runs have the names that ``read_runs`` gives them. Raises ``FileNotFoundError`` for a path without any run.
    """
    found = {}
    for name, files in _files_of_runs(paths).items():
        for file in files:
            if (row := _settings_row(file, prefix)) is not None:  # the last is what a resumed run went on with
                found[name] = settings_from(row)
    return found


def read_sources(
    source: str | Path | Sequence[str | Path] | Mapping[str, str | Path], prefix: str = "gradient_confusion"
) -> tuple[dict[str, dict[str, Curve]], dict[str, Settings]]:
    """Return what `read_runs` and `read_settings` do of a path, of several, or of ``{name: path}``.

    A run has the name of its path, before its own name where the path holds several.
    """
    runs, settings = dict[str, dict[str, Curve]](), dict[str, Settings]()
    for given, where in source.items() if isinstance(source, Mapping) else [("", source)]:
        paths = [where] if isinstance(where, str | Path) else where
        found, known = read_runs(paths), read_settings(paths, prefix)
        names = {run: run if not given else given if len(found) == 1 else f"{given}/{run}" for run in found}
        runs |= {names[run]: curves for run, curves in found.items()}
        settings |= {names[run]: compared for run, compared in known.items()}
    return runs, settings


def measured(
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


def _read(file: Path) -> dict[str, Curve]:
    return _read_csv(file) if file.suffix == ".csv" else _read_events(file)


def _read_csv(file: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for key in row.keys() - {"step"}:
                with suppress(KeyError, TypeError, ValueError):  # cells may be empty, or hold text
                    curves.setdefault(key, {})[int(row["step"])] = float(row[key])
    return {key: curve for key, curve in curves.items() if curve}


def _settings_row(file: Path, prefix: str) -> dict[str, str] | None:
    """Return the last row of the table of settings that was logged to ``file``, or beside it if it is a CSV file."""
    if file.suffix == ".csv":
        beside = file.with_name(prefix) / "settings.csv"
        if not beside.is_file():
            return None
        with beside.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))[-1]
    events, tag = _events(file), f"{prefix}/settings/text_summary"
    if tag not in events.Tags()["tensors"]:
        return None
    columns, _, cells = events.Tensors(tag)[-1].tensor_proto.string_val[0].decode().splitlines()
    return dict(zip(_cells(columns), _cells(cells), strict=True))


def _cells(line: str) -> list[str]:
    """Return the cells of a line of a table in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def _events(file: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps every point, 1 the last one.
    sizes = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1}
    events = EventAccumulator(str(file), size_guidance=sizes)
    events.Reload()
    return events


def _read_events(file: Path) -> dict[str, Curve]:
    events = _events(file)
    return {key: {e.step: e.value for e in events.Scalars(key)} for key in events.Tags()["scalars"]}
