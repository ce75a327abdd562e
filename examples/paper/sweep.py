"""Many runs: side by side on the cores there are, each kept in a file of its own, so that none is done twice."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from .moments import Record, at_end, at_initialisation, at_loss, early, epochs_to, failed, final_loss
from .protocol import Protocol
from .run import Run, train

Finish: TypeAlias = Callable[[Sequence[Run], str], list[Record]]

TUNING_SEED = 1000  # no reported seed decides on the learning rate


def finish(runs: Sequence[Run], title: str, *, folder: Path, data_dir: str | None, pool: Executor) -> list[Record]:
    """Return the records of ``runs``, in their order.

    Those that ``folder`` has are read, the others are trained in ``pool``. Raises ``RuntimeError`` with the run that
    failed; what was finished stays.
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


def tuned(runs: Sequence[Run], protocol: Protocol, title: str, finish: Finish) -> list[Record]:
    """Return the records of all ``runs`` at all rates with one seed, then at the best rate with the others.

    The best rate is that with the lowest training loss at the end of the tuning epochs.
    """
    trials = [replace(run, epochs=protocol.tuning_epochs, seed=TUNING_SEED) for run in runs]
    grid = [[replace(trial, lr=rate) for rate in protocol.rates] for trial in trials]
    tried = finish([trial for row in grid for trial in row], f"{title}: learning rates")
    loss = {Run(**record["run"]): final_loss(record) for record in tried}
    best = [min(row, key=loss.__getitem__).lr for row in grid]
    seeds = range(protocol.seeds)
    repeated = [replace(run, lr=rate, seed=seed) for run, rate in zip(runs, best, strict=True) for seed in seeds]
    return tried + finish(repeated, f"{title}: {protocol.seeds} seeds")


def train_to_file(run: Run, path: Path, data_dir: str | None) -> None:
    """Train in a process of its own; the file appears whole or not at all."""
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


def chosen(records: Sequence[Record], model: str, init: str = "msra", data: str | None = None) -> list[Record]:
    """Return those of a network at its best learning rate, one for each seed; of one data set where it is named."""
    same = [r for r in records if (r["run"]["model"], r["run"]["init"]) == (model, init) and not is_tuning(r)]
    return [r for r in same if data in (None, r["run"]["data"])]


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Write one line for each epoch of each run."""
    lines = [_about(record) | row for record in records for row in record["rows"]]
    _write(lines, path)


def write_summary(records: Sequence[Record], targets: dict[str, float], path: Path) -> None:
    """Write one line for each run; ``targets`` has the loss that counts for each data set.

    The lowest cosine at initialisation repeats up to rounding. Columns that begin with ``trained_`` do not, on another
    processor or with another number of threads: rounding decides where a training goes.
    """
    lines = []
    for record in records:
        target = targets[record["run"]["data"]]
        line = {
            "min_cosine_at_init": at_initialisation(record),
            "trained_min_cosine_early": early(record),
            "trained_min_cosine_at_loss": at_loss(record, target),
            "trained_min_cosine_at_end": at_end(record),
            "trained_epochs_to_loss": epochs_to(record, target),
            "trained_final_loss": final_loss(record),
            "trained_test_accuracy": record["accuracy"],
            "trained_failed": int(failed(record)),
        }
        lines.append(
            _about(record) | {"loss": target} | line | {key: record[key] for key in ("cpu_seconds", "processor")}
        )
    _write(lines, path)


def _about(record: Record) -> dict[str, Any]:
    run = {key: record["run"][key] for key in ("data", "model", "init", "lr", "epochs", "seed")}
    return run | {"tuning": int(is_tuning(record)), "parameters": record["parameters"]}


def _write(lines: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{value:.6g}" if isinstance(value, float) else value for k, value in line.items()})
