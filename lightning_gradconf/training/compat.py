"""Everything of Lightning that is private or differs between its two names.

``lightning.pytorch`` and ``pytorch_lightning`` are copies of each other whose classes do not know one another. A
Trainer or a LightningCLI of one accepts only callbacks that inherit from its own `Callback`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
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
    from pytorch_lightning import LightningModule, Trainer

    class MisconfigurationException(Exception):
        """Misuse of a Trainer."""
else:
    Callback = type("Callback", tuple(pl.Callback for pl in NAMESPACES), {})
    # A ValueError as well: some misuse is a wrong argument of ours.
    _EXCEPTIONS = [import_module(f"{pl.__name__}.utilities.exceptions") for pl in NAMESPACES]
    _BASES = (*(exceptions.MisconfigurationException for exceptions in _EXCEPTIONS), ValueError)
    MisconfigurationException = type("MisconfigurationException", _BASES, {})


def lightning_modules(module: Any) -> list[Any]:
    """Return ``module`` and the LightningModules in it."""
    return [part for part in module.modules() if isinstance(part, tuple(pl.LightningModule for pl in NAMESPACES))]


def warn(message: str) -> None:
    """Warn on the first process, for what all processes know."""
    rank_zero_warn(f"GradientConfusionCallback: {message}", category=UserWarning)


def warn_here(message: str) -> None:
    """Warn on this process, for what it alone may know."""
    warnings.warn(f"GradientConfusionCallback: {message}", UserWarning, stacklevel=2)


def logging_step(trainer: Trainer) -> int:
    """Return the step that loggers write the batch in training at; ``global_step`` counts each optimizer by itself."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def completes_step(trainer: Trainer) -> bool:
    """Return whether an optimizer step follows the batch in training, which is so at every one without accumulation."""
    return not trainer.fit_loop._should_accumulate()


def only_refreshes_statistics(trainer: Trainer) -> bool:
    """Return whether this is the extra epoch of StochasticWeightAveraging, which does not train."""
    return bool(trainer.fit_loop._skip_backward)


def stops_early(trainer: Trainer) -> bool:
    """Return whether ``should_stop`` ends the epoch now; it waits for ``min_epochs`` and ``min_steps``."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def is_overridden(module: LightningModule, hook: str) -> bool:
    """Return whether a hook of a module is not Lightning's own.

    Lightning's function of this name needs the code of the hook, which an object with ``__call__`` does not have.
    """
    origin = getattr(getattr(module, hook), "__module__", "")
    return not origin.startswith(("lightning.", "pytorch_lightning."))


def has_argument(hook: Callable[..., Any], name: str, **options: Any) -> bool:
    """Return whether Lightning gives a hook this argument."""
    signatures = import_module(f"{NAMESPACES[0].__name__}.utilities.signature_utils")
    return bool(signatures.is_param_in_hook_signature(hook, name, **options))


def add_metrics(trainer: Trainer, values: Mapping[str, float], in_progress_bar: Iterable[str] = ()) -> None:
    """Give ``callback_metrics`` and ``logged_metrics`` these values, and the progress bar some of them.

    ``pl_module.log`` would repeat them at later steps or drop them between Lightning's own logging steps. The public
    properties would compute the metrics of this epoch.
    """
    device = trainer.strategy.root_device
    metrics = {key: torch.tensor(value, device=device) for key, value in values.items()}
    connector: Any = trainer._logger_connector
    connector._callback_metrics.update(metrics)
    connector._logged_metrics.update(metrics)
    connector._progress_bar_metrics.update({key: metrics[key] for key in in_progress_bar})


def inform(trainer: Trainer, message: str) -> None:
    """Say something where Lightning says such things, on the first process."""
    its_own = next(pl for pl in NAMESPACES if isinstance(trainer, pl.Trainer))
    rank_zero = import_module(f"{its_own.__name__}.utilities.rank_zero")
    rank_zero.rank_zero_info(f"GradientConfusionCallback: {message}")


def collective_timeout(trainer: Trainer) -> timedelta | None:
    """Return how long the strategy lets a process wait for the others; None is PyTorch's default."""
    return getattr(trainer.strategy, "_timeout", None)
