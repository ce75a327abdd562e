"""The gradients of many units at once: ``vmap(grad(loss))`` of torch.func, in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.func import grad, vmap

from lightning_gradconf.engines.objective import Objective, as_rows, empty_rows
from lightning_gradconf.isolation import without_warnings
from lightning_gradconf.units import stack


def unit_gradients(objective: Objective, units: Sequence[Any], chunk_size: int | None = None) -> dict[str, Tensor]:
    """Return the gradient of each unit's loss as ``{parameter name: (n, numel)}``.

    Raises:
        ValueError: The units differ in shape.
        Exception: Whatever torch.func raises for a module that it cannot transform.
    """
    tensors, rebuild = stack(units)
    parameters = {name: p.detach().clone() for name, p in objective.parameters.items()}

    def loss(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
        # Made in here, the copies may be written to: torch.func forbids it for tensors from outside.
        constants = {name: t.detach().clone() for name, t in objective.constants.items()}
        return objective.at(parameters | constants, rebuild([row.clone() for row in rows]), _differentiable)

    per_unit = vmap(grad(loss), in_dims=(None, *[0] * len(tensors)), randomness="different")
    rows = {name: empty_rows(p, len(units)) for name, p in parameters.items()}
    step = chunk_size or len(units)
    # Attention on a CPU has no batching rule: torch says so each time, and is right and not much slower.
    with without_warnings("There is a performance drop because"):
        for start in range(0, len(units), step):
            chunk = slice(start, start + step)
            for name, gradients in per_unit(parameters, *(tensor[chunk] for tensor in tensors)).items():
                rows[name][chunk] = as_rows(gradients, len(gradients))
    return rows


def _differentiable(loss: Tensor) -> Tensor:
    return loss
