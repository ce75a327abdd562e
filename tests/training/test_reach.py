"""What a training step reaches beside its module is put back, and runs that begin in odd ways are measured."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from lightning_gradconf import GradientConfusionCallback

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Samples(Dataset):
    """Samples whose difficulty the training step raises."""

    def __init__(self) -> None:
        self.level, self.seen = 0, [0]
        self.x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], i % 3


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.samples, self.seen, self.batch_size = Samples(), [0], batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, self.batch_size)


class Other(pl.Callback):
    def __init__(self) -> None:
        self.count, self.seen = 0, [0]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reaches(Net):
    """Counts its steps wherever it can."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        data, (other, *_) = self.trainer.datamodule, self.trainer.callbacks
        data.samples.level += 1
        other.count += 1
        for holder in (data, data.samples, self.trainer, other):
            holder.seen = getattr(holder, "seen", [0])
            holder.seen.append(batch_idx)
        return super().training_step(batch, batch_idx) * data.samples.level


def fit(module: Any, batch_size: int = 8, **options: Any) -> tuple[GradientConfusionCallback, Any, Data]:
    torch.manual_seed(0)
    confusion = GradientConfusionCallback(every_n_train_steps=1, num_units=6, **options)
    trainer = pl.Trainer(max_epochs=2, callbacks=[Other(), confusion], **QUIET)
    data = Data(batch_size)
    trainer.fit(module, datamodule=data)
    return confusion, trainer, data


@pytest.mark.parametrize("source", ["current", "fresh"])
def test_datasets_data_modules_the_trainer_and_callbacks_are_put_back(source):
    confusion, trainer, data = fit(Reaches(), source=source)
    assert confusion.last_gram is not None and confusion.last_step == 5
    (other, *_) = trainer.callbacks
    assert data.samples.level == other.count == 6
    for holder in (data, data.samples, trainer, other):
        assert holder.seen == [0, 0, 1, 2, 0, 1, 2]


class Weighs(Net):
    """Keeps weights of samples and statistics in tensors, arrays and dictionaries that are not the module's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        trainer = self.trainer
        sampler, (other, *_) = trainer.train_dataloader.sampler, trainer.callbacks
        statistics = vars(other).setdefault("statistics", {"mean": torch.zeros(2), "steps": 0})
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            sampler.weights[batch_idx] += 1
            statistics["mean"] += 1
        statistics["steps"] += 1
        trainer.datamodule.errors[batch_idx] += 1
        trainer.datamodule.recent.append(batch_idx)
        return loss * sampler.weights[batch_idx]


class WeighedData(Data):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.errors, self.recent = np.zeros(3), deque([9], 2)

    def train_dataloader(self) -> Any:
        sampler = WeightedRandomSampler(torch.ones(len(self.samples)), len(self.samples))
        return DataLoader(self.samples, self.batch_size, sampler=sampler)


@pytest.mark.parametrize("source", ["current", "fresh"])
def test_tensors_arrays_and_dictionaries_beside_the_module_are_put_back(source: str) -> None:
    torch.manual_seed(0)
    confusion = GradientConfusionCallback(every_n_train_steps=1, num_units=6, source=source)
    trainer, data = pl.Trainer(max_epochs=1, callbacks=[Other(), confusion], **QUIET), WeighedData(8)
    trainer.fit(Weighs(), datamodule=data)
    assert confusion.last_step == 2
    statistics = trainer.callbacks[0].statistics
    assert trainer.train_dataloader.sampler.weights[:4].tolist() == [2, 2, 2, 1]
    assert statistics["mean"].tolist() == [3, 3] and statistics["steps"] == 3
    assert data.errors.tolist() == [1, 1, 1] and list(data.recent) == [1, 2]


class FrozenAtFirst(Net):
    """Trains nothing in its first epoch."""

    def on_train_epoch_start(self) -> None:
        self.requires_grad_(self.current_epoch > 0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.current_epoch else None


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_module_that_is_frozen_at_first_is_measured_when_it_is_not():
    confusion, _, _ = fit(FrozenAtFirst())
    assert confusion.last_step is not None and confusion.last_gram is not None


def test_batches_of_one_sample_are_measured_on_fresh_ones(recwarn):
    confusion, _, _ = fit(Net(), batch_size=1)
    assert confusion.last_gram is not None and confusion.last_gram.shape == (6, 6)
    said = [str(warning.message) for warning in recwarn if "drawn as with source='fresh'" in str(warning.message)]
    assert len(said) == 1 and "the first batch has one sample" in said[0]


class Scaled(Net):
    """A module that fits a scaler of scikit-learn as it trains, whose state the callback does not put back."""

    def __init__(self, fits: bool) -> None:
        super().__init__()
        self.scaler, self.fits = StandardScaler(), fits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fits:
            self.scaler.partial_fit(batch[0].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("fits", [False, True])
def test_objects_of_libraries_that_a_measurement_changes_are_named(fits: bool) -> None:
    module, callback = Scaled(fits), GradientConfusionCallback(every_n_train_steps=2, num_units=4)
    trainer = pl.Trainer(callbacks=[callback], max_steps=6, **QUIET)
    warns = pytest.warns(UserWarning, match=r"measuring changed Scaled\.scaler \(StandardScaler\)")
    with warns if fits else nullcontext() as caught:
        trainer.fit(module, DataLoader(Samples(), 8))
    assert not fits or sum("measuring changed" in str(warning.message) for warning in caught) == 1
    assert callback.last_step == 5
