"""Custom autograd Functions and activation checkpoints in a vmapped forward pass.

Neither passes through a TorchFunctionMode, so names of PyTorch are replaced while a pass runs, for its thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch.autograd import Function

from lightning_gradconf.gram.ghost.functorch import batched, below_vmap, in_front, is_batched


@contextmanager
def vmappable(n: int) -> Iterator[None]:
    """Let custom Functions without a vmap rule run unit by unit, and checkpoints as if they were none.

    A checkpoint would compute its activations again in the backward pass, after vmap has ended.
    """
    thread, apply = threading.get_ident(), Function.__dict__["apply"]
    generator = checkpoints._checkpoint_without_reentrant_generator

    def apply_by_unit(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            if cls is checkpoints.CheckpointFunction:
                function, _, *inputs = args
                return function(*inputs)
            if any(map(is_batched, args)) and not ("vmap" in vars(cls) or cls.generate_vmap_rule):
                return _by_unit(n, lambda *one: apply.__func__(cls, *one, **kwargs), args)
        return apply.__func__(cls, *args, **kwargs)

    def nothing_around(*args: Any, **kwargs: Any) -> Any:
        return _nothing() if threading.get_ident() == thread else generator(*args, **kwargs)

    Function.apply = classmethod(apply_by_unit)  # type: ignore[assignment, method-assign]
    checkpoints._checkpoint_without_reentrant_generator = nothing_around
    try:
        yield
    finally:
        Function.apply = apply  # type: ignore[method-assign]
        checkpoints._checkpoint_without_reentrant_generator = generator


def _nothing() -> Iterator[None]:
    yield


def _by_unit(n: int, function: Callable[..., Any], args: Any) -> Any:
    rows = [in_front(arg, n) if is_batched(arg) else arg for arg in args]
    if any(map(is_batched, rows)):
        raise NotImplementedError("a custom autograd Function inside a vmap of the loss's own")
    has_units = [is_batched(arg) for arg in args]
    with below_vmap():
        results = [
            function(*(row[i] if own else row for row, own in zip(rows, has_units, strict=True))) for i in range(n)
        ]
        several = isinstance(results[0], tuple)
        columns = [*zip(*results, strict=True)] if several else [results]
        stacked = [torch.stack(column) for column in columns]
    return tuple(map(batched, stacked)) if several else batched(stacked[0])
