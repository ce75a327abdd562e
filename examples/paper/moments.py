"""When in a training gradient confusion is read off, and which trainings failed.

The paper's own quantity is the lowest cosine at the end of training. What is early, and networks at the same loss, tell
where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from .data import classes_of

Record: TypeAlias = dict[str, Any]  # what run.train() returns
Measure: TypeAlias = Callable[[Record], float]


def moments(target: float) -> dict[str, Measure]:
    """Return the lowest cosine at four moments of a training, as functions of its record."""
    return {
        "at initialisation": at_initialisation,
        "early": early,
        f"at loss {target:g}": lambda record: at_loss(record, target),
        "at the end": at_end,
    }


def at_initialisation(record: Record) -> float:
    return float(curve(record, "min_cosine")[0])


def early(record: Record) -> float:
    """Return the mean over the first sixth of the epochs, without the initialisation."""
    return float(curve(record, "min_cosine")[1 : 1 + max(1, record["run"]["epochs"] // 6)].mean())


def at_loss(record: Record, target: float) -> float:
    """Return the mean over the epoch in which the loss reaches ``target`` and its neighbours; NaN if none does."""
    epochs = epochs_to(record, target)
    if math.isinf(epochs):
        return math.nan
    epoch = math.ceil(epochs)
    return float(np.nanmean(curve(record, "min_cosine")[max(epoch - 1, 0) : epoch + 2]))


def at_end(record: Record) -> float:
    """Return the mean over the last tenth of the epochs; NaN if the run diverged."""
    return float(curve(record, "min_cosine")[-max(1, record["run"]["epochs"] // 10) :].mean())


def curve(record: Record, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return one value for each epoch from 0 on; NaN from where a run diverged."""
    values = np.full(record["run"]["epochs"] + 1, np.nan)
    values[: len(record["rows"])] = [row[key] for row in record["rows"]]
    return values


def final_loss(record: Record) -> float:
    """Return the mean training loss of the last epoch, infinite if the run diverged."""
    loss = float(curve(record, "loss")[-1])
    return loss if math.isfinite(loss) else math.inf


def epochs_to(record: Record, target: float) -> float:
    """Return the epochs until the training loss is at most ``target``, interpolated; infinite if it never is."""
    loss = curve(record, "loss")
    below = np.flatnonzero(loss <= target)
    if len(below) == 0:
        return math.inf
    last = int(below[0])
    if last == 1:  # no loss is known before
        return 1.0
    return last - 1 + float((loss[last - 1] - target) / (loss[last - 1] - loss[last]))


def failed(record: Record) -> bool:
    """Return whether a training ends close to guessing: above 90 % of the loss of equal odds, or diverged."""
    return final_loss(record) > 0.9 * math.log(classes_of(record["run"]["data"]))


def trained(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if not failed(record)]
