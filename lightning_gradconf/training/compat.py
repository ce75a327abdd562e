"""What the two names of Lightning, ``lightning.pytorch`` and ``pytorch_lightning``, have in common here.

They are copies of each other whose classes do not know one another: a Trainer or a LightningCLI of one accepts only
callbacks that inherit from its own `Callback`.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

NAMESPACES = [
    import_module(name)
    for name in ("lightning.pytorch", "pytorch_lightning")
    if find_spec(name.partition(".")[0]) is not None
]
if not NAMESPACES:
    raise ImportError("GradientConfusionCallback needs Lightning: pip install pytorch-lightning")

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
    from pytorch_lightning import Trainer

    class MisconfigurationException(Exception):
        """Misuse of a Trainer."""
else:
    Callback = type("Callback", tuple(pl.Callback for pl in NAMESPACES), {})
    # A ValueError as well: some misuse is a wrong argument of ours.
    _EXCEPTIONS = [import_module(f"{pl.__name__}.utilities.exceptions") for pl in NAMESPACES]
    _BASES = (*(exceptions.MisconfigurationException for exceptions in _EXCEPTIONS), ValueError)
    MisconfigurationException = type("MisconfigurationException", _BASES, {})


def namespace(trainer: Trainer) -> ModuleType:
    """Return the Lightning that ``trainer`` belongs to."""
    return next(pl for pl in NAMESPACES if isinstance(trainer, pl.Trainer))


def lightning_modules(module: Any) -> list[Any]:
    """Return ``module`` and the LightningModules in it."""
    return [part for part in module.modules() if isinstance(part, tuple(pl.LightningModule for pl in NAMESPACES))]


def combined_mode(trainer: Trainer) -> str:
    """Return how the Trainer takes batches from several loaders: "sequential" is one after the other."""
    return str(getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle"))


def warn(message: str, all_ranks: bool = False) -> None:
    """Warn on the first process only, or on the one that it happened on."""
    message = f"GradientConfusionCallback: {message}"
    if all_ranks:
        warnings.warn(message, UserWarning, stacklevel=2)
    else:
        rank_zero_warn(message, category=UserWarning)
