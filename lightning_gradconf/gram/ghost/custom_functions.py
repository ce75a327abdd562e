"""Custom autograd Functions and activation checkpoints in a vmapped forward pass.

Neither passes through a TorchFunctionMode, so names of PyTorch are replaced while a pass runs, for its thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch.autograd import Function

from lightning_gradconf.gram.ghost.functorch import batched, below_vmap, in_front, is_batched

# What runs around a checkpoint without reentry, by the name that a release of torch has for it.
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")


@contextmanager
def vmappable(n: int) -> Iterator[None]:
    """Let custom Functions without a vmap rule run unit by unit, and checkpoints as if they were none.

    A checkpoint would compute its activations again in the backward pass, after vmap has ended.
    """
    thread, apply = threading.get_ident(), Function.__dict__["apply"]
    generators = {name: vars(checkpoints)[name] for name in _GENERATORS if name in vars(checkpoints)}

    def apply_by_unit(cls: Any, *args: Any, **kwargs: Any) -> Any:
        usual = apply.__get__(None, cls)
        if threading.get_ident() == thread:
            if cls is checkpoints.CheckpointFunction:
                function, _, *inputs = args
                return function(*inputs)
            if any(map(is_batched, args)) and not ("vmap" in vars(cls) or cls.generate_vmap_rule):
                return _by_unit(n, lambda *one: usual(*one, **kwargs), args)
        return usual(*args, **kwargs)

    def nothing_around(generator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _nothing() if threading.get_ident() == thread else generator(*args, **kwargs)

    Function.apply = classmethod(apply_by_unit)  # type: ignore[assignment, method-assign]
    vars(checkpoints).update({name: partial(nothing_around, generator) for name, generator in generators.items()})
    try:
        yield
    finally:
        Function.apply = apply  # type: ignore[method-assign]
        vars(checkpoints).update(generators)


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
