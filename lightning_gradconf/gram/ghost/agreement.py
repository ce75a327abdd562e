"""What Python reads of units must be the same for all of them, or they go different ways."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode


class UnitsDiffer(Exception):
    """Python reads different values of different units.

    Attributes:
        values: What it reads of each.
    """

    def __init__(self, values: Sequence[Hashable], where: str) -> None:
        super().__init__(f"units have different values in {where}")
        self.values = values


def agreed(mode: UnitMode, values: Sequence[Any], where: str) -> Any:
    """Return the value that all units have, and remember that it was read.

    Raises:
        UnitsDiffer: They have different ones.
    """
    keys = [_key(value) for value in values]
    if any(key != keys[0] for key in keys):
        raise differing(mode, keys, where)
    mode.reads.append(keys[0])
    return values[0]


def differing(mode: UnitMode, values: Sequence[Hashable], where: str) -> UnitsDiffer:
    """Return the error to raise, and remember it: the user's code may catch what comes out of a call."""
    error = UnitsDiffer(values, where)
    mode.differ = mode.differ or error
    return error


def _key(value: Any) -> Hashable:
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # equal to itself here
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value  # type: ignore[no-any-return]
