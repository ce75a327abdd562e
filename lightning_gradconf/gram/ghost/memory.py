"""What the ghost engine remembers between the measurements of one module and loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.rules import Place
from lightning_gradconf.gram.ghost.trust import Signature

_KEPT = 1 << 22  # elements of the copies that are kept between measurements


@dataclass(frozen=True)
class Route:
    """How the Gram of a parameter is found.

    Attributes:
        guess: Where the units lie, as in `rules.Units`; None is the way of the other engines.
        free: Whether the first tensor that might be batched is not.
        scale: What turns a unit's contribution to the loss of all into its own loss: their number for a mean.
        places: Where the units lay when that was found out; None is anywhere.
    """

    guess: int | None = 0
    free: bool = False
    scale: float = 1.0
    places: frozenset[Place] | None = None

    def leads_to(self, places: Collection[Place]) -> bool:
        """Return whether units lie where they lay before, though tensors may have other sizes."""
        if self.places is None:
            return True
        axes = {axis for axis, _ in self.places}
        return all((axis, part) in self.places or (part == "all" and axis in axes) for axis, part in places)


@dataclass
class Known:
    """What calibration found out about a graph.

    Attributes:
        routes: Of each parameter.
        unseen: The parameters that had no gradient when they were to be checked.
        alike: The parameters for which all units had the same gradient, wherever they were taken to lie.
        constants: What the loss was multiplied or divided by.
        mixes: Whether the loss mixes units, though for now only the gradients of few parameters show it.
        kinds: How many nodes of each kind there are, if the graph leaves no room for the data to weigh units.
    """

    routes: dict[str, Route]
    unseen: set[str]
    alike: set[str]
    constants: tuple[float, ...]
    mixes: bool = False
    kinds: Counter[str] | None = None

    @property
    def untold(self) -> set[str]:
        """The parameters whose gradients could not be checked, as any way of finding them would have fitted."""
        return self.unseen | self.alike


@dataclass
class Memory:
    """What was found out in earlier measurements of the same module and loss.

    Attributes:
        known: About each graph met.
        work: What contractions share.
        copies: Of the module's tensors, if they are small: to write to old memory is faster.
        engine: Which engine measured last.
        refused: Why this module and loss cannot be measured in one pass, if so.
    """

    known: dict[Signature, Known] = field(default_factory=dict)
    work: Workspace = field(default_factory=Workspace)
    copies: dict[str, Tensor] = field(default_factory=dict)
    engine: str | None = None
    refused: str | None = None

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor of the module, a leaf of any graph to come."""
        old = self.copies.get(name)
        if old is None or _kind(old) != _kind(tensor):
            old = tensor.detach().clone()
            if old.numel() + sum(copy.numel() for copy in self.copies.values()) <= _KEPT:
                self.copies[name] = old
            return old.detach()
        return old.detach().copy_(tensor.detach())


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
