"""Custom autograd Functions in a vmapped forward pass.

They do not pass through a TorchFunctionMode, so ``Function.apply`` is replaced while a pass runs, for its thread alone.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import _get_current_function_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from lightning_gradconf.gram.ghost.checkpoints import without_checkpoints
from lightning_gradconf.gram.ghost.functorch import batched, below_vmap, in_front, is_batched
from lightning_gradconf.gram.ghost.unit_numbers import UnitNumber, in_a_pass
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.process_state import have_drawn, torch_states

_UNIT = "unit of lightning_gradconf"
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


def unit_of(node: Node) -> int | None:
    """Return the one unit that a node has to do with, None if there are more: a Function may have run unit by unit."""
    return node.metadata.get(_UNIT)  # type: ignore[attr-defined, no-any-return]


@contextmanager
def unit_by_unit(n: int) -> Iterator[None]:
    """Within this context, custom Functions without a vmap rule run unit by unit, and checkpoints as if not there."""
    thread = threading.get_ident()

    def apply_by_unit(cls: Any, *args: Any, **kwargs: Any) -> Any:
        apply = _USUAL.__get__(None, cls)
        if threading.get_ident() == thread:
            if cls is CheckpointFunction:
                function, _, *inputs = args
                return function(*inputs)
            if not ("vmap" in vars(cls) or cls.generate_vmap_rule):
                if any(map(_has_units, args)):
                    return _by_unit(n, lambda *one: apply(*one, **kwargs), args)
                if not any(map(_has_units, tree_leaves((args, kwargs)))):
                    return _once(lambda: apply(*args, **kwargs))
        return apply(*args, **kwargs)

    with without_checkpoints(), in_a_pass(), _applied_by(apply_by_unit):
        yield


@contextmanager
def _applied_by(function: Callable[..., Any]) -> Iterator[None]:
    """Within this context, ``function(cls, *args)`` runs in the place of ``Function.apply``.

    Where ``apply`` is written in Python, only its code object is exchanged. The function object stays the same, because
    user code may have stored it, as in ``relu = MyReLU.apply``.
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


@contextmanager
def _outside() -> Iterator[None]:
    """Leave vmap and all that stands in for it; BatchNorm and dropout stay as they are while gradients are measured."""
    with below_vmap():
        if isinstance(mode := _get_current_function_mode(), MeasurementMode):
            usual = MeasurementMode(running_statistics=mode.running_statistics, dropout=mode.dropout)
            with _pop_mode_temporarily(), usual:
                yield
        else:
            yield


def _once(function: Callable[[], Any]) -> Any:
    """Return what a Function makes of tensors that all units share, as of a weight that it rounds.

    Raises:
        NotImplementedError: It draws random numbers, which each unit would have to have of its own.
    """
    with _outside():
        before = torch_states()
        result = function()
        if have_drawn(before):
            raise NotImplementedError("a custom autograd Function of parameters alone draws random numbers")
    return result


def _has_units(value: Any) -> bool:
    return is_batched(value) or type(value) is UnitNumber


def _by_unit(n: int, function: Callable[..., Any], args: Any) -> Any:
    rows = [in_front(arg, n) if is_batched(arg) else arg for arg in args]
    rows = [row.of_each(n) if type(row) is UnitNumber else row for row in rows]
    if any(map(is_batched, rows)):
        raise NotImplementedError("a custom autograd Function inside a vmap of the loss's own")
    has_units = [*map(_has_units, args)]
    with _outside():
        # Of another node than the parameter: gradients that arrive here are this Function's alone, also where its other
        # operands are made of the same parameter.
        rows = [
            torch.ops.aten.alias(row) if isinstance(row, Tensor) and row.requires_grad and not own else row
            for row, own in zip(rows, has_units, strict=True)
        ]
        results = [
            function(*(row[i] if own else row for row, own in zip(rows, has_units, strict=True))) for i in range(n)
        ]
        several = isinstance(results[0], tuple)
        columns = [*zip(*results, strict=True)] if several else [results]
        for column in columns:
            for i, result in enumerate(column):
                if isinstance(result, Tensor) and isinstance(result.grad_fn, BackwardCFunction):
                    result.grad_fn.metadata[_UNIT] = i
        stacked = [torch.stack(column) for column in columns]
    return tuple(map(batched, stacked)) if several else batched(stacked[0])
