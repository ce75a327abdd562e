"""Loaders that are made anew in the run may have other batches than those before."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from runs import QUIET, Data, Module, loader
from torch.utils.data import IterableDataset

from lightning_gradconf import GradientConfusionCallback


class Either(Module):
    def loss(self, batch):
        x, y = batch.values() if isinstance(batch, dict) else batch
        return super().loss((x.T if len(x) != len(y) else x, y))


class Named(Data):
    def __getitem__(self, i):
        return dict(zip("xy", super().__getitem__(i), strict=True))


class Stream(IterableDataset):
    def __iter__(self):
        return map(Data().__getitem__, range(24))


def time_first(items):
    return torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items])


LATER = {
    "larger batches": lambda: loader(batch_size=8),
    "larger batches of a stream": lambda: loader(dataset=Stream(), shuffle=False, batch_size=8),
    "other entries": lambda: loader(dataset=Named()),
    "another dimension of samples": lambda: loader(collate_fn=time_first),
}


@pytest.mark.parametrize("later", LATER)
def test_units_are_cut_out_of_the_batches_of_new_loaders(later, recwarn):
    class Reloads(Either):
        def train_dataloader(self):
            first = loader(dataset=Stream(), shuffle=False) if "stream" in later else loader()
            return LATER[later]() if self.trainer.current_epoch > 0 else first

    confusion = GradientConfusionCallback(every_n_train_steps=1, top_pairs=1)
    options = {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=[confusion], **(QUIET | options))
    trainer.fit(Reloads())
    assert confusion.last_step == trainer.global_step - 1
    assert all(origin.batch is not None for pair in confusion.last_top_pairs for origin in pair.origins)
    assert not [w for w in recwarn if "GradientConfusion" in str(w.message)]
