"""A batch of any structure as n units of k samples, and back.

A *unit* is what one gradient belongs to. It is itself a batch, so the user's code always sees a batch, of one
sample at the smallest. Here samples lie on dimension 0, as `placement.assume` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf.batches.placement import (
    WHOLE,
    assume,
    count,
    cut,
    is_list_of_mappings,
    one_a_sample,
    samples_of_lists,
)
from lightning_gradconf.batches.structure import children, contains_tensor, copy_of, leaves, map_leaves, rebuild, same

__all__ = ["copy_of", "join", "num_samples", "split", "stack"]


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


def join(units: Sequence[Any]) -> Any:
    """Return one batch with the samples of all ``units`` in order; what is no sample is taken from the first.

    Raises:
        ValueError: Tensors of different units do not fit together.

    >>> join(split((torch.arange(4), "name"), unit_size=2))
    (tensor([0, 1, 2, 3]), 'name')
    """
    first = units[0]
    if samples_of_lists(first) is not None:
        if is_list_of_mappings(first):
            return type(first)(sample for unit in units for sample in unit)
        columns = zip(*(([column for _, column in children(unit)]) for unit in units), strict=True)
        return rebuild(first, [type(column[0])(s for part in column for s in part) for column in columns])
    size = num_samples(first)

    def merge(parts: Sequence[Any]) -> Any:
        leaf = parts[0]
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or leaf.shape[0] != size:
                return leaf
            try:
                return torch.cat(parts)  # type: ignore[arg-type]
            except RuntimeError:
                shapes = sorted({tuple(part.shape) for part in parts})
                raise ValueError(f"units of different shapes {shapes} do not fit into one batch") from None
        if any(map(contains_tensor, parts)):
            columns = zip(*([child for _, child in children(part)] for part in parts), strict=True)
            return rebuild(leaf, [merge(column) for column in columns])
        if all(part is leaf for part in parts):  # shared, though it may happen to be as long as a unit
            return leaf
        return type(leaf)(entry for part in parts for entry in part) if one_a_sample(leaf, size) else leaf

    return merge(units)


def stack(units: Sequence[Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of ``units`` as tensors ``(n, k, ...)``, and the function from one row of each to a unit.

    Raises:
        ValueError: The units differ in the shape of a tensor or in something that is no tensor.
    """
    columns = list(zip(*(list(leaves(unit)) for unit in units), strict=True))
    tensors = []
    for column in columns:
        path, first = column[0]
        found = [leaf for _, leaf in column]
        if isinstance(first, Tensor):
            if any(leaf.shape != first.shape for leaf in found):
                shapes = sorted({tuple(leaf.shape) for leaf in found})
                raise ValueError(f"{path} has different shapes in different units: {shapes}")
            tensors.append(torch.stack(found))
        elif not all(same(leaf, first) for leaf in found):
            raise ValueError(f"{path} is no tensor and differs between units")

    def unit(rows: Sequence[Tensor]) -> Any:
        remaining = iter(rows)
        return map_leaves(lambda leaf: next(remaining) if isinstance(leaf, Tensor) else leaf, units[0])

    return tensors, unit


def differ_beside_tensors(units: Sequence[Any]) -> bool:
    """Return whether something in the units that is neither a tensor nor text differs, such as a list of lengths."""
    if all(isinstance(leaf, Tensor) for _, leaf in leaves(units[0])):
        return False
    columns = zip(*([leaf for _, leaf in leaves(unit) if not isinstance(leaf, Tensor)] for unit in units), strict=True)
    return any(not _same(leaf, first) for first, *others in columns for leaf in others)


def traits(units: Sequence[Any]) -> list[list[float]]:
    """Return one number of each unit for each entry of the batch, such as its length, class or share of padding.

    >>> traits(split((torch.zeros(2, 3), torch.tensor([4, 7])), unit_size=1))
    [[0.0, 0.0], [4.0, 7.0]]
    """
    columns = zip(*([leaf for _, leaf in leaves(unit)] for unit in units), strict=True)
    return [found for column in columns if (found := _sums(column)) is not None]


def _sums(column: Sequence[Any]) -> list[float] | None:
    try:
        if isinstance(column[0], Tensor):
            sums: list[float] = torch.stack([leaf.sum().double() for leaf in column]).tolist()
            return sums
        return [float(sum(leaf)) if isinstance(leaf, list | tuple) else float(leaf) for leaf in column]
    except (TypeError, ValueError, RuntimeError):  # no numbers
        return None


def _same(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, str | bytes | os.PathLike):
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    try:
        return bool(a == b)
    except Exception:  # an array, for one
        return False
