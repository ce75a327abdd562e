"""The loss of each unit alone, all in one forward pass: ``vmap`` of the user's loss over stacked units.

Whatever the loss does with a unit, vmap computes each as if it were alone, so means, masks, class weights and the
statistics of BatchNorm need no thought. Below vmap, PyTorch records an ordinary graph of ordinary batched operations.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.func import vmap

from lightning_gradconf.batches.units import stack
from lightning_gradconf.gram.ghost.batch_reads import part_of_units
from lightning_gradconf.gram.ghost.custom_functions import unit_by_unit
from lightning_gradconf.gram.ghost.functorch import batched, check_available
from lightning_gradconf.gram.ghost.unit_mode import Line, UnitMode, memory_of
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.objective import Objective
from lightning_gradconf.gram.process_state import have_drawn, torch_states, without_fast_path, without_warnings
from lightning_gradconf.gram.replayed_draws import Recorder

Tensors = Mapping[str, Tensor]
# What vmap says of a tensor that all units share, when one of them writes its own values into it.
_WRITES = ("more elements than `self`", "inplace", "in-place", "match the broadcast shape")


@dataclass
class Forward:
    """The forward pass of some units.

    Attributes:
        losses: Of each unit, ``(n,)``, with a graph.
        reads: What Python read on the way, the same for all these units.
        nodes: Whether the result of a node of the graph has units, where that is known.
        draws: Whether random numbers were drawn, as far as the states of the generators or what was recorded tell.
        numbers: The random numbers of the unit that was recorded; None if none was.
    """

    losses: Tensor
    reads: tuple[Hashable, ...]
    nodes: Mapping[Node, bool]
    draws: bool
    numbers: list[Tensor | None] | None


@dataclass
class SharedWrites:
    """Which tensors that units share the user's code writes to, so that each unit needs its own.

    Attributes:
        made_at: Lines of code that make such tensors, with ``torch.zeros`` and the like.
        constants: Names of buffers, and of parameters that are frozen.
    """

    made_at: set[Line] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)

    def widen(self, written: Tensor | None, made: Sequence[tuple[Line, int | None]], constants: Tensors) -> bool:
        """Mark more tensors as written to: the one just written or, if that is no help, all. False if none is left.

        Args:
            written: What a call has failed to write to, None if that is not known.
            made: Where the code has made tensors, and where these lie in memory.
            constants: All that there are, by name.
        """
        memory = None if written is None else memory_of(written)
        named = {name for name, tensor in constants.items() if memory is not None and memory_of(tensor) == memory}
        lines = {line for line, place in made if memory is not None and place == memory}
        wider: list[tuple[set[Any], set[Any]]] = [
            (self.constants, named),
            (self.made_at, lines),
            (self.made_at, {line for line, _ in made}),
            (self.constants, {*constants}),
        ]
        for known, more in wider:
            if more - known:
                known.update(more)
                return True
        return False


def forward(
    objective: Objective,
    leaves: Mapping[str, Tensor],
    units: Sequence[Any],
    mode: MeasurementMode,
    writes: SharedWrites,
    recorded: int | None,
) -> Forward:
    """Return the losses of ``units`` at ``leaves``.

    Args:
        objective: The module and its loss.
        leaves: The parameters to differentiate, by name.
        units: Batches of one shape and structure.
        mode: How BatchNorm and dropout behave.
        writes: What each unit needs for itself; more is found out and added.
        recorded: The unit whose random numbers are recorded, if one is.

    Raises:
        UnitsDiffer: Python reads different values of different units.
        Exception: Whatever vmap or the user's code raises.
    """
    check_available()
    found = None
    while found is None:
        found = _forward(objective, leaves, units, mode, writes, recorded)
    return found


def _forward(
    objective: Objective,
    leaves: Mapping[str, Tensor],
    units: Sequence[Any],
    mode: MeasurementMode,
    writes: SharedWrites,
    recorded: int | None,
) -> Forward | None:
    """Return the same; None if a unit needs more for itself, which is in ``writes`` now."""
    n = len(units)
    unit_mode = UnitMode(n, own_at=writes.made_at, running_statistics=mode.running_statistics, dropout=mode.dropout)
    with torch._C.DisableTorchFunction():
        tensors, rebuild = stack(units, lambda parts, path: part_of_units(parts, path, unit_mode))

    constants: dict[str, Tensor] = {}

    def loss(*rows: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # copies: user code may write to them
            for name, tensor in objective.constants.items():
                own = name in writes.constants
                constants[name] = (
                    batched(tensor.detach().expand(n, *tensor.shape).clone()) if own else tensor.detach().clone()
                )
            unit = rebuild([row.clone() for row in rows])
        return objective.at({**leaves, **constants}, unit, lambda loss: loss)

    quiet: AbstractContextManager[None] = without_warnings("There is a performance drop because")
    recorder, before = None if recorded is None else Recorder(recorded, n), torch_states()
    try:
        with unit_by_unit(n), quiet, without_fast_path(), recorder or nullcontext(), unit_mode:
            losses = vmap(loss, randomness="different")(*tensors)
    except RuntimeError as error:
        with torch._C.DisableTorchFunction():
            is_write = any(words in str(error) for words in _WRITES)
            if not is_write or not writes.widen(unit_mode.failed, unit_mode.made, constants):
                raise
        return None
    finally:
        with torch._C.DisableTorchFunction():
            unit_mode.release()
        if unit_mode.differ is not None:  # also where the user's code has caught it, or made another error of it
            raise unit_mode.differ
    numbers = None if recorder is None else recorder.checked()
    return Forward(losses, tuple(unit_mode.reads), unit_mode.nodes, bool(numbers) or have_drawn(before), numbers)
