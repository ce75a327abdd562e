"""Where the units lie in the tensors of a node: along which dimension, and what repeats outside and inside of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradconf.gram.ghost.factors import Dense
from lightning_gradconf.gram.objective import upcast


class Place(NamedTuple):
    """A dimension of size ``outer * n * inner`` with the units in the middle."""

    axis: int
    outer: int


@dataclass
class Placement:
    """The places of n units in the tensors of one node, for its rule.

    Attributes:
        n: The number of units.
        guess: Which of the possible places is taken: 0 is the outermost, 1 the innermost, then all others.
        guesses: The most places that any tensor had.
        told_apart: Whether every other guess would assign some non-zero entry to another unit. If not, a wrong guess
            may give the same gradients, so the choice is not proved.
        deltas: The gradients of all results of the node, for nodes with several.
        operands: The shapes of the operands that are used, by their slot.
        scratch: What the operands of the node have in common.
        compares: Find out ``told_apart``.
        budget: Bytes that gradients may fill, where they have to be formed; None is without bound.
    """

    n: int
    guess: int = 0
    guesses: int = 1
    told_apart: bool = True
    deltas: Sequence[Tensor | None] = ()
    operands: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
    compares: bool = False
    budget: int | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Return ``(rows, ...)`` as ``(n, rows / n, ...)``."""
        outer = self._choose(x, [0]).outer
        if outer == 1:
            return torch.unflatten(x, 0, (self.n, -1))
        return torch.unflatten(x, 0, (outer, self.n, -1)).transpose(0, 1).flatten(1, 2)

    def reduce(self, x: Tensor, shape: tuple[int, ...]) -> Dense:
        """Return what ``x`` contributes to an operand of ``shape`` that was broadcast to the shape of ``x``."""
        x = upcast(x)
        shape = (1,) * (x.dim() - len(shape)) + shape
        axis, outer = self._choose(x, [axis for axis, size in enumerate(shape) if size == 1])
        x = torch.unflatten(x, axis, (outer, self.n, -1))
        shape = (*shape[:axis], 1, self.n, 1, *shape[axis + 1 :])
        summed = [d for d, size in enumerate(shape) if size == 1]
        x = x.sum(summed) if any(x.shape[d] > 1 for d in summed) else x.squeeze(summed)
        return Dense(x.movedim(sum(d not in summed for d in range(axis + 1)), 0).reshape(self.n, -1))

    def parts(self, x: Tensor) -> Iterator[Tensor]:
        """Return for each unit ``x`` with zeros in the place of all others."""
        place = self._choose(x, range(x.dim()))
        unit = self._unit_of(torch.arange(x.shape[place.axis], device=x.device), x.shape[place.axis], place)
        unit = unit.view(-1, *[1] * (x.dim() - place.axis - 1))
        return (x.where(unit == i, 0) for i in range(self.n))

    def _outer(self, size: int) -> list[int]:
        """Return how often the units may be repeated along a dimension, the likely first."""
        if size == 0 or size % self.n:
            return []
        repeats = size // self.n
        return list(dict.fromkeys([1, repeats, *(d for d in range(2, repeats) if repeats % d == 0)]))

    def _choose(self, x: Tensor, axes: Sequence[int]) -> Place:
        """Return where in ``x`` the units are taken to lie, along one of these axes."""
        places = [Place(axis, outer) for axis in axes for outer in self._outer(x.shape[axis])]
        if not places:
            raise NotImplementedError(f"no dimension of {tuple(x.shape)} holds {self.n} units")
        places.sort(key=lambda place: place.outer > 1)
        self.guesses = max(self.guesses, len(places))
        place = places[min(self.guess, len(places) - 1)]
        if self.compares and len(places) > 1:
            self.told_apart &= self._tells_apart(x, place, places)
        return place

    def _tells_apart(self, x: Tensor, chosen: Place, places: Sequence[Place]) -> bool:
        """Return whether, for any other place, some entry that is not zero would belong to another unit."""
        axes = {place.axis for place in places}
        others = [axis for axis in range(x.dim()) if axis not in axes]
        thin = x[tuple(slice(None) if axis in axes else slice(1) for axis in range(x.dim()))]

        def apart(x: Tensor) -> bool:
            filled = (x != 0).any(others, keepdim=True) if others else x != 0
            coordinates = filled.nonzero().T

            def units(place: Place) -> Tensor:
                return self._unit_of(coordinates[place.axis], x.shape[place.axis], place)

            mine = units(chosen)
            return all(bool((units(other) != mine).any()) for other in places if other != chosen)

        return apart(thin) or apart(x)  # few entries mostly are enough

    def _unit_of(self, coordinate: Tensor, size: int, place: Place) -> Tensor:
        return coordinate // (size // (place.outer * self.n)) % self.n
