"""A batch of any structure as n units of k samples, and back.

A *unit* is what one gradient belongs to. It is itself a batch, so the user's code always sees a batch, of one
sample at the smallest. Samples lie along dimension 0 of every tensor of the batch; a tensor without dimensions, or
with a first dimension of 1 beside larger ones, is shared by all samples, and so is everything that is no tensor.
A list without tensors that is as long as the batch (strings, paths, ids) holds one entry a sample.

Detectors keep images of different sizes in lists, ``(images, targets)`` or ``[{"image": ..., ...}, ...]``. There the
samples lie along the lists instead.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def num_samples(batch: Any) -> int:
    """Return the number of samples in ``batch``.

    Raises:
        ValueError: The samples cannot be told: no tensor has a dimension, or the first dimensions differ.

    >>> num_samples({"x": torch.zeros(8, 3), "y": torch.zeros(8), "temperature": torch.tensor(1.0)})
    8
    """
    if (lists := _lists_of_samples(batch)) is not None:
        return lists
    sizes = {path: leaf.shape[0] for path, leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0}
    if not sizes:
        raise ValueError(
            f"found no tensor with a sample dimension in a batch of type {type(batch).__name__}, so its samples "
            "cannot be told apart; give a batch in which dimension 0 of the tensors counts the samples"
        )
    distinct = set(sizes.values()) - {1}
    if len(distinct) > 1:
        shapes = ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in _leaves(batch) if path in sizes)
        raise ValueError(
            f"the tensors of the batch differ in their first dimension ({shapes}), so its samples cannot be told "
            "apart; put the samples on dimension 0 of every tensor, or select those tensors in `loss_fn`"
        )
    return distinct.pop() if distinct else 1


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
    size = num_samples(batch)
    available = size // unit_size
    n = available if num_units is None else min(num_units, available)
    parts = [slice(i * unit_size, (i + 1) * unit_size) for i in range(n)]
    if _lists_of_samples(batch) is not None:
        if _is_list_of_mappings(batch):
            return [copy_of(batch[samples]) for samples in parts]
        columns = [child for _, child in _children(batch)]
        return [_rebuild(batch, [copy_of(column[samples]) for column in columns]) for samples in parts]

    def cut(node: Any) -> list[Any]:
        """What each unit has of a part of the batch."""
        if isinstance(node, Tensor):
            shared = node.dim() == 0 or node.shape[0] != size
            return [(node if shared else node[samples]).clone() for samples in parts]
        if _contains_tensor(node):
            entries = zip(*(cut(child) for _, child in _children(node)), strict=True)
            return [_rebuild(node, list(own)) for own in entries]
        return [copy.copy(node[samples]) if _one_a_sample(node, size) else node for samples in parts]

    return cut(batch)


def copy_of(batch: Any) -> Any:
    """Return a batch of the same structure that shares no tensor with ``batch``."""
    return _map(lambda leaf: leaf.clone() if hasattr(leaf, "clone") else leaf, batch)  # graph batches can clone too


def join(units: Sequence[Any]) -> Any:
    """Return one batch with the samples of all ``units`` in order; what is no sample is taken from the first.

    Raises:
        ValueError: Tensors of different units do not fit together.

    >>> join(split((torch.arange(4), "name"), unit_size=2))
    (tensor([0, 1, 2, 3]), 'name')
    """
    first = units[0]
    if _lists_of_samples(first) is not None:
        if _is_list_of_mappings(first):
            return type(first)(sample for unit in units for sample in unit)
        columns = zip(*(([column for _, column in _children(unit)]) for unit in units), strict=True)
        return _rebuild(first, [type(column[0])(s for part in column for s in part) for column in columns])
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
        if any(map(_contains_tensor, parts)):
            columns = zip(*([child for _, child in _children(part)] for part in parts), strict=True)
            return _rebuild(leaf, [merge(column) for column in columns])
        if all(part is leaf for part in parts):  # shared, though it may happen to be as long as a unit
            return leaf
        return type(leaf)(entry for part in parts for entry in part) if _one_a_sample(leaf, size) else leaf

    return merge(units)


def stack(units: Sequence[Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of ``units`` as tensors ``(n, k, ...)``, and the function from one row of each to a unit.

    Raises:
        ValueError: The units differ in the shape of a tensor or in something that is no tensor.
    """
    columns = list(zip(*(list(_leaves(unit)) for unit in units), strict=True))
    tensors = []
    for column in columns:
        path, first = column[0]
        leaves = [leaf for _, leaf in column]
        if isinstance(first, Tensor):
            if any(leaf.shape != first.shape for leaf in leaves):
                shapes = sorted({tuple(leaf.shape) for leaf in leaves})
                raise ValueError(f"{path} has different shapes in different units: {shapes}")
            tensors.append(torch.stack(leaves))
        elif any(leaf is not first and leaf != first for leaf in leaves):
            raise ValueError(f"{path} is no tensor and differs between units")

    def unit(rows: Sequence[Tensor]) -> Any:
        remaining = iter(rows)
        return _map(lambda leaf: next(remaining) if isinstance(leaf, Tensor) else leaf, units[0])

    return tensors, unit


