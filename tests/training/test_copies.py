"""With unit_size="batch" only batches near a measurement are copied, and they are those that copying all would give."""

from __future__ import annotations

import random
from itertools import cycle

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import PREFIX, QUIET, Data, Module, Rows, loader
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.batches import layout
from lightning_gradconf.batches.recent_units import RecentUnits
from lightning_gradconf.batches.sources import Source
from lightning_gradconf.training import overhead
from lightning_gradconf.training.overhead import Overhead

pytestmark = pytest.mark.filterwarnings("ignore:.*(weights_only|smaller than|callbacks used to create|resuming from)")


class Keeps(GradientConfusionCallback):
    """Keeps each Gram, and measures where it is told to."""

    def __init__(self, refused=(), **options):
        super().__init__(**options)
        self.grams, self.refused = [], refused

    def should_measure(self, trainer):
        return trainer.global_step not in self.refused

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if self.last_gram is not None and (not self.grams or self.grams[-1][0] != self.last_step):
            self.grams.append((self.last_step, self.last_gram.clone()))


def fit(monkeypatch, data=None, copy_all=False, steps=100, callbacks=(), trainer=None, ckpt=None, **options):
    """Train; return the step and the Gram of each measurement, the numbers of the batches copied, and the callback."""
    pl.seed_everything(3, verbose=False)
    copied, count = [], []
    see, copy_of = Source.see, layout.copy_of

    def counted(self, *args):
        count.append(0)
        return see(self, *args)

    def noted(batch):
        copied.append(len(count) - 1)
        return copy_of(batch)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "see", counted)
        patch.setattr(layout, "copy_of", noted)
        if copy_all:
            patch.setattr(RecentUnits, "_is_near", lambda *_: True)
        confusion = Keeps(**({"unit_size": "batch", "num_units": 2, "every_n_train_steps": 20} | options))
        rows = Rows()
        given = {"max_steps": steps, "max_epochs": -1, "logger": rows, "callbacks": [confusion, *callbacks]}
        given |= {"enable_checkpointing": bool(callbacks)}
        pl.Trainer(**(QUIET | given | (trainer or {}))).fit(
            Module(), loader() if data is None else data, ckpt_path=ckpt
        )
    assert [step for step, row in rows.of(ours=True) if f"{PREFIX}/eta" in row] == [step for step, _ in confusion.grams]
    return confusion.grams, copied, confusion


def short():
    """Return a loader of five batches of 4 and one of 2."""
    return loader(dataset=Subset(Data(), range(22)))


def test_batches_that_no_measurement_can_use_are_not_copied(monkeypatch):
    grams, copied, _ = fit(monkeypatch, steps=40)
    assert [step for step, _ in grams] == [1, 19, 39]
    assert copied == [0, 1, *range(15, 20), *range(35, 40)]


def test_short_last_batches_are_made_up_for(monkeypatch):
    grams, copied, _ = fit(monkeypatch, short(), steps=40)
    assert [step for step, _ in grams] == [1, 19, 39]
    assert copied == [0, 1, 15, 16, 18, 19, 36, 37, 38, 39], "without 17 and 35, which are the last of their epochs"


def test_where_batches_are_short_at_any_time_all_of_full_size_are_copied(monkeypatch):
    sizes = [4, 4, 4, 3, 4, 4]
    order = [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(6)]
    _, copied, _ = fit(monkeypatch, DataLoader(Data(), batch_sampler=order), steps=40)
    assert copied == [0, 1, *(i for i in range(4, 40) if i % 6 != 3)], "2 came before any was short"


def test_at_ends_of_epochs_all_are_copied(monkeypatch):
    grams, copied, _ = fit(monkeypatch, steps=14, every_n_train_steps=None, every_n_epochs=1)
    assert [step for step, _ in grams] == [1, 5, 11, 13] and copied == list(range(14))


class Stream(IterableDataset):
    """Batches of its own, the last one short."""

    def __iter__(self):
        return (Data()[slice(i, i + 5)] for i in range(0, 24, 5))


def uneven():
    """Return a loader whose batches have from 2 to 4 samples, most of them 4."""
    draw, sizes = random.Random(1), [2, 3, 4, 4, 4, 4]
    return DataLoader(Data(), batch_sampler=[draw.sample(range(24), draw.choice(sizes)) for _ in range(37)])


def growing():
    """Return a loader whose batches become larger far from a measurement."""
    return DataLoader(
        Data(), batch_sampler=[list(range(3))] * 27 + [list(range(i % 20, i % 20 + 4)) for i in range(90)]
    )


CASES = {
    "short last batches": (short, {}),
    "two batches an epoch": (lambda: loader(dataset=Subset(Data(), range(6))), {"num_units": 4}),
    "uneven batches": (uneven, {}),
    "growing batches": (growing, {}),
    "stream": (lambda: DataLoader(Stream(), batch_size=None), {}),
    "accumulated": (short, {"trainer": {"accumulate_grad_batches": 3}, "steps": 60}),
    "refused": (short, {"refused": (0, 1, 39, 40, 59)}),
    "more units than steps": (short, {"num_units": 12, "every_n_train_steps": 4}),
    "ends of epochs": (short, {"every_n_train_steps": None, "every_n_epochs": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_units_are_those_that_copying_all_gives(name, monkeypatch):
    data, options = CASES[name]
    found, copied, _ = fit(monkeypatch, data(), **options)
    expected, all_copied, _ = fit(monkeypatch, data(), copy_all=True, **options)
    assert len(found) > 2 and [step for step, _ in found] == [step for step, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert set(copied) <= set(all_copied)


def test_units_are_the_same_where_the_interval_is_stretched_and_shortened(monkeypatch):
    runs = []
    for copy_all in (False, True):
        stretches = cycle([4, 1, 8, 8, 2])
        monkeypatch.setattr(Overhead, "stretch", lambda *_, given=stretches: next(given))
        trainer = {"log_every_n_steps": 5}
        runs.append(fit(monkeypatch, short(), copy_all, 200, trainer=trainer, every_n_train_steps=None))
    (found, copied, _), (expected, all_copied, _) = runs
    assert [step for step, _ in found] == [1, 19, 24, 39, 79, 89, 99, 104, 119, 159, 169, 179, 184, 199]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert len(copied) < len(all_copied) // 2


@pytest.mark.parametrize("at", [26, 38])
def test_units_are_the_same_after_resume(at, monkeypatch, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    fit(monkeypatch, short(), steps=at, callbacks=[saving])
    ckpt = tmp_path / f"step={at}.ckpt"
    runs = [fit(monkeypatch, short(), copy_all, ckpt=ckpt) for copy_all in (False, True)]
    (found, copied, _), (expected, all_copied, _) = runs
    assert [step for step, _ in found] == [step for step, _ in expected] and len(found) > 2
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert len(copied) < len(all_copied)


def test_copies_count_as_time_of_the_measurement(monkeypatch):
    now, copy_of = [0.0], layout.copy_of

    def slow(batch):
        now[0] += 1.0
        return copy_of(batch)

    monkeypatch.setattr(overhead, "perf_counter", lambda: now[0])
    monkeypatch.setattr(layout, "copy_of", slow)
    seconds = []
    finish = Overhead.finish
    monkeypatch.setattr(Overhead, "finish", lambda self, step: (finish(self, step), seconds.append(self._measuring)))
    fit(monkeypatch, steps=60)
    assert seconds == [0.0, 5.0, 10.0, 15.0], "five batches are copied for each measurement but the first"
