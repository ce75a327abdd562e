"""Name everything private of functorch that the vmapped forward pass needs.

Below vmap a batched tensor is an ordinary tensor with one more dimension. torch.func has no public way to reach it from
inside the vmapped function; a release that renames one of these names makes the ghost engine say so and step aside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from torch._C._functorch import (
        _add_batch_dim,
        get_unwrapped,
        is_batchedtensor,
        maybe_get_bdim,
        maybe_get_level,
    )
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack as below_vmap
except ImportError as error:  # pragma: no cover - on a release that renamed them
    MISSING: str | None = f"torch {torch.__version__} has renamed what the ghost engine reads of functorch: {error}"
else:
    MISSING = None

__all__ = ["MISSING", "batched", "behind", "below_vmap", "check_available", "in_front", "is_batched", "level_of"]


def check_available() -> None:
    """Check that this release of torch has the names above.

    Raises:
        NotImplementedError: It does not.
    """
    if MISSING is not None:
        raise NotImplementedError(MISSING)


def is_batched(value: Any) -> bool:
    """Return whether a value is a tensor with one value for each unit."""
    return isinstance(value, Tensor) and bool(is_batchedtensor(value))


def level_of(tensor: Tensor) -> int:
    """Return which vmap made a batched tensor: 1 is the one over units, more are the user's own."""
    return int(maybe_get_level(tensor))


def behind(tensor: Tensor) -> Tensor:
    """Return the ordinary tensor behind a batched one, with the units in whichever dimension they are."""
    return get_unwrapped(tensor)


def in_front(tensor: Tensor, n: int) -> Tensor:
    """Return the values of all units, ``(n, ...)``; of a tensor that is not batched, the same n times."""
    if not is_batchedtensor(tensor):
        return tensor.expand(n, *tensor.shape)
    return behind(tensor).movedim(maybe_get_bdim(tensor), 0)


def batched(tensor: Tensor, level: int = 1, like: Tensor | None = None) -> Tensor:
    """Return the values of all units as a batched tensor; they lie in dimension 0, or where those of ``like`` lie."""
    dimension = 0 if like is None else maybe_get_bdim(like)
    return _add_batch_dim(tensor, dimension, level)
