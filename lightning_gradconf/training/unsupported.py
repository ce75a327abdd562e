"""Why a run cannot be measured, or was not, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradconf.batches.loaders import loaders_in
from lightning_gradconf.gram.objective import matching
from lightning_gradconf.gram.ranks import sharded
from lightning_gradconf.training.arguments import LOSS_FN
from lightning_gradconf.training.compat import has_argument

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_gradconf.callback import GradientConfusionCallback
    from lightning_gradconf.training.session import Session

NO_LOSS = (
    "no measurement took place: training_step called neither manual_backward nor backward(), so that there is no loss "
    f"to measure. Pass the loss, such as {LOSS_FN}."
)


def reason_not_to_start(callback: GradientConfusionCallback, trainer: Trainer, module: LightningModule) -> str | None:
    """Return why a run cannot be measured and what to do about it, None if it can."""
    if trainer.barebones:
        return "Trainer(barebones=True) switches logging off; measure in a run without it"
    strategies = {base.__name__ for base in type(trainer.strategy).__mro__}
    if "ModelParallelStrategy" in strategies:
        if (reason := sharded.reason_not_to_measure(module)) is not None:
            return f"{reason}; measure in a run with strategy='ddp', or shard all of the module with fully_shard"
    elif not strategies & {"SingleDeviceStrategy", "DDPStrategy"} or "SingleDeviceXLAStrategy" in strategies:
        return (
            f"{type(trainer.strategy).__name__} is not supported yet; measure in a run with strategy='ddp' or on one "
            "device (devices=1)"
        )
    if callback.loss_fn is None and has_argument(module.training_step, "dataloader_iter", explicit=True):
        return "training_step takes a dataloader_iter, which cannot be shared; let it take (batch, batch_idx)"
    if any(callback.source is loader for loader in loaders_in(trainer.train_dataloader).values()):
        return "source= is the training loader itself, whose order would change; use source='fresh'"
    for pattern in [callback.parameters] if isinstance(callback.parameters, str) else callback.parameters or []:
        if not matching(module, pattern):
            names = [name for name, _ in module.named_parameters()]
            like = ", ".join(map(repr, names[:5]))
            return f"parameters={pattern!r} matches none of the {len(names)} parameters; their names are like {like}"
    never = trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
    if never and callback.every_n_train_steps is None and callback.every_n_epochs is None:
        return "Trainer(log_every_n_steps=0) means never; pass every_n_train_steps= to measure"
    return None


def reason_for_nothing(session: Session) -> str | None:
    """Return why there was no measurement in a run that has ended, None if ``should_measure`` wanted none."""
    if session.loss.manual is not None and session.loss.manual.without_losses:
        return NO_LOSS
    if not session.source.ready(None):
        return (
            f"no measurement took place: {session.source.seen} units of unit_size={session.callback.unit_size!r} were "
            "seen, too few. Lower num_units or unit_size, or train longer."
        )
    if not session.attempted:
        return None
    return (
        "no measurement took place: at each step that was due, training_step returned None, on_train_batch_start "
        "returned -1, or no parameter required a gradient."
    )
