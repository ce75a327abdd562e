"""What a running Trainer trains on, as `batches` wants to know it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.loaders import changes, loaders_in
from lightning_gradconf.training.isolation import no_trace

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def feed_of(trainer: Trainer, module: LightningModule) -> Feed:
    """Return what the Trainer trains on now: a hook may have put other loaders in the place of the first."""

    def prepare(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def isolated(loaders: Any) -> AbstractContextManager[None]:
        containers, data = changes(loaders)
        # The training step can reach its datasets and samplers, whatever is read here.
        reached = [
            getattr(loader, name, None)
            for loader in loaders_in(trainer.train_dataloader).values()
            for name in ("dataset", "sampler", "batch_sampler")
        ]
        return no_trace(trainer, module, *containers, data=[*data, *reached])

    return Feed(
        loaders=trainer.train_dataloader,
        prepare=prepare,
        isolated=isolated,
        batches=trainer.num_training_batches,
        rank=trainer.global_rank,
        overfitted=int(trainer.num_training_batches) if trainer.overfit_batches else None,  # type: ignore[attr-defined]
    )
