"""A number of Python for each unit, which stays with the units while it is stored, printed or computed with."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradconf.gram.ghost.agreement import agreed
from lightning_gradconf.gram.ghost.functorch import batched

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode


class UnitNumber:
    """What ``item()`` returns.

    Arithmetic is Python's, with the number of each unit. Only where Python needs one number (``float()``, ``if``,
    ``range``, a key of a dictionary) are the units compared. Text shows the first unit's number, as logs are full of
    losses. Text of whole numbers may be a key (``f"task{index}"``), so they are compared.

    Args:
        values: Of the units; int, float, complex or bool.
        mode: The mode that remembers what was read.
    """

    __slots__ = ("_mode", "_values")

    def __init__(self, values: Sequence[Any], mode: UnitMode) -> None:
        self._values, self._mode = values, mode

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks for
        return type(self._values[0])

    def beside(self, *others: Any) -> Tensor:
        """Return the numbers as a batched tensor, of the type that a number of Python takes beside tensors."""
        tensors = [other for other in others if isinstance(other, Tensor)]
        kind = torch.result_type(tensors[0], self._values[0]) if tensors else None
        return batched(torch.tensor(self._values, dtype=kind, device=tensors[0].device if tensors else None))

    def one(self) -> Any:
        """Return the number that all units have.

        Raises:
            UnitsDiffer: They have different ones.
        """
        return agreed(self._mode, self._values, "a number from item()")

    def __bool__(self) -> bool:
        return bool(agreed(self._mode, [*map(bool, self._values)], "a number from item()"))

    def __int__(self) -> int:
        return int(agreed(self._mode, [*map(int, self._values)], "a number from item()"))

    def __float__(self) -> float:
        return float(self.one())

    def __index__(self) -> int:
        return operator.index(self.one())

    def __hash__(self) -> int:
        return hash(self.one())

    def __repr__(self) -> str:
        return repr(self._shown())

    def __format__(self, spec: str) -> str:
        return format(self._shown(), spec)

    def _shown(self) -> Any:
        return self._values[0] if isinstance(self._values[0], float | complex) else self.one()

    def _computed(self, function: Callable[..., Any], *others: Any) -> Any:
        if any(isinstance(other, Tensor) for other in others):  # a tensor in, a tensor out
            with self._mode.without_reads():
                return function(self.beside(*others), *others)
        columns = [other._values if type(other) is UnitNumber else [other] * len(self._values) for other in others]
        return UnitNumber([function(*row) for row in zip(self._values, *columns, strict=True)], self._mode)


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: self._computed(function, *others)


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: self._computed(lambda mine, others: function(others, mine), other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(UnitNumber, f"__{_name}__", _operator(getattr(operator, _name)))
    setattr(UnitNumber, f"__r{_name}__", _reflected(getattr(operator, _name)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs"):
    setattr(UnitNumber, f"__{_name}__", _operator(getattr(operator, _name)))
_ROUNDED: dict[str, Callable[..., Any]] = {"round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}
for _name, _function in _ROUNDED.items():
    setattr(UnitNumber, f"__{_name}__", _operator(_function))
