"""A resumed run is measured at the steps, and with the n, of the uninterrupted one."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from runs import CLASSES, FEATURES, PREFIX, QUIET, Data, Module, Rows, loader
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_gradconf import GradientConfusionCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint",  # the second part of these runs saves nothing
    "ignore:.*weights_only",
)
KEY = f"GradientConfusionCallback{{'prefix': '{PREFIX}'}}"


class Resumable(DataLoader):
    """Goes on with the next batch, as torchdata's StatefulDataLoader does."""

    first = given = 0

    def __iter__(self):
        batches = list(super().__iter__())
        self.given, self.first = self.first, 0
        for batch in batches[self.given :]:
            self.given += 1
            yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.first = state["given"] % len(self)


class Certain(Module):
    """Without dropout, since Lightning does not resume random states."""

    def make_net(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


class Validated(Certain):
    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return loader(shuffle=False)


def fit(steps, folder, ckpt=None, data=None, save=(), module=None, callbacks=(), **confusion):
    """Train to a step; return what was logged at which step, and the callback."""
    pl.seed_everything(3, verbose=False)
    rows, callback = Rows(), GradientConfusionCallback(**confusion)
    saving = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=n, save_top_k=-1, enable_version_counter=False)
        for n in save
    ]
    options = {"max_epochs": -1, "max_steps": steps, "logger": rows, "log_every_n_steps": 2}
    callbacks = [callback, *callbacks, *saving]
    trainer = pl.Trainer(callbacks=callbacks, enable_checkpointing=bool(saving), **(QUIET | options))
    # Without shuffling: the order of the data is the loader's own business.
    trainer.fit(module or Certain(), data or loader(shuffle=False), ckpt_path=ckpt)
    ours = [(step, {k: v for k, v in row.items() if k != f"{PREFIX}/seconds"}) for step, row in rows.of(ours=True)]
    return ours, callback


OPTIONS = {
    "default": {},
    "every third step": {"every_n_train_steps": 3},
    "fresh": {"source": "fresh", "num_units": 3, "every_n_train_steps": 4},
    "fixed": {"source": "fixed", "num_units": 3},
    "epochs": {"every_n_epochs": 1, "source": "fresh"},
    "pairs": {"unit_size": 2},
}


