"""The Gram of the units' gradients from one pass over all units, without forming the gradients.

One forward pass of all units as one batch gives a loss and its graph (`graph`). A backward pass computes the gradient
of the result of each node that uses a parameter, and no gradient of a parameter (`one_pass`). From both follow the
factors of the gradient that each unit contributes (`rules`), and from the factors the inner products (`contraction`),
as the gradients come in (`collector`).

That the contribution of a unit is its gradient, up to one factor, is not assumed but checked against the loop on a few
units, for each parameter, whenever the graph changes (`calibration`) or leaves room for the data to matter (`trust`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_gradconf.gram import loop, vmap
from lightning_gradconf.gram.blockwise import Rows
from lightning_gradconf.gram.ghost.accumulator import Grams, Pass, sum_of
from lightning_gradconf.gram.ghost.calibration import calibrate, only, proven, still_right
from lightning_gradconf.gram.ghost.contraction import Contribution, Dense, gram_of_sum, scaled
from lightning_gradconf.gram.ghost.memory import Known, Memory
from lightning_gradconf.gram.ghost.one_pass import Task, check_room, measure
from lightning_gradconf.gram.objective import Objective, contract

__all__ = ["Grams", "Memory", "unit_factors", "unit_grams"]


def unit_grams(
    objective: Objective,
    units: Sequence[Any],
    unit_size: int | None,
    memory: Memory | None = None,
    room: int | None = None,
) -> Grams:
    """Return the inner products of the units' gradients, ``{parameter name: (n, n)}``.

    Args:
        objective: What to differentiate.
        units: Batches of ``unit_size`` samples each.
        unit_size: Samples in a unit; None if they cannot be told.
        memory: What earlier calls have found out, and room for what this one does.
        room: Bytes that gradients may fill, of parameters whose gradients have to be formed.

    Raises:
        RuntimeError: One pass over all units cannot give their gradients; the message says why.
    """
    memory = Memory() if memory is None else memory
    task = _task(objective, units, unit_size, memory, room)
    known, grams = _checked(task, memory, measure(task, memory))
    found = {name: gram * known.routes[name].scale ** 2 for name, gram in grams.items()}
    if rest := [name for name in objective.parameters if name not in found]:
        check_room(task, memory, rest)
        found |= contract(_by_others(only(objective, rest), units))
    return {name: found[name] for name in objective.parameters}


def unit_factors(
    objective: Objective, units: Sequence[Any], unit_size: int | None, memory: Memory, room: int | None = None
) -> dict[str, list[Contribution]]:
    """Return what the units' gradients are made of, parameter by parameter, for units of other ranks to be added.

    The arguments and errors are those of `unit_grams`.
    """
    task = _task(objective, units, unit_size, memory, room)
    kept = measure(task, memory, keep=True)
    known = memory.known.get(kept.facts.signature)
    if known is None or known.untold or kept.missing or not proven(known, kept.facts):
        # Their Grams are for the checks alone.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            kept.grams = {name: gram_of_sum(parts, memory.work) for name, parts in kept.factors.items()}
        known, grams = _checked(task, memory, kept)
        if grams is not kept.grams:  # calibrated anew, perhaps on other routes
            kept = measure(task, memory, keep=True)
    with torch._C.DisableTorchFunction(), torch.no_grad():
        found = {
            name: [scaled(part, known.routes[name].scale) for part in kept.factors.pop(name)]
            for name in list(kept.factors)
        }
    if rest := [name for name in objective.parameters if name not in found]:
        check_room(task, memory, rest)
        found |= {name: [Dense(rows)] for name, rows in _by_others(only(objective, rest), units).items()}
    return {name: found[name] for name in objective.parameters}


def _task(objective: Objective, units: Sequence[Any], unit_size: int | None, memory: Memory, room: int | None) -> Task:
    if memory.refused is not None:
        raise RuntimeError(memory.refused)
    if len(units) == 1:
        raise RuntimeError("a single unit is measured as it is")
    if unit_size is None:
        raise RuntimeError("the samples of a unit cannot be told, so its place in a batch of all cannot either")
    return Task(objective, units, unit_size, room)


def _checked(task: Task, memory: Memory, found: Pass) -> tuple[Known, Grams]:
    """What is known about the graph of a pass, found out now if need be, and Grams that agree with it."""
    known, grams = memory.known.get(found.facts.signature), found.grams
    if known is None or not still_right(task, known, found):
        try:
            usual = found if known is None else measure(task, memory, {})
            known, grams = calibrate(task, memory, usual)
        except RuntimeError as error:
            if not grams or sum_of(grams).isfinite().all():  # otherwise it may do next time
                memory.refused = str(error)
            raise
        memory.known[found.facts.signature] = known
    known.kinds = found.facts.kinds if found.facts.proven and not known.mixes else None
    return known, grams


def _by_others(objective: Objective, units: Sequence[Any]) -> Rows:
    try:
        return vmap.unit_gradients(objective, units)
    except Exception:
        return loop.unit_gradients(objective, units)
