"""Custom autograd Functions and activation checkpoints in a vmapped forward pass.

Neither passes through a TorchFunctionMode, so parts of PyTorch are replaced while a pass runs, for its thread alone.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch.autograd import Function

from lightning_gradconf.gram.ghost.functorch import batched, below_vmap, in_front, is_batched
from lightning_gradconf.gram.ghost.unit_numbers import in_a_pass

# What runs around a checkpoint without reentry, by the name that a release of torch has for it.
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
_APPLY = Function.__dict__["apply"]
# Before torch 2.15 it is written in Python.
_IN_PYTHON: Any = getattr(_APPLY, "__func__", None)
_CODE = _IN_PYTHON and _IN_PYTHON.__code__
# `apply` as PyTorch has it, also while `_IN_PYTHON` runs another code.
_USUAL: Any = (
    _APPLY
    if _IN_PYTHON is None
    else classmethod(types.FunctionType(_CODE, _IN_PYTHON.__globals__, "apply", None, _IN_PYTHON.__closure__))
)


@contextmanager
def vmappable(n: int) -> Iterator[None]:
    """Let custom Functions without a vmap rule run unit by unit, and checkpoints as if they were none.

    A checkpoint would compute its activations again in the backward pass, after vmap has ended.
    """
    thread = threading.get_ident()
    generators = {name: vars(checkpoints)[name] for name in _GENERATORS if name in vars(checkpoints)}

    def apply_by_unit(cls: Any, *args: Any, **kwargs: Any) -> Any:
        apply = _USUAL.__get__(None, cls)
        if threading.get_ident() == thread:
            if cls is checkpoints.CheckpointFunction:
                function, _, *inputs = args
                return function(*inputs)
            if any(map(is_batched, args)) and not ("vmap" in vars(cls) or cls.generate_vmap_rule):
                return _by_unit(n, lambda *one: apply(*one, **kwargs), args)
        return apply(*args, **kwargs)

    def nothing_around(generator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return _nothing() if threading.get_ident() == thread else generator(*args, **kwargs)

    vars(checkpoints).update({name: partial(nothing_around, generator) for name, generator in generators.items()})
    try:
        with in_a_pass(), _applied_by(apply_by_unit):
            yield
    finally:
        vars(checkpoints).update(generators)


@contextmanager
def _applied_by(function: Callable[..., Any]) -> Iterator[None]:
    """Within this context, ``function(cls, *args)`` runs in the place of ``Function.apply``.

    Where that is written in Python, it stays the object that it is and gets another code: user code may have kept it,
    as in ``relu = MyReLU.apply``.
    """
    if _IN_PYTHON is None:
        Function.apply = classmethod(function)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Function.apply = _APPLY  # type: ignore[method-assign]
        return
    Function._apply_by_unit = staticmethod(function)  # type: ignore[attr-defined]
    _IN_PYTHON.__code__ = _redirected(Function).__code__
    try:
        yield
    finally:
        _IN_PYTHON.__code__ = _CODE
        with suppress(AttributeError):  # another thread that measures may have come to its end before
            del Function._apply_by_unit  # type: ignore[attr-defined]


def _redirected(owner: Any) -> Any:
    """Return a function with the code for ``Function.apply``: its one free variable is the class, as there."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return owner._apply_by_unit(cls, *args, **kwargs)

    return apply


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