def shapes_of(unit: Any) -> Hashable:
    """Return what units must have in common to be stacked: where their tensors are, their shapes and types."""
    leaves = [(path, leaf) for path, leaf in _leaves(unit) if isinstance(leaf, Tensor)]
    return tuple((path, leaf.shape, leaf.dtype) for path, leaf in leaves)


def differ_beside_tensors(units: Sequence[Any]) -> bool:
    """Return whether something in the units that is neither a tensor nor text differs, such as a list of lengths."""
    if all(isinstance(leaf, Tensor) for _, leaf in _leaves(units[0])):
        return False
    columns = zip(*([leaf for _, leaf in _leaves(unit) if not isinstance(leaf, Tensor)] for unit in units), strict=True)
    return any(not _same(leaf, first) for first, *others in columns for leaf in others)


def traits(units: Sequence[Any]) -> list[list[float]]:
    """Return one number of each unit for each entry of the batch, such as its length, class or share of padding.

    >>> traits(split((torch.zeros(2, 3), torch.tensor([4, 7])), unit_size=1))
    [[0.0, 0.0], [4.0, 7.0]]
    """
    columns = zip(*([leaf for _, leaf in _leaves(unit)] for unit in units), strict=True)
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


def _lists_of_samples(batch: Any) -> int | None:
    """The number of samples where they lie along lists, not along dimension 0 of tensors; None elsewhere.

    Only a list of mappings tells: a list of tensors may as well be several inputs, each of many samples.
    """
    if _is_list_of_mappings(batch):
        return len(batch)
    columns = [] if isinstance(batch, Tensor | Mapping) else [child for _, child in _children(batch)]
    if not any(map(_is_list_of_mappings, columns)) or not all(isinstance(column, list | tuple) for column in columns):
        return None
    lengths = {len(column) for column in columns}
    return lengths.pop() if len(lengths) == 1 else None


def _is_list_of_mappings(node: Any) -> bool:
    return isinstance(node, list | tuple) and bool(node) and all(isinstance(entry, Mapping) for entry in node)


def _one_a_sample(leaf: Any, size: int) -> bool:
    """Whether a leaf that is no tensor holds one entry for each of ``size`` samples."""
    return (isinstance(leaf, list | tuple) or hasattr(leaf, "__array__")) and len(leaf) == size


def _leaves(node: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Tensors and everything without tensors inside, each with the expression that leads to it."""
    children = [] if isinstance(node, Tensor) else _children(node)
    if any(_contains_tensor(child) for _, child in children):
        for key, child in children:
            yield from _leaves(child, path + key)
    else:
        yield path, node


def _map(function: Callable[[Any], Any], node: Any) -> Any:
    """The same structure with ``function`` applied to each leaf, in the order of `_leaves`."""
    if isinstance(node, Tensor) or not _contains_tensor(node):
        return function(node)
    return _rebuild(node, [_map(function, child) for _, child in _children(node)])


def _contains_tensor(node: Any) -> bool:
    return isinstance(node, Tensor) or any(_contains_tensor(child) for _, child in _children(node))


def _children(node: Any) -> list[tuple[str, Any]]:
    """The entries of a container, each with the suffix that leads to it; empty for everything else."""
    if isinstance(node, list | tuple):
        return [(f"[{i}]", child) for i, child in enumerate(node)]
    if isinstance(node, Mapping):
        return [(f"[{key!r}]", child) for key, child in node.items()]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f".{field.name}", getattr(node, field.name)) for field in dataclasses.fields(node)]
    return []


def _rebuild(node: Any, children: list[Any]) -> Any:
    """A container like ``node`` with other entries."""
    if isinstance(node, Mapping):
        rebuilt = copy.copy(node)  # keeps what a BatchEncoding or a defaultdict knows beside its entries
        for key, child in zip(node, children, strict=True):
            rebuilt[key] = child  # type: ignore[index]
        return rebuilt
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*children)
    if isinstance(node, list | tuple):
        return type(node)(children)
    rebuilt = copy.copy(node)
    for field, child in zip(dataclasses.fields(node), children, strict=True):
        object.__setattr__(rebuilt, field.name, child)  # a frozen dataclass too
    return rebuilt
