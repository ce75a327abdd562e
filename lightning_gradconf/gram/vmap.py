"""The gradients of many units at once: ``vmap(grad(loss))`` of torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_gradconf.batches.units import copy_of, stack
from lightning_gradconf.gram import python_draws
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.module_state import rewinder
from lightning_gradconf.gram.objective import Objective, as_rows, take_attributes
from lightning_gradconf.gram.plain_autograd import disagreement, in_words
from lightning_gradconf.gram.process_state import without_fast_path, without_warnings
from lightning_gradconf.gram.replayed_draws import Recorder


def differentiator(objective: Objective) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """Return a function from units to the gradients of their losses, ``{parameter name: (n, numel)}``.

    Raises:
        ValueError: (by what is returned) The units differ in shape.
        RuntimeError: Plain autograd finds another gradient of one of the units.
        Exception: Whatever torch.func raises for a module that it cannot transform.
    """
    parameters = {name: p.detach().clone() for name, p in objective.parameters.items()}
    own = {id(p): name for name, p in objective.parameters.items()}
    rewind, generators = rewinder(objective.module), python_draws.generators_of(objective.module)
    is_first = True

    def gradients(units: Sequence[Any]) -> dict[str, Tensor]:
        nonlocal is_first
        tensors, rebuild = stack(units)
        if is_first:
            objective.fill_caches(objective.copies(), copy_of(units[0]))
            rewind()

        def loss(parameters: dict[str, Tensor], *rows: Tensor) -> tuple[Tensor, Tensor]:
            # Made in here, the copies may be written to: torch.func forbids it for tensors from outside.
            constants = {name: t.detach().clone() for name, t in objective.constants.items()}
            for name, parameter in parameters.items():
                take_attributes(parameter, objective.parameters[name])
            unit = rebuild([row.clone() for row in rows])
            return objective.at(parameters | constants, unit, lambda loss: (loss, loss))

        per_unit = vmap(grad(loss, has_aux=True), in_dims=(None, *[0] * len(tensors)), randomness="different")
        # Attention on a CPU has no batching rule: torch says so each time, and is right and not much slower.
        recorder = Recorder(0, len(units)) if is_first else None
        quiet = without_warnings("There is a performance drop because")
        with python_draws.without_python_draws(generators), quiet, without_fast_path(), recorder or nullcontext():
            found, losses = per_unit(parameters, *tensors)
        rewind()
        if taken := [own[id(leaf)] for leaf in graphs.leaves(losses.grad_fn) if id(leaf) in own]:
            raise RuntimeError(f"the loss takes {taken[0]} from somewhere else than the module, such as a list")
        rows = {name: as_rows(found.pop(name), len(units)) for name in list(found)}
        if recorder is not None:
            numbers = recorder.checked()
            is_first = False
            is_double = all(p.dtype == torch.float64 for p in parameters.values())
            first = {name: row[0] for name, row in rows.items()}
            # Half the precision of float32, since the loss may be under autocast.
            precision = torch.float64 if is_double else torch.float16
            if errors := disagreement(objective, units[0], first, precision, numbers):
                raise RuntimeError(f"a unit by itself has another gradient, {in_words(errors)}")
        return rows

    return gradients
