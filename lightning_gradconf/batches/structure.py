"""Nested containers of a batch: their entries, their leaves, and containers like them with other entries.

This is a walk of our own, since `torch.utils._pytree` takes a dataclass, a Hugging Face ``BatchEncoding`` and every
other mapping that is not registered for a leaf, and rebuilds a subclass of dict or list as its base class.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def children(node: Any) -> list[tuple[str, Any]]:
    """Return the entries of a container, each with the suffix that leads to it; none for everything else.

    >>> children({"x": 1, "y": 2})
    [("['x']", 1), ("['y']", 2)]
    """
    if isinstance(node, list | tuple):
        return [(f"[{i}]", child) for i, child in enumerate(node)]
    if isinstance(node, Mapping):
        return [(f"[{key!r}]", child) for key, child in node.items()]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f".{field.name}", getattr(node, field.name)) for field in dataclasses.fields(node)]
    return []


def rebuild(node: Any, entries: list[Any]) -> Any:
    """Return a container like ``node`` with other entries."""
    if isinstance(node, Mapping):
        rebuilt = copy.copy(node)  # keeps what a BatchEncoding or a defaultdict knows beside its entries
        for key, child in zip(node, entries, strict=True):
            rebuilt[key] = child  # type: ignore[index]
        return rebuilt
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*entries)
    if isinstance(node, list | tuple):
        return type(node)(entries)
    rebuilt = copy.copy(node)
    for field, child in zip(dataclasses.fields(node), entries, strict=True):
        object.__setattr__(rebuilt, field.name, child)  # a frozen dataclass too
    return rebuilt


def contains_tensor(node: Any) -> bool:
    """Return whether there is a tensor in a container, or ``node`` is one."""
    return isinstance(node, Tensor) or any(contains_tensor(child) for _, child in children(node))


def leaves(node: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield tensors and everything without tensors inside, each with the expression that leads to it."""
    entries = [] if isinstance(node, Tensor) else children(node)
    if any(contains_tensor(child) for _, child in entries):
        for key, child in entries:
            yield from leaves(child, path + key)
    else:
        yield path, node


def map_leaves(function: Callable[[Any], Any], node: Any) -> Any:
    """Return the same structure with ``function`` applied to each leaf, in the order of `leaves`."""
    if isinstance(node, Tensor) or not contains_tensor(node):
        return function(node)
    return rebuild(node, [map_leaves(function, child) for _, child in children(node)])


def copy_of(batch: Any) -> Any:
    """Return a batch of the same structure that shares no tensor with ``batch``."""
    return map_leaves(lambda leaf: leaf.clone() if hasattr(leaf, "clone") else leaf, batch)  # graph batches clone too


def deep_copy_of(node: Any) -> Any:
    """Return a copy of all containers, tensors and arrays in ``node``, for code that may write to them."""
    if isinstance(node, Tensor):
        return node.clone()
    if is_array(node):
        return node.copy()
    if not (entries := children(node)):
        return copy.copy(node) if isinstance(node, list | Mapping) else node
    try:
        return rebuild(node, [deep_copy_of(child) for _, child in entries])
    except (TypeError, ValueError, AttributeError):  # a container that cannot be written to need not be copied
        return node


def is_array(node: Any) -> bool:
    """Return whether ``node`` is a NumPy array, which is sliced along its dimensions as a tensor is."""
    return hasattr(node, "__array_interface__") and hasattr(node, "copy") and hasattr(node, "shape")


def same(a: Any, b: Any) -> bool:
    """Return whether two parts of a batch hold the same values, floats up to rounding."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_floating_point() or a.is_complex():
            return bool(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True))
        return bool(torch.equal(a, b))
    if is_array(a):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if (entries := children(a)) or children(b):
        others = children(b)
        return [key for key, _ in entries] == [key for key, _ in others] and all(
            same(x, y) for (_, x), (_, y) in zip(entries, others, strict=True)
        )
    try:
        return bool(a == b)
    except Exception:  # objects that cannot be compared
        return False
