"""A batch of any structure as n units of k samples, and back.

A *unit* is what one gradient belongs to. It is itself a batch, so the user's code always sees a batch, of one
sample at the smallest. For `split`, samples lie on dimension 0, as `samples.assume` says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradconf.batches.samples import WHOLE, assume, count, cut
from lightning_gradconf.batches.structure import copy_of, leaves, map_leaves, same

__all__ = ["Origin", "Unit", "class_of", "copy_of", "num_samples", "shapes_of", "split", "stack"]


class Origin(NamedTuple):
    """Where the samples of a unit come from; of several loaders, those of the first.

    Attributes:
        samples: Their positions in a batch, or without one, their indices in the dataset.
        batch: The index of that batch in its loader, None for samples of a dataset.
        rank: The process that has them.

    >>> str(Origin((3,), batch=12)), str(Origin((40, 7)))
    ('batch 12, sample 3', 'dataset[40, 7]')
    """

    samples: tuple[Any, ...]
    batch: int | None = None
    rank: int | None = None

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.samples[:4])) + (", ..." if len(self.samples) > 4 else "")
        if not self.samples:
            shown = "?"
        where = f"dataset[{shown}]" if self.batch is None else f"batch {self.batch}, sample {shown}"
        return where if self.rank is None else f"rank {self.rank}, {where}"


class Unit(NamedTuple):
    """A batch that one gradient belongs to, and where it comes from.

    Attributes:
        batch: The batch.
        origin: Where its samples come from.
        size: How many they are, of the loader with the fewest; None if that cannot be told.
    """

    batch: Any
    origin: Origin
    size: int | None = None


def num_samples(batch: Any) -> int:
    """Return the number of samples in ``batch``.

    Raises:
        ValueError: The samples cannot be told: no tensor has a dimension, or the first dimensions differ.

    >>> num_samples({"x": torch.zeros(8, 3), "y": torch.zeros(8), "temperature": torch.tensor(1.0)})
    8
    """
    return count(batch, assume(batch))[WHOLE]


def split(batch: Any, unit_size: int, num_units: int | None = None) -> list[Any]:
    """Return ``batch`` as a list of units of ``unit_size`` samples: copies, so that no unit aliases the batch.

    Args:
        batch: The batch, of n * ``unit_size`` samples or more.
        unit_size: Samples in a unit.
        num_units: Take only the first so many units; None takes all that are full.

    Raises:
        ValueError: The samples of the batch cannot be told.

    >>> [unit["x"].tolist() for unit in split({"x": torch.arange(4)}, unit_size=2)]
    [[0, 1], [2, 3]]
    """
    return cut(batch, assume(batch), {WHOLE: unit_size}, num_units)


def stack(
    units: Sequence[Any], other: Callable[[list[Any], str], Any] | None = None
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of ``units`` as tensors ``(n, k, ...)``, and the function from one row of each to a unit.

    Args:
        units: Batches of one structure.
        other: What stands for the parts of all units that are no tensor and differ, given where they are.

    Raises:
        ValueError: The units differ in the shape of a tensor, or without ``other`` in something that is no tensor.
    """
    columns = list(zip(*(list(leaves(unit)) for unit in units), strict=True))
    tensors = []
    others: list[Any] = []
    for column in columns:
        path, first = column[0]
        found = [leaf for _, leaf in column]
        if isinstance(first, Tensor):
            if any(leaf.shape != first.shape for leaf in found):
                shapes = sorted({tuple(leaf.shape) for leaf in found})
                raise ValueError(f"{path} has different shapes in different units: {shapes}")
            tensors.append(torch.stack(found))
        elif all(same(leaf, first) for leaf in found):
            others.append(first)
        elif other is not None:
            others.append(other(found, path))
        else:
            raise ValueError(f"{path} is no tensor and differs between units")

    def unit(rows: Sequence[Tensor]) -> Any:
        remaining, constant = iter(rows), iter(others)
        return map_leaves(lambda leaf: next(remaining if isinstance(leaf, Tensor) else constant), units[0])

    return tensors, unit


def shapes_of(unit: Any) -> Hashable:
    """Return what units must have in common to be stacked: where their tensors are, their shapes and types."""
    return tuple((path, leaf.shape, leaf.dtype) for path, leaf in leaves(unit) if isinstance(leaf, Tensor))


def class_of(batch: Any, labels: str | int | Callable[[Any], Any]) -> int:
    """Return the class of the one sample in a batch.

    Args:
        batch: The batch.
        labels: The key or index of the classes in it, or a function of it.

    Raises:
        ValueError: There is nothing, or not one whole number.
    """
    try:
        found = labels(batch) if callable(labels) else batch[labels]
    except (KeyError, IndexError, TypeError) as error:
        if callable(labels):
            raise
        raise ValueError(f"labels={labels!r} is not in the batch, {_entries(batch)}") from error
    label = torch.as_tensor(found)
    if label.numel() != 1 or label.is_floating_point():
        raise ValueError(
            f"labels={labels!r} must give one whole number for a batch of one sample, found {label.dtype} "
            f"{tuple(label.shape)}; pass a function of the batch that gives its class"
        )
    return int(label)


def _entries(batch: Any) -> str:
    """Return what a batch has its classes under, in words."""
    if isinstance(batch, Mapping):
        return f"which has the keys {', '.join(map(repr, batch))}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {len(batch)}: give an index such as labels={len(batch) - 1}"
    return f"a {type(batch).__name__}: give a function of the batch that returns its class"
