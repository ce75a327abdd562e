"""What measurements of a module have found out, for the measurements to come."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.unit_losses import SharedWrites

_KEPT = 1 << 22  # elements of the copies that are kept between measurements


@dataclass
class Places:
    """What was verified about one graph.

    Attributes:
        guesses: Of uses whose units are not in the usual place, which one it is.
        free: Nodes whose results turned out to have no units, by their place in the graph's order.
        unproved: Uses that had no gradient, or too few to tell their places apart.
    """

    guesses: dict[int, int] = field(default_factory=dict)
    free: set[int] = field(default_factory=set)
    unproved: set[int] = field(default_factory=set)


@dataclass
class Findings:
    """What is known about one module and loss.

    Attributes:
        shapes: Of units whose loss was computed in the ordinary way.
        generators: Random generators of Python and NumPy that the module has.
        draws: Whether the loss drew random numbers of torch when it was computed last.
        graphs: What was verified about each graph met.
        writes: The tensors of which each unit needs its own.
        measurements: How many there were with the ghost engine.
        workspace: What contractions share.
        failures: For each engine that was tried, why it failed, each time since it last worked.
        refused: Why units are not to be computed together any more, if so.
    """

    shapes: set[Hashable] = field(default_factory=set)
    generators: list[Any] = field(default_factory=list)
    draws: bool = False
    graphs: dict[Hashable, Places] = field(default_factory=dict)
    writes: SharedWrites = field(default_factory=SharedWrites)
    measurements: int = 0
    workspace: Workspace = field(default_factory=Workspace)
    failures: dict[str, list[str]] = field(default_factory=dict)
    refused: str | None = None
    _copies: dict[str, Tensor] = field(default_factory=dict)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a parameter, a leaf of any graph to come; into old memory, which is faster."""
        old = self._copies.get(name)
        if old is None or _kind(old) != _kind(tensor):
            old = tensor.detach().clone()
            if old.numel() + sum(copy.numel() for copy in self._copies.values()) <= _KEPT:
                self._copies[name] = old
            return old.detach()
        return old.detach().copy_(tensor.detach())


_FINDINGS: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, Findings]] = WeakKeyDictionary()


def findings_of(module: nn.Module, loss_fn: Callable[..., Any]) -> Findings:
    """Return what is known about a module and its loss. Functions with the same code are the same loss."""
    losses = _FINDINGS.setdefault(module, WeakKeyDictionary())
    try:
        return losses.setdefault(getattr(loss_fn, "__code__", loss_fn), Findings())
    except TypeError:  # a callable that has no hash, or cannot be held weakly
        return Findings()


def _kind(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
