"""What user code meets while all units are computed at once: vmap, with answers to what vmap cannot do.

Every call of PyTorch that the user's code makes passes through `UnitMode`, which knows what torch.func has no rule for
or is slow at (`batching_rules`), what the loss differentiates itself (`autograd_calls`), and what Python reads of
batched tensors (`value_reads`).
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Collection, Hashable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradconf.gram.ghost import autograd_calls, batching_rules
from lightning_gradconf.gram.ghost.agreement import UnitsDiffer
from lightning_gradconf.gram.ghost.functorch import batched, behind, in_front, is_batched
from lightning_gradconf.gram.ghost.unit_numbers import UnitNumber
from lightning_gradconf.gram.ghost.value_reads import READS
from lightning_gradconf.gram.measurement_mode import MeasurementMode

Line = tuple[str, int]  # file and number
_PACKAGES = ("torch", __name__.partition(".")[0])
_FACTORIES = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.arange, torch.linspace,
    torch.clone, Tensor.clone, torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full,
}  # fmt: skip


class UnitMode(MeasurementMode):
    """Within this context, the calls of a vmapped loss see n units.

    Args:
        n: How many units.
        own_at: Lines of code where ``torch.zeros`` and the like give each unit a tensor of its own, as the values of
            units are written into it. Elsewhere they do not: what is kept in a cache is an ordinary tensor.
        running_statistics: As in `MeasurementMode`.
        dropout: As in `MeasurementMode`.

    Attributes:
        reads: The values that Python has read, the same for all units.
        differ: The first value that Python read and that is not the same for all units; None if there was none.
        failed: What the first call that failed was to act on; None if there was none.
        nodes: Nodes of the graph that are known to have a batched result (True) or one without units (False).
        made: The lines where tensors that units share were made so, and where these lie in memory.
    """

    def __init__(self, n: int, *, own_at: Collection[Line], running_statistics: bool, dropout: bool) -> None:
        super().__init__(running_statistics=running_statistics, dropout=dropout)
        self.n = n
        self.reads: list[Hashable] = []
        self.differ: UnitsDiffer | None = None
        self.failed: Tensor | None = None
        self.nodes: dict[Node, bool] = {}
        self.made: list[tuple[Line, int | None]] = []
        self._own_at = own_at
        self._results: list[weakref.ref[Tensor]] = []
        self._open: set[Callable[..., Any]] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` as its rule says, or as it is."""
        try:
            return self._called(func, args, kwargs or {})
        except RuntimeError:
            if self.failed is None and args and isinstance(args[0], Tensor):
                self.failed = args[0]
            raise

    def _called(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self.arguments(func, args, kwargs)
        if any(type(arg) is UnitNumber for arg in (*args, *kwargs.values())):
            beside = (*args, *kwargs.values())
            args = tuple(arg.beside(*beside) if type(arg) is UnitNumber else arg for arg in args)
            kwargs = {name: arg.beside(*beside) if type(arg) is UnitNumber else arg for name, arg in kwargs.items()}
        if (rule := _RULES.get(func)) is not None:
            if _any_batched(args) or _any_batched(kwargs.values()):
                result = rule(self, func, *args, **kwargs)
                if result is not NotImplemented:
                    return self._noted(result)
        elif (rule := autograd_calls.UNCONDITIONAL_RULES.get(func)) is not None:
            return rule(self, func, *args, **kwargs)
        elif func not in self._open and (body := _body_of(func)) is not None:
            self._open.add(func)  # a method may call its twin in C++, which comes by here under the same name
            try:
                with self:  # so that the calls inside it are seen too
                    return body(*args, **kwargs)
            finally:
                self._open.discard(func)
        result = func(*args, **kwargs)
        if func in _FACTORIES and not is_batched(result):
            if (line := _line_of_user()) in self._own_at:
                return batched(result.expand(self.n, *result.shape).clone())
            self.made.append((line, memory_of(result)))
        return self._noted(result)

    def _noted(self, result: Any) -> Any:
        """Note which nodes the results of a call belong to, and whether they have units."""
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                with torch._C.DisableTorchFunction():
                    has_units = is_batched(tensor)
                    node = (behind(tensor) if has_units else tensor).grad_fn
                if has_units:
                    self._results.append(weakref.ref(tensor))
                if node is not None:
                    self.nodes[node] = has_units
        return result

    def release(self) -> None:
        """Give tensors that outlive the pass the first unit's values: batched ones are of no use outside of vmap.

        User code may keep them where no measurement cleans up, as in a list of its class.
        """
        alive = [tensor for result in self._results if (tensor := result()) is not None]
        self._results.clear()  # what weak references point to cannot be exchanged
        for tensor in alive:
            if is_batched(tensor):
                with suppress(RuntimeError):  # PyTorch itself holds it too, and nobody else may
                    torch.utils.swap_tensors(tensor, in_front(tensor, self.n)[0].detach().clone())


_RULES = {**READS, **batching_rules.RULES, **autograd_calls.RULES}


def _any_batched(values: Any) -> bool:
    """Return whether an argument is or has a batched tensor: the states of an LSTM are a tuple."""
    return any(is_batched(value) or (type(value) is tuple and any(map(is_batched, value))) for value in values)


def memory_of(tensor: Tensor) -> int | None:
    """Return where the values of a tensor that units share begin in memory, None if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:  # it is batched, sparse, or within another transform of torch.func
        return None


def _line_of_user() -> Line:
    """Return the line that runs now of the innermost code that is neither PyTorch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


@lru_cache(maxsize=1024)
def _body_of(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a copy of a PyTorch function written in Python that skips its own check for modes; None for others."""
    if not isinstance(func, types.FunctionType) or "handle_torch_function" not in func.__code__.co_names:
        return None
    asks = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    names = {**func.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
