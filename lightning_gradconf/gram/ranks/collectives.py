"""Collectives in the user's own loss: every rank has to call them equally often, or all wait for ever.

The loop runs a loss once for each unit, on every rank. The other engines run it as often as the values need that Python
reads, which differs between ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradconf.gram.objective import Objective

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")


def without_collectives(objective: Objective) -> Objective:
    """Return the objective with a loss that raises NotImplementedError where it would talk to other ranks."""

    def loss_fn(module: Any, batch: Any) -> Tensor:
        with _Refusing():  # type: ignore[no-untyped-call]
            return objective.loss_fn(module, batch)

    return replace(objective, loss_fn=loss_fn)


class _Refusing(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise it would be imported, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``func``, unless it is a collective."""
        if func.namespace in _NAMESPACES:
            raise NotImplementedError(f"the loss talks to other ranks ({func.__name__}), which units together cannot")
        return func(*args, **(kwargs or {}))
