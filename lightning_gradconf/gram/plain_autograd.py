"""A comparison of one unit's gradient with plain autograd, which shares nothing with the engines that batch units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf.gram import loop
from lightning_gradconf.gram.objective import Objective

# A unit alone takes other kernels than a unit among others: error of a parameter's gradient, and of the largest one.
_TOLERANCES = {torch.float64: (1e-7, 1e-9), torch.float32: (2e-2, 1e-3)}
_HALF_PRECISION = (0.3, 0.05)


def disagreement(
    objective: Objective, unit: Any, gradients: Mapping[str, Tensor], precision: torch.dtype
) -> dict[str, float]:
    """Return the parameters of which plain autograd finds another gradient, with the error relative to its norm.

    Args:
        objective: What was differentiated.
        unit: The unit.
        gradients: What an engine found for it, ``(numel,)`` by parameter.
        precision: The least precise type of any tensor between parameters and loss.
    """
    before = torch.get_rng_state()
    rows = loop.unit_gradients(objective, [unit])
    if not torch.equal(before, torch.get_rng_state()):
        return {}  # the loss draws random numbers, and drew others
    own, of_largest = _TOLERANCES.get(precision, _HALF_PRECISION)
    norms = {name: float(row.norm()) for name, row in rows.items()}
    errors = {name: float((row[0] - gradients[name]).norm()) for name, row in rows.items()}
    allowed = of_largest * max(norms.values())
    wrong = [name for name, error in errors.items() if error > own * norms[name] + allowed]
    return {name: errors[name] / max(norms[name], 1e-300) for name in wrong}


def in_words(errors: Mapping[str, float]) -> str:
    """Return what errors there are, by the largest."""
    name = max(errors, key=lambda name: errors[name])
    return f"of {name!r} by {errors[name]:.1e} of its norm"
