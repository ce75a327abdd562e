"""All that is read from autograd nodes beyond their public interface.

PyTorch documents ``_saved_*`` in its notes on autograd, but promises none of these names. Where one is missing, a
``NotImplementedError`` says so, and whoever asked does without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from threading import Thread
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor
from torch.autograd.graph import Node


def saved(node: Node, name: str) -> Any:
    """Return what a node saved in the forward pass under ``name``.

    Raises:
        NotImplementedError: It saved nothing of this name.
    """
    return _attribute(node, f"_saved_{name}")


def shapes(node: Node) -> list[tuple[int, ...]]:
    """Return the shapes of the outputs of the operation that a node belongs to."""
    return [tuple(entry.shape) for entry in _attribute(node, "_input_metadata")]


def dtypes(node: Node) -> list[torch.dtype]:
    """Return the types of the outputs of the operation that a node belongs to."""
    return [entry.dtype for entry in _attribute(node, "_input_metadata")]


def unpacks(node: Node) -> bool:
    """Return whether unpacking the tensors that a node saved may run hooks of the user, as activation checkpoints have.

    Older releases of torch do not tell; then it may.
    """
    return any(hook is not None for hook in _unpack_hooks(node))


def is_checkpointed(node: Node) -> bool:
    """Return whether unpacking the tensors that a node saved runs an activation checkpoint again."""
    return any(getattr(hook, "__module__", "") == checkpoints.__name__ for hook in _unpack_hooks(node))


def _unpack_hooks(node: Node) -> Iterator[Any]:
    for name in _raw(type(node)):
        tensors = getattr(node, name)
        for tensor in tensors if isinstance(tensors, tuple | list) else (tensors,):
            if tensor is not None:
                yield getattr(tensor, "unpack_hook", _raw)


@lru_cache(maxsize=1024)
def _raw(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def variable(node: Node) -> Tensor | None:
    """Return the leaf that a node accumulates gradients for, or None for a node of an operation."""
    if node.name() != "torch::autograd::AccumulateGrad":
        return None
    leaf: Tensor = _attribute(node, "variable")
    return leaf


def called_alone(
    node: Node, calls: Iterable[Sequence[Tensor | None]], slots: Iterable[int], device: torch.device
) -> dict[int, list[Tensor | None]]:
    """Return what a node makes of gradients of its results, for some of its operands and each of several calls.

    To ask autograd for the gradient of an operand would add what reaches it through the node's other operands, as in
    gradients of gradients. Within a backward pass, a node that is called computes only what this pass needs. So it is
    called in a thread, which is in no pass.
    """
    found: dict[int, list[Tensor | None]] = {slot: [] for slot in slots}
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    errors: list[Exception] = []

    def call() -> None:
        try:
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                for deltas in calls:
                    results = node(*deltas)  # type: ignore[operator]
                    for slot, of_calls in found.items():
                        of_calls.append(results[slot] if isinstance(results, tuple) else results)
        except Exception as error:
            errors.append(error)

    thread = Thread(target=call)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found


def _attribute(node: Node, name: str) -> Any:
    try:
        return getattr(node, name)
    except AttributeError:
        raise NotImplementedError(f"{node.name()} has no attribute {name} in torch {torch.__version__}") from None
