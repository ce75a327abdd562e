"""How one object is put back: written to only if it has changed, so that what was not touched stays untouched.

Functions that have to compare values return whether they have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from operator import is_
from typing import Any

import torch
from torch import Tensor


def restore_leaf(tensor: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    """Put the gradient and the flag of a leaf back."""
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)
    if tensor.grad is not grad:
        tensor.grad = grad


def restore_tensor(tensor: Tensor, saved: Tensor) -> bool:
    """Put the values of a tensor back, found by comparing them."""
    if tensor.shape != saved.shape:
        tensor.data = saved.clone()
    elif tensor.layout is not torch.strided or not torch.equal(tensor.detach(), saved):
        tensor.data.copy_(saved)  # `.data`: no graph, and no new version of the tensor
    else:
        return False
    return True


def restore_written(tensor: Tensor, saved: Tensor, version: int) -> None:
    """Put the values of a tensor back, if its version says that it was written to."""
    if tensor._version != version:
        restore_tensor(tensor, saved)


def restore_array(array: Any, saved: Any) -> bool:
    """Put the values of a NumPy array back."""
    changed: bool = array.tobytes() != saved.tobytes()
    if changed:
        array[...] = saved
    return changed


def restore_mapping(mapping: MutableMapping[Any, Any], saved: dict[Any, Any]) -> bool:
    """Put the keys and values of a mapping back, in their order."""
    if is_same(mapping, saved):
        return False
    if not _same(mapping, saved):
        mapping.clear()
    for key, value in saved.items():  # a Counter understands `update` differently
        mapping[key] = value
    return True


def restore_sequence(sequence: Any, saved: list[Any]) -> None:
    """Put the entries of a list or deque back."""
    if not _same(sequence, saved):
        sequence.clear()
        sequence.extend(saved)


def restore_set(values: set[Any], saved: set[Any]) -> None:
    """Put the entries of a set back."""
    if values != saved:
        values.clear()
        values.update(saved)


def restore_slots(value: Any, saved: dict[str, Any]) -> None:
    """Put the attributes of an object with ``__slots__`` back."""
    for name, entry in saved.items():
        if getattr(value, name, None) is not entry:
            object.__setattr__(value, name, entry)


def is_same(mapping: Mapping[Any, Any], saved: Mapping[Any, Any]) -> bool:
    """Return whether the keys of a mapping and its values are the objects that they were."""
    return _same(mapping.values(), saved.values()) and _same(mapping, saved)


def _same(now: Collection[Any], saved: Collection[Any]) -> bool:
    return len(now) == len(saved) and all(map(is_, now, saved))
