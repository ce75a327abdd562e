"""All that is read from autograd nodes beyond their public interface.

PyTorch documents ``_saved_*`` in its notes on autograd, but promises none of these names. Where one is missing, a
``LookupError`` says so, and whoever asked does without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def saved(node: Node, name: str) -> Any:
    """Return what a node saved in the forward pass under ``name``.

    Raises:
        LookupError: It saved nothing of this name.
    """
    return _attribute(node, f"_saved_{name}")


def shapes(node: Node) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs of the operation that a node belongs to."""
    return [tuple(entry.shape) for entry in _attribute(node, "_input_metadata")]


def dtypes(node: Node) -> list[torch.dtype]:
    """Return the types of the outputs of the operation that a node belongs to."""
    return [entry.dtype for entry in _attribute(node, "_input_metadata")]


def variable(node: Node) -> Tensor | None:
    """Return the leaf that a node accumulates gradients for, or None for a node of an operation."""
    if node.name() != "torch::autograd::AccumulateGrad":
        return None
    leaf: Tensor = _attribute(node, "variable")
    return leaf


def _attribute(node: Node, name: str) -> Any:
    try:
        return getattr(node, name)
    except AttributeError:
        raise LookupError(f"{node.name()} has no attribute {name} in torch {torch.__version__}") from None
