"""What a running Trainer trains on, as `batches` wants to know it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.training.isolation import no_trace

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def feed_of(trainer: Trainer, module: LightningModule) -> Feed:
    """Return what the Trainer trains on now: a hook may have put other loaders in the place of the first."""

    def prepare(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return Feed(
        loaders=trainer.train_dataloader,
        prepare=prepare,
        isolated=partial(no_trace, trainer, module),
        batches=trainer.num_training_batches,
        rank=trainer.global_rank,
        overfitted=int(trainer.num_training_batches) if trainer.overfit_batches else None,  # type: ignore[attr-defined]
    )
