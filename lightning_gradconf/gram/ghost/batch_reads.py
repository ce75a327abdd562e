"""What Python reads of a batch beside its tensors: names, paths, lengths in a list.

Where units differ in a part that is no tensor, the vmapped loss gets a stand-in for it. Code that hands it on or stores
it costs nothing. Code that looks at it sends units with different parts different ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_gradconf.batches.structure import same
from lightning_gradconf.gram.ghost.agreement import agreed, differing

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode


class PartOfUnits:
    """A part of the batch that differs between units, which is noticed when Python looks at it.

    Args:
        parts: What each unit has; all of one type, which this seems to be of too.
        path: The expression that leads to it.
        mode: The mode that remembers what was read.
    """

    def __init__(self, parts: Sequence[Any], path: str, mode: UnitMode) -> None:
        self.__dict__["_of_units"] = parts, path, mode

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks for
        return type(self.__dict__["_of_units"][0][0])

    def __getattr__(self, name: str) -> Any:
        parts, path, mode = self.__dict__["_of_units"]
        if not any(hasattr(part, name) for part in parts):
            raise AttributeError(f"{path} has no attribute {name!r}")
        _differ(parts, path, mode)

    def __bool__(self) -> bool:
        return bool(self._asked(bool))

    def __len__(self) -> int:
        return int(self._asked(len))

    def __getitem__(self, key: Any) -> Any:
        parts, path, mode = self.__dict__["_of_units"]
        return part_of_units([part[key] for part in parts], f"{path}[{key!r}]", mode)

    def __iter__(self) -> Iterator[Any]:
        parts, path, mode = self.__dict__["_of_units"]
        length = len(self)
        columns = [*zip(*parts, strict=True)] if length else []
        return iter([part_of_units(column, f"an entry of {path}", mode) for column in columns])

    def _asked(self, question: Callable[[Any], Any]) -> Any:
        parts, path, mode = self.__dict__["_of_units"]
        return agreed(mode, [question(part) for part in parts], f"{question.__name__}({path})")


def part_of_units(parts: Sequence[Any], path: str, mode: UnitMode) -> Any:
    """Return the part of the batch that all units have, or a stand-in for what each of them has.

    Raises:
        UnitsDiffer: They are not of one type.
    """
    if all(same(part, parts[0]) for part in parts):
        return parts[0]
    if len({type(part) for part in parts}) > 1:
        _differ(parts, path, mode)
    return PartOfUnits(parts, path, mode)


def _differ(parts: Sequence[Any], path: str, mode: UnitMode) -> NoReturn:
    first_like_it = [next(i for i, other in enumerate(parts) if same(other, part)) for part in parts]
    raise differing(mode, first_like_it, path)


def _look(self: PartOfUnits, *args: Any, **kwargs: Any) -> NoReturn:
    _differ(*self.__dict__["_of_units"])


_OWN = frozenset(vars(PartOfUnits)) | {"__new__", "__getattribute__", "__init_subclass__", "__subclasshook__"}
for _kind in (object, str, bytes, complex, int, float, list, dict, set):
    for _name in dir(_kind):
        if callable(getattr(_kind, _name)) and _name not in _OWN:
            setattr(PartOfUnits, _name, _look)
