"""A comparison of one unit's gradient with plain autograd, which shares nothing with the engines that batch units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf.gram import loop
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.objective import Objective
from lightning_gradconf.gram.replayed_draws import Replayer

# A unit alone takes other kernels than a unit among others: error of a parameter's gradient, and of the largest one.
_TOLERANCES = {torch.float64: (1e-7, 1e-9), torch.float32: (1e-3, 1e-4)}
_HALF_PRECISION = (0.3, 0.05)
_CONDITION = 8  # times what rounding the parameters changes, as in a layer before a BatchNorm over two samples


def disagreement(
    objective: Objective,
    unit: Any,
    gradients: Mapping[str, Tensor],
    precision: torch.dtype,
    numbers: Sequence[Tensor | None],
) -> dict[str, float] | None:
    """Return the parameters of which plain autograd finds another gradient, with the error relative to its norm.

    Args:
        objective: What was differentiated.
        unit: The unit.
        gradients: What an engine found for it, ``(numel,)`` by parameter.
        precision: The least precise type that the engine computed in. Plain autograd may go through another one:
            autocast casts for fewer operations under vmap.
        numbers: What the unit drew among the others.

    Returns:
        The errors; None if the unit alone draws others, so that nothing can be compared.
    """
    kinds = {precision}

    def loss_fn(module: Any, batch: Any) -> Tensor:
        loss = objective.loss_fn(module, batch)
        kinds.update(graphs.precisions(graphs.nodes(loss.grad_fn)))
        return loss

    with Replayer(numbers) as replayer:
        rows = loop.unit_gradients(replace(objective, loss_fn=loss_fn), [unit])
    if not replayer.has_fitted:
        return None
    precision = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    own, of_largest = _TOLERANCES.get(precision, _HALF_PRECISION)
    norms = {name: float(row.norm()) for name, row in rows.items()}
    errors = {name: float((row[0] - gradients[name]).norm()) for name, row in rows.items()}
    allowed = {name: own * norm + of_largest * max(norms.values()) for name, norm in norms.items()}
    if any(errors[name] > allowed[name] for name in errors):
        with Replayer(numbers):
            moved = loop.unit_gradients(_rounded(objective, precision), [unit])
        allowed = {name: allowed[name] + _CONDITION * float((moved[name] - row).norm()) for name, row in rows.items()}
    return {name: error / max(norms[name], 1e-300) for name, error in errors.items() if error > allowed[name]}


def _rounded(objective: Objective, precision: torch.dtype) -> Objective:
    """Return the objective at parameters perturbed by rounding, to see how much rounding alone moves a gradient."""
    generator = torch.Generator().manual_seed(0)
    epsilon = torch.finfo(precision).eps
    parameters: dict[str, Any] = {
        name: p.detach() * (1 + epsilon * torch.randn(p.shape, generator=generator).to(p))
        if p.is_floating_point()
        else p
        for name, p in objective.parameters.items()
    }
    return replace(objective, parameters=parameters)


def in_words(errors: Mapping[str, float]) -> str:
    """Return what errors there are, by the largest."""
    name = max(errors, key=lambda name: errors[name])
    return f"of {name!r} by {errors[name]:.1e} of its norm"
