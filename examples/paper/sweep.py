"""Many runs: side by side on the cores there are, each kept in a file of its own, so that none is done twice."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from .run import Run, train

Record: TypeAlias = dict[str, Any]  # what train() returns
Finish: TypeAlias = Callable[[Sequence[Run], str], list[Record]]

TUNING_SEED = 1000  # no reported seed decides on the learning rate


def finish(runs: Sequence[Run], title: str, *, folder: Path, data_dir: str | None, pool: Executor) -> list[Record]:
    """The records of ``runs``, in their order; those that ``folder`` has are read, the others are trained in ``pool``.

    Raises ``RuntimeError`` with the run that failed; what was finished stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {run: path_of(run, folder) for run in runs}
    todo = {run: path for run, path in paths.items() if not path.is_file()}
    futures = {pool.submit(train_to_file, run, path, data_dir): run for run, path in todo.items()}
    try:
        with tqdm(total=len(paths), initial=len(paths) - len(todo), desc=title, unit="run") as bar:
            for future in as_completed(futures):
                if (error := future.exception()) is not None:
                    raise RuntimeError(f"{futures[future]} failed: {error}") from error
                bar.update()
    except BaseException:  # also an interrupt, which the pool would let wait for all that is queued
        for future in futures:
            future.cancel()
        raise
    return [json.loads(paths[run].read_text()) for run in runs]


def tuned(runs: Sequence[Run], rates: Sequence[float], seeds: int, title: str, finish: Finish) -> list[Record]:
    """The records of all ``runs`` at all ``rates`` with one seed, then at the best rate with ``seeds`` others.

    The best rate is that with the lowest training loss at the end.
    """
    grid = [[replace(run, lr=rate, seed=TUNING_SEED) for rate in rates] for run in runs]
    tried = finish([trial for row in grid for trial in row], f"{title}: learning rates")
    loss = {Run(**record["run"]): final_loss(record) for record in tried}
    best = [min(row, key=loss.__getitem__) for row in grid]
    repeated = [replace(trial, seed=seed) for trial in best for seed in range(seeds)]
    return tried + finish(repeated, f"{title}: {seeds} seeds")


def train_to_file(run: Run, path: Path, data_dir: str | None) -> None:
    """Runs in a process of its own; the file appears whole or not at all."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    record = train(run, data_dir)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(path)


def path_of(run: Run, folder: Path) -> Path:
    digest = hashlib.sha1(json.dumps(asdict(run), sort_keys=True).encode()).hexdigest()[:8]
    return folder / f"{run.model}_{run.init}_lr{run.lr:g}_seed{run.seed}_{digest}.json"


def is_tuning(record: Record) -> bool:
    return bool(record["run"]["seed"] == TUNING_SEED)


def chosen(records: Sequence[Record], model: str, init: str = "msra") -> list[Record]:
    """Those of a network at its best learning rate, one for each seed."""
    return [r for r in records if (r["run"]["model"], r["run"]["init"]) == (model, init) and not is_tuning(r)]


def curve(record: Record, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One value for each epoch from 0 on; NaN from where a run diverged."""
    values = np.full(record["run"]["epochs"] + 1, np.nan)
    values[: len(record["rows"])] = [row[key] for row in record["rows"]]
    return values


def final_loss(record: Record) -> float:
    """Mean training loss of the last epoch, infinite if the run diverged."""
    loss = float(curve(record, "loss")[-1])
    return loss if math.isfinite(loss) else math.inf


def epochs_to(record: Record, target: float) -> float:
    """Epochs until the training loss is at most ``target``, interpolated between epochs; infinite if it never is."""
    loss = curve(record, "loss")
    below = np.flatnonzero(loss <= target)
    if len(below) == 0:
        return math.inf
    last = int(below[0])
    if last == 1:  # no loss is known before
        return 1.0
    return last - 1 + float((loss[last - 1] - target) / (loss[last - 1] - loss[last]))


def confusion_until(record: Record, target: float) -> float:
    """Mean lowest cosine from epoch 0 to the one in which the loss reaches ``target``, of all if it never does."""
    epochs = epochs_to(record, target)
    lowest = curve(record, "min_cosine")
    return float(np.nanmean(lowest if math.isinf(epochs) else lowest[: math.ceil(epochs) + 1]))


def write_csv(records: Sequence[Record], path: Path) -> None:
    """One line for each epoch of each run."""
    lines = [_about(record) | row for record in records for row in record["rows"]]
    _write(lines, path)


def write_summary(records: Sequence[Record], target: float, path: Path) -> None:
    """One line for each run."""
    lines = [
        _about(record)
        | {
            "min_cosine_at_init": curve(record, "min_cosine")[0],
            "min_cosine_until_loss": confusion_until(record, target),
            "min_cosine_at_end": curve(record, "min_cosine")[-1],
            "epochs_to_loss": epochs_to(record, target),
            "final_loss": final_loss(record),
            "test_accuracy": record["accuracy"],
            "cpu_seconds": record["cpu_seconds"],
        }
        for record in records
    ]
    _write(lines, path)


def _about(record: Record) -> dict[str, Any]:
    run = {key: record["run"][key] for key in ("data", "model", "init", "lr", "seed")}
    return run | {"tuning": int(is_tuning(record)), "parameters": record["parameters"]}


def _write(lines: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{value:.6g}" if isinstance(value, float) else value for k, value in line.items()})
