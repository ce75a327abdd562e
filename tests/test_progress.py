"""A bar below the Trainer's own while a measurement takes long, and none otherwise."""

from __future__ import annotations

import io

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from runs import QUIET, Module, loader

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.training import progress

WORDS = "Gradient confusion"


def fit(bar: pl.Callback | None, seconds: float, monkeypatch: pytest.MonkeyPatch, **confusion: object) -> pl.Trainer:
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    options = {"enable_progress_bar": bar is not None, "callbacks": [bar] if bar is not None else []}
    options["callbacks"].append(GradientConfusionCallback(every_n_epochs=1, **({"engine": "loop"} | confusion)))
    trainer = pl.Trainer(
        **(QUIET | options), max_epochs=2, log_every_n_steps=1, logger=False, enable_checkpointing=False
    )
    torch.manual_seed(0)
    trainer.fit(Module(), loader())
    return trainer


def test_tqdm_shows_a_bar_of_the_trainings_class_and_takes_it_away(monkeypatch, capsys):
    seen = []
    nested = progress._tqdm

    def watched(bar):
        show, close = nested(bar)
        opened = next(
            instance for instance in type(bar.train_progress_bar)._instances if instance.desc.startswith(WORDS)
        )
        seen.append((type(opened) is type(bar.train_progress_bar), opened.pos != bar.train_progress_bar.pos))

        def noted(done, total):
            show(done, total)
            seen.append((opened.n, opened.total))

        return noted, close

    monkeypatch.setattr(progress, "_tqdm", watched)
    trainer = fit(TQDMProgressBar(), -1, monkeypatch, source="fresh", num_units=6, memory_budget=1900)
    assert seen[0] == (True, True)
    # Three of six gradients are held at a time, and the others computed once more.
    assert seen[1] == (1, 9) and (9, 9) in seen
    assert WORDS in capsys.readouterr().out
    bar = trainer.progress_bar_callback.train_progress_bar
    assert not [left for left in type(bar)._instances if left.desc.startswith(WORDS)]


def test_rich_shows_a_task_and_takes_it_away(monkeypatch):
    text = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": text, "force_terminal": True, "width": 120})
    trainer = fit(bar, -1, monkeypatch)
    assert WORDS in text.getvalue()
    assert not [task for task in trainer.progress_bar_callback.progress.tasks if WORDS in task.description]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_short_measurements_show_nothing(bar, monkeypatch, capsys):
    fit(bar(), 100, monkeypatch)
    assert WORDS not in capsys.readouterr().out


@pytest.mark.parametrize("bar", [None, TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0)])
def test_bars_that_are_off_stay_off(bar, monkeypatch, capsys):
    fit(bar, -1, monkeypatch)
    assert WORDS not in "".join(capsys.readouterr())


def test_other_ranks_show_nothing():
    class Elsewhere:
        progress_bar_callback, global_rank = TQDMProgressBar(), 1

    with progress.progress_bar(Elsewhere()) as shown:
        assert shown is None


def test_the_bar_goes_when_a_measurement_fails(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", -1)
    closed = []
    monkeypatch.setattr(progress, "_tqdm", lambda bar: (lambda done, total: None, lambda: closed.append(True)))

    class Here:
        progress_bar_callback, global_rank = TQDMProgressBar(), 0

    with pytest.raises(ZeroDivisionError), progress.progress_bar(Here()) as shown:  # noqa: PT012
        shown(1, 2)
        raise ZeroDivisionError
    assert closed == [True]