@pytest.mark.parametrize("at", [6, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_is_uninterrupted(name, at, tmp_path):
    data = lambda: Resumable(Data(), batch_size=4)  # noqa: E731
    whole, last = fit(20, tmp_path / "whole", data=data(), save=[at], **OPTIONS[name])
    path = tmp_path / "whole" / f"step={at}.ckpt"
    resumed, callback = fit(20, tmp_path, ckpt=path, data=data(), **OPTIONS[name])
    assert resumed == [(step, row) for step, row in whole if step >= at]
    assert callback.last_step == last.last_step and len(callback.last_gram) == len(last.last_gram)
    assert torch.equal(callback.last_gram, last.last_gram)


def test_n_stays_also_where_the_next_batch_is_short(tmp_path):
    data = lambda: Resumable(Subset(Data(), range(22)), batch_size=4)  # noqa: E731  five batches of 4 and one of 2
    options = {"every_n_train_steps": 1}
    whole, _ = fit(12, tmp_path, data=data(), save=[5], **options)
    resumed, callback = fit(12, tmp_path, ckpt=tmp_path / "step=5.ckpt", data=data(), **options)
    assert len(callback.last_gram) == 4
    assert [step for step, _ in resumed] == [6, 7, 8, 9, 10]
    assert resumed == [(step, row) for step, row in whole if step >= 5]


def test_the_state_is_plain_and_holds_what_is_needed(tmp_path):
    _, callback = fit(6, tmp_path, save=[6], module=Validated())
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["callbacks"][KEY]
    assert state["n"] == 4 and state["stretch"] == 1 and state["owed"] is False
    assert state["last_step"] == 5 and state["last_statistics"] == callback.last_statistics
    assert callback.state_dict() == state, "after the run"


def test_the_stretched_interval_is_kept(tmp_path):
    fit(6, tmp_path, save=[6])
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    checkpoint["callbacks"][KEY]["stretch"] = 4
    torch.save(checkpoint, tmp_path / "stretched.ckpt")
    resumed, _ = fit(20, tmp_path, ckpt=tmp_path / "stretched.ckpt")
    assert [step for step, _ in resumed] == [7, 15]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended")
def test_a_fixed_draw_is_kept_though_the_dataset_has_grown(tmp_path):
    class Grows(Data):
        size = 24

        def __len__(self):
            return self.size

        def __getitem__(self, i):
            return super().__getitem__(i % 24)

    def draw_of(callback):
        return [pair.origins for pair in callback.last_top_pairs] and sorted(
            {origin.samples for pair in callback.last_top_pairs for origin in pair.origins}
        )

    options = {"source": "fixed", "num_units": 3, "top_pairs": 3}
    _, first = fit(6, tmp_path, save=[6], data=DataLoader(Grows(), batch_size=4), **options)
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["callbacks"][KEY]
    assert sorted(map(tuple, state["fixed"][0])) == draw_of(first)
    data = Grows()
    data.size = 40
    _, again = fit(6, tmp_path, data=DataLoader(data, batch_size=4), **options)
    _, resumed = fit(12, tmp_path, ckpt=tmp_path / "step=6.ckpt", data=DataLoader(data, batch_size=4), **options)
    assert draw_of(resumed) == draw_of(first) != draw_of(again)


def test_a_run_from_the_beginning_forgets_the_one_before(tmp_path):
    callback, module = GradientConfusionCallback(), Module()
    trainer = pl.Trainer(max_steps=3, callbacks=[callback], logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(module, loader())
    assert callback.state_dict()["n"] == 4
    trainer = pl.Trainer(max_steps=1, callbacks=[callback], logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(module, loader(batch_size=8))
    assert len(callback.last_gram) == 8


def test_other_units_from_now_on_have_an_n_of_their_own(tmp_path):
    fit(6, tmp_path, save=[6], num_units=4)
    _, callback = fit(12, tmp_path, ckpt=tmp_path / "step=6.ckpt", num_units=3)
    assert len(callback.last_gram) == 3


def test_a_key_is_there_before_the_first_measurement_of_the_second_part(tmp_path):
    fit(6, tmp_path, save=[6], module=Validated())
    stopping = EarlyStopping(f"{PREFIX}/min_cosine", patience=99)
    _, callback = fit(
        12, tmp_path, ckpt=tmp_path / "step=6.ckpt", module=Validated(), callbacks=[stopping], every_n_train_steps=100
    )
    assert callback.last_step == 5 and stopping.best_score == pytest.approx(
        callback.last_statistics["min_cosine"], rel=1e-6
    )


def test_two_of_one_prefix_are_refused():
    both = [GradientConfusionCallback(), GradientConfusionCallback(num_units=4)]
    trainer = pl.Trainer(max_steps=1, callbacks=both, logger=False, enable_checkpointing=False, **QUIET)
    with pytest.raises(MisconfigurationException, match=r"same keys gradient_confusion/.*give each its own prefix="):
        trainer.fit(Module(), loader())


@pytest.mark.parametrize(
    ("given", "steps"), [({"every_n_train_steps": 5}, [9, 14, 19]), ({"max_overhead": None}, [*range(7, 20, 2)])]
)
def test_an_interval_that_is_given_later_is_kept_exactly(given, steps, tmp_path):
    fit(6, tmp_path, save=[6])
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    checkpoint["callbacks"][KEY]["stretch"] = 8
    torch.save(checkpoint, tmp_path / "stretched.ckpt")
    resumed, _ = fit(20, tmp_path, ckpt=tmp_path / "stretched.ckpt", **given)
    assert [step for step, _ in resumed] == steps


class Named:
    """An index that no checkpoint can hold."""

    def __init__(self, index):
        self.index = index

    def __index__(self):
        return self.index


@pytest.mark.parametrize(
    "kind", [np.int64, np.str_, lambda i: (np.int64(i), "x"), Named], ids=["int", "str", "tuple", "object"]
)
def test_a_run_resumes_whatever_the_indices_of_a_fixed_draw_are(kind, tmp_path):
    class ByIndex(Data):
        def __getitem__(self, i):
            return super().__getitem__(int(i[0] if isinstance(i, tuple) else i))

    def data():
        return Resumable(ByIndex(), batch_size=4, sampler=[kind(i) for i in range(24)])

    options = {"source": "fixed", "num_units": 3, "max_overhead": None}
    whole, _ = fit(12, tmp_path, data=data(), save=[6], **options)
    resumed, _ = fit(12, tmp_path, ckpt=tmp_path / "step=6.ckpt", data=data(), **options)
    assert resumed == [(step, row) for step, row in whole if step >= 6]


def test_the_key_of_a_submodule_is_there_before_the_first_measurement_of_the_second_part(tmp_path):
    _, first = fit(6, tmp_path, save=[6], module=Validated(), per_layer=True)
    stopping = EarlyStopping(f"{PREFIX}/min_cosine/net.0", patience=99)
    path, options = tmp_path / "step=6.ckpt", {"every_n_train_steps": 100, "per_layer": True}
    fit(12, tmp_path, ckpt=path, module=Validated(), callbacks=[stopping], **options)
    logged = first.state_dict()["logged"]
    assert stopping.best_score == pytest.approx(logged[f"{PREFIX}/min_cosine/net.0"], rel=1e-6)


class Broken(Module):
    def __init__(self, error):
        super().__init__()
        self.lr, self.error = 0.1, error

    def on_train_batch_end(self, *args):
        if self.global_step == 3 and self.error is not None:
            raise self.error("of the user")


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_run_that_ends_with_an_error_is_forgotten(error, monkeypatch):
    def trainer(*more):
        callbacks = [callback, *more]
        options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1}
        return pl.Trainer(callbacks=callbacks, **(QUIET | options))

    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning ignores interrupts from then on
    callback, module, data = GradientConfusionCallback(), Broken(error), loader()
    with pytest.raises((error, SystemExit)):
        trainer().fit(module, data)
    assert len(callback.last_gram) == 4
    module.error, dataset = None, weakref.ref(data.dataset)
    del data
    trainer(LearningRateFinder(num_training_steps=2, update_attr=False)).fit(module, loader(batch_size=8))
    assert len(callback.last_gram) == 8
    gc.collect()
    assert dataset() is None
