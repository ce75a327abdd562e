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

from lightning_gradconf.engines import loop, vmap
from lightning_gradconf.engines.calibration import calibrate, only, still_right
from lightning_gradconf.engines.collector import Grams, sum_of
from lightning_gradconf.engines.memory import Memory
from lightning_gradconf.engines.objective import Objective, contract
from lightning_gradconf.engines.one_pass import Task, measure

__all__ = ["Grams", "Memory", "unit_grams"]


def unit_grams(
    objective: Objective, units: Sequence[Any], unit_size: int | None, memory: Memory | None = None
) -> Grams:
    """Return the inner products of the units' gradients, ``{parameter name: (n, n)}``.

    Args:
        objective: What to differentiate.
        units: Batches of ``unit_size`` samples each.
        unit_size: Samples in a unit; None if they cannot be told.
        memory: What earlier calls have found out, and room for what this one does.

    Raises:
        RuntimeError: One pass over all units cannot give their gradients; the message says why.
    """
    memory = Memory() if memory is None else memory
    if memory.refused is not None:
        raise RuntimeError(memory.refused)
    if len(units) == 1:
        raise RuntimeError("a single unit is measured as it is")
    if unit_size is None:
        raise RuntimeError("the samples of a unit cannot be told, so its place in a batch of all cannot either")
    task = Task(objective, units, unit_size)
    found = measure(task, memory)
    known, grams = memory.known.get(found.facts.signature), found.grams
    if known is None or not still_right(task, known, found):
        try:
            known, grams = calibrate(task, memory, found)
        except RuntimeError as error:
            if not grams or sum_of(grams).isfinite().all():  # otherwise it may do next time
                memory.refused = str(error)
            raise
        memory.known[found.facts.signature] = known
    known.kinds = found.facts.kinds if found.facts.proven else None
    scaled = {name: gram * known.routes[name].scale ** 2 for name, gram in grams.items()}
    if rest := [name for name in objective.parameters if name not in scaled]:
        scaled |= _by_others(only(objective, rest), units)
    return {name: scaled[name] for name in objective.parameters}


def _by_others(objective: Objective, units: Sequence[Any]) -> Grams:
    try:
        rows = vmap.unit_gradients(objective, units)
    except Exception:
        rows = loop.unit_gradients(objective, units)
    return contract(rows)
