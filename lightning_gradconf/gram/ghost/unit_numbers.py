"""A number of Python for each unit, which stays with the units while it is stored, printed or computed with."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_gradconf.gram.ghost.agreement import agreed
from lightning_gradconf.gram.ghost.functorch import batched

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode

_THREAD = threading.local()


@contextmanager
def in_a_pass() -> Iterator[None]:
    """Let the numbers that are made within this context be ordinary ones after it.

    User code may have kept them where no measurement cleans up, as in a global meter.
    """
    before = getattr(_THREAD, "ended", None)
    ended = _THREAD.ended = threading.Event()
    try:
        yield
    finally:
        ended.set()
        _THREAD.ended = before


class UnitNumber:
    """What ``item()`` returns.

    Arithmetic is Python's, with the number of each unit. Only where Python needs one number (``float()``, ``if``,
    ``range``, a key of a dictionary) are the units compared. Text shows the first unit's number, as logs are full of
    losses. Text of whole numbers may be a key (``f"task{index}"``), so they are compared.

    After the pass that made it, it stands for the first unit's number.

    Args:
        values: Of the units; int, float, complex or bool.
        mode: The mode that remembers what was read.
        ended: Set when the pass ends; that of this thread's pass by default.
    """

    __slots__ = ("_ended", "_mode", "_values")

    def __init__(self, values: Sequence[Any], mode: UnitMode, ended: threading.Event | None = None) -> None:
        self._values, self._mode = values, mode
        self._ended: threading.Event = _THREAD.ended if ended is None else ended

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks for
        return type(self._values[0])

    @property
    def __torch_function__(self) -> Any:
        """Let PyTorch's functions accept the number in place of a tensor, so that `UnitMode` sees the call.

        Without this attribute PyTorch rejects the number before the mode is asked. Whole numbers lack it on purpose:
        they may be sizes, which PyTorch has to read as integers.
        """
        if isinstance(self._values[0], int):
            raise AttributeError("__torch_function__")
        return type(self)._called

    @classmethod
    def _called(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch where no mode has seen the numbers: within lists, or after the pass."""
        given = (args, kwargs or {})
        others = tree_leaves(given)
        args, kwargs = tree_map(lambda leaf: leaf._in_a_call(*others) if type(leaf) is cls else leaf, given)
        return func(*args, **kwargs)

    def beside(self, *others: Any) -> Tensor:
        """Return the numbers as a batched tensor, of the type that a number of Python takes beside tensors."""
        tensors = [other for other in others if isinstance(other, Tensor)]
        # Masks and indices say nothing of the type of a result.
        counting = max(map(_category, tensors), default=0)
        kinds = [other for other in others if isinstance(other, torch.dtype)] or [
            torch.result_type(tensor, self._values[0]) for tensor in tensors if _category(tensor) == counting
        ]
        kind = reduce(torch.promote_types, kinds) if kinds else None
        return batched(torch.tensor(self._values, dtype=kind, device=tensors[0].device if tensors else None))

    def of_each(self, n: int) -> Sequence[Any]:
        """Return the numbers of n units."""
        return [self._values[0]] * n if self._ended.is_set() else self._values

    def _in_a_call(self, *others: Any) -> Any:
        return self._values[0] if self._ended.is_set() else self.beside(*others)

    def one(self) -> Any:
        """Return the number that all units have, or the first unit's if the pass has ended.

        Raises:
            UnitsDiffer: They have different ones.
        """
        return self._agreed(lambda value: value)

    def _agreed(self, function: Callable[[Any], Any]) -> Any:
        if self._ended.is_set():
            return function(self._values[0])
        return agreed(self._mode, [function(value) for value in self._values], "a number from item()")

    def __bool__(self) -> bool:
        return bool(self._agreed(bool))

    def __int__(self) -> int:
        return int(self._agreed(int))

    def __float__(self) -> float:
        return float(self.one())

    def __complex__(self) -> complex:
        return complex(self.one())

    def __index__(self) -> int:
        return operator.index(self.one())

    def __hash__(self) -> int:
        return hash(self.one())

    def __repr__(self) -> str:
        return repr(self._shown())

    def __format__(self, spec: str) -> str:
        return format(self._shown(), spec)

    def __getattr__(self, name: str) -> Any:
        """Return what numbers of Python have besides, as ``is_integer``."""
        if name == "__torch_function__" or not hasattr(type(self._values[0]), name):
            raise AttributeError(f"{type(self._values[0]).__name__!r} object has no attribute {name!r}")
        return getattr(self.one(), name)

    def __copy__(self) -> Any:
        return self._values[0] if self._ended.is_set() else self

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__()

    def __reduce__(self) -> Any:
        """Pickle the one number, as what remembers reads cannot be."""
        number = self.one()
        return type(number), (number,)

    def __dlpack__(self, **options: Any) -> Any:
        """Let ``torch.tensor`` take the one number."""
        return torch.tensor(self.one()).__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return torch.zeros(()).__dlpack_device__()

    def _shown(self) -> Any:
        return self._values[0] if isinstance(self._values[0], float | complex) else self.one()

    def _computed(self, function: Callable[..., Any], *others: Any) -> Any:
        if self._ended.is_set():
            return function(self._values[0], *others)
        if any(isinstance(other, Tensor) for other in others):  # a tensor in, a tensor out
            with torch._C.DisableTorchFunction():
                return function(self.beside(*others), *others)
        n = len(self._values)
        columns = [other.of_each(n) if type(other) is UnitNumber else [other] * n for other in others]
        found = [function(*row) for row in zip(self._values, *columns, strict=True)]
        if isinstance(found[0], tuple):  # of divmod()
            return tuple(UnitNumber(column, self._mode, self._ended) for column in zip(*found, strict=True))
        return UnitNumber(found, self._mode, self._ended)


def _category(tensor: Tensor) -> int:
    """Return which of two types a result has: the one with the larger number."""
    if tensor.dtype == torch.bool:
        return 0
    return 2 if tensor.is_floating_point() or tensor.is_complex() else 1


def _with_torch(function: Callable[[Tensor], Tensor], number: float) -> float:
    """Return what a function of tensors makes of a number: infinity where that of Python would raise an error."""
    return float(function(torch.tensor(number, dtype=torch.float64)))


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: self._computed(function, *others)


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: self._computed(lambda mine, others: function(others, mine), other)


for _name, _function in {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    "divmod": divmod,
}.items():
    setattr(UnitNumber, f"__{_name}__", _operator(_function))
    setattr(UnitNumber, f"__r{_name}__", _reflected(_function))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs"):
    setattr(UnitNumber, f"__{_name}__", _operator(getattr(operator, _name)))
_ROUNDED: dict[str, Callable[..., Any]] = {"round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}
for _name, _function in _ROUNDED.items():
    setattr(UnitNumber, f"__{_name}__", _operator(_function))
# NumPy calls a method of the name of its function, as for `numpy.exp(loss.item())`.
for _name in ("exp", "expm1", "log", "log10", "log1p", "log2", "sqrt", "sin", "cos", "tanh"):
    setattr(UnitNumber, _name, _operator(partial(_with_torch, getattr(torch, _name))))
