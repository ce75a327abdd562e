"""The default interval is stretched until measuring takes its share of the run, and no other is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from runs import QUIET, Module, loader

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.training import overhead, session
from lightning_gradconf.training.overhead import Overhead

STEP, MEASUREMENT, FIRST = 0.001, 0.004, 1.0  # seconds


class Clock(pl.Callback):
    """Goes on by a step at each batch, and by a measurement wherever one is made."""

    def __init__(self, monkeypatch, confusion, measurement=MEASUREMENT):
        self.now, self.steps = 0.0, []
        monkeypatch.setattr(overhead, "perf_counter", lambda: self.now)
        finish = Overhead.finish

        def finish_later(measured, step):
            self.now += measurement if self.steps else FIRST
            self.steps.append(step)
            finish(measured, step)

        monkeypatch.setattr(Overhead, "finish", finish_later)

    def on_train_batch_end(self, *args):
        self.now += STEP


def steps_of(monkeypatch, measurement=MEASUREMENT, steps=1500, log_every_n_steps=2, **options):
    confusion = GradientConfusionCallback(num_units=2, **options)
    clock = Clock(monkeypatch, confusion, measurement)
    options = {"max_steps": steps, "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=[confusion, clock], log_every_n_steps=log_every_n_steps, **(QUIET | options))
    trainer.fit(Module(), loader())
    return clock.steps, trainer


def test_the_share_of_the_run_is_kept(monkeypatch):
    said = []
    monkeypatch.setattr(session, "inform", lambda trainer, message: said.append(message))
    steps, _ = steps_of(monkeypatch)
    assert steps[:5] == [0, 1, 3, 5, 7], "four measurements are taken before their time is believed"
    # 4 ms in 80 ms are 5 %: an interval of 76 steps at least. Before it comes to that, the first ones are made up for.
    assert steps[5] == 511 and {b - a for a, b in pairwise(steps[6:])} == {128}
    for count, step in enumerate(steps):
        if count > 5:  # at every measurement, all before it included
            assert count * MEASUREMENT <= 0.05 * (count * MEASUREMENT + step * STEP)
    assert len(said) == 1
    assert "a measurement takes 4.0 ms and a step 1.0 ms. It measures every 512 steps instead of every 2" in said[0]


def test_fewer_than_one_measurement_an_epoch(monkeypatch):
    steps, trainer = steps_of(monkeypatch, measurement=1.0, steps=200)
    assert trainer.current_epoch > 30
    assert steps == [0, 1], "one that takes long is believed at once"


@pytest.mark.parametrize(
    "options", [{"every_n_train_steps": 2}, {"max_overhead": None}, {"max_overhead": 0.9}], ids=str
)
def test_intervals_that_are_kept(options, monkeypatch):
    steps, _ = steps_of(monkeypatch, steps=100, **options)
    assert steps == [0, *range(1, 100, 2)]


def test_ranks_take_the_decision_of_the_first(monkeypatch):
    """As on rank 1, where steps seem to take another time."""
    gather = Ranks.gather
    monkeypatch.setattr(Ranks, "gather", lambda self, values: [8, *gather(self, values)])
    steps, _ = steps_of(monkeypatch, steps=40)
    assert steps == [0, 15, 31]


def test_ends_of_epochs_are_kept(monkeypatch):
    steps, _ = steps_of(monkeypatch, measurement=1.0, steps=60, every_n_epochs=1, source="fresh")
    assert steps == [0, *range(5, 60, 6)]


def test_an_interval_becomes_shorter_again_with_slower_steps(monkeypatch):
    measured = Overhead(torch.device("cpu"))
    now = 0.0
    monkeypatch.setattr(overhead, "perf_counter", lambda: now)
    stretch = 1
    for step in range(0, 4000, 10):
        now += 10 * (STEP if step < 100 else 100 * STEP)
        measured.start()
        now += MEASUREMENT
        measured.finish(step)
        stretch = measured.stretch(10, stretch, 0.05)
        assert stretch == 1 if step < 40 or step > 400 else stretch >= 1
        if step == 90:
            assert stretch >= 8
    assert measured.seconds_of_measurement == pytest.approx(MEASUREMENT)
