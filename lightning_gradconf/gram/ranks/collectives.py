"""Collectives in the user's own loss: every rank has to call them equally often, or all wait for ever.

The loop runs the loss once for each unit, so equally often on every rank. The other engines run it once for each group
of units in which Python reads the same values, and the number of such groups may differ between ranks.
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
