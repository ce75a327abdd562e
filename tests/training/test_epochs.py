"""every_n_epochs measures once at every n-th end of an epoch, however it ends, and before its validation."""

from __future__ import annotations

from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, StochasticWeightAveraging, Timer
from runs import CLASSES, FEATURES, PREFIX, QUIET, Data, Module, Rows, loader
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradconf import GradientConfusionCallback

FRESH = {"every_n_epochs": 1, "source": "fresh"}


def fit(module, confusion=FRESH, data=None, callbacks=(), **options):
    """Train on 6 batches an epoch; return the steps that were logged and the trainer."""
    rows = Rows()
    options = {"max_epochs": 2, "logger": rows, "enable_checkpointing": False, "log_every_n_steps": 2} | options
    callback = GradientConfusionCallback(**confusion) if isinstance(confusion, dict) else confusion
    trainer = pl.Trainer(callbacks=[*callbacks, callback], **(QUIET | options))
    trainer.fit(module, data or loader())
    steps = [step for step, row in rows.of(ours=True) if f"{PREFIX}/eta" in row]
    assert len(set(steps)) == len(steps), "a step has two values"
    return steps, trainer


class SkipsTheRest(Module):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


class StopsItself(Module):
    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 2:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class TwoOptimizers(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self):
        return loader(shuffle=False)


class StopLater(pl.Callback):
    """Stops behind our back: at the end of a batch, or in validation."""

    def __init__(self, hook, step):
        def stop(trainer, *args):
            trainer.should_stop = trainer.should_stop or trainer.global_step >= step

        setattr(self, hook, stop)


LOSS = {"loss_fn": lambda module, batch: module.loss(batch)}
ENDS = {
    "the last batch": (Module, {}, {}, [0, 5, 11]),
    "-1 from a hook": (SkipsTheRest, {}, {}, [0, 2, 5]),
    "should_stop": (StopsItself, {}, {}, [0, 5, 8]),
    "should_stop before min_epochs": (StopsItself, {"min_epochs": 3, "max_epochs": 4}, {}, [0, 5, 11, 17]),
    "max_steps": (Module, {"max_steps": 9}, {}, [0, 5, 8]),
    "max_steps with the epoch": (Module, {"max_steps": 12}, {}, [0, 5, 11]),
    "max_steps stepped over": (TwoOptimizers, {"max_steps": 15, "max_epochs": -1}, LOSS, [0, 5, 7]),
    "limit_train_batches": (Module, {"limit_train_batches": 4}, {}, [0, 3, 7]),
    "accumulation": (Module, {"accumulate_grad_batches": 4}, {}, [0, 1, 3]),
    "every second epoch": (Module, {"max_epochs": 5}, {"every_n_epochs": 2}, [0, 11, 23]),
}


@pytest.mark.parametrize("end", ENDS)
def test_one_measurement_at_the_end_of_each_epoch(end):
    module, options, confusion, want = ENDS[end]
    assert fit(module(), FRESH | confusion, **options)[0] == want


def test_the_epoch_in_which_weight_averaging_only_refreshes_batchnorm_is_not_measured():
    class WithBatchNorm(Module):
        def make_net(self):
            return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    steps, trainer = fit(WithBatchNorm(), FRESH | {"every_n_epochs": 2}, callbacks=[averaging], max_epochs=3)
    assert trainer.current_epoch == 4 and steps == [0, 11]


def test_a_last_batch_that_completes_the_units_is_measured_once():
    steps, _ = fit(Module(), {"every_n_epochs": 1, "num_units": 24})
    assert steps == [5, 11]


@pytest.mark.parametrize(("hook", "steps"), [("on_train_batch_end", [0, 3]), ("on_validation_end", [0, 3])])
def test_epochs_that_others_end(hook, steps):
    module = Validated() if "validation" in hook else Module()
    found, _ = fit(module, callbacks=[StopLater(hook, 4)], val_check_interval=2)
    assert found == steps
    reversed_order = GradientConfusionCallback(**FRESH)
    rows = Rows()
    options = {"max_epochs": 2, "logger": rows, "enable_checkpointing": False, "val_check_interval": 2}
    pl.Trainer(callbacks=[reversed_order, StopLater(hook, 4)], **(QUIET | options)).fit(module, loader())
    assert [step for step, _ in rows.of(ours=True)] == steps


@pytest.mark.parametrize("end", [SkipsTheRest, StopsItself, Module])
def test_weights_at_the_end_are_those_after_the_last_step(end):
    class Smooth(end):
        def make_net(self):
            return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    module, data = Smooth(), DataLoader(Data(), batch_size=4)
    confusion = GradientConfusionCallback(every_n_epochs=2, source=data, num_units=4)
    fit(module, confusion)
    x, y = next(iter(data))
    rows = []
    for i in range(4):  # at the weights that the run has left
        loss = F.cross_entropy(module.net(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]).double())
    want = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(confusion.last_gram.double(), want, rtol=1e-5, atol=1e-6)


def test_max_time():
    class Batches(Timer):
        """Counts batches as seconds."""

        passed = 0

        def on_train_batch_end(self, *args):
            self.passed += 1
            super().on_train_batch_end(*args)

        def time_elapsed(self, *args):
            return float(self.passed)

    steps, _ = fit(Module(), callbacks=[Batches(timedelta(seconds=9))])
    assert steps == [0, 5, 8]


@pytest.mark.parametrize("confusion", [{}, FRESH, {"unit_size": "batch", "num_units": 2}], ids=str)
def test_the_key_is_there_before_early_stopping_asks_inside_an_epoch(confusion):
    stopping = EarlyStopping(f"{PREFIX}/min_cosine", patience=99)
    _, trainer = fit(Validated(), confusion, callbacks=[stopping], val_check_interval=2)
    assert trainer.global_step == 12


def test_where_units_take_longer_to_gather_early_stopping_must_not_be_strict():
    late = {"every_n_epochs": 1, "num_units": 24}
    with pytest.raises(RuntimeError, match="not available"):
        fit(Validated(), late, callbacks=[EarlyStopping(f"{PREFIX}/min_cosine")], val_check_interval=2)
    stopping = EarlyStopping(f"{PREFIX}/min_cosine", strict=False, patience=99)
    steps, _ = fit(Validated(), late, callbacks=[stopping], val_check_interval=2)
    assert steps == [5, 11]


def test_should_measure_decides_at_each_due_step():
    class WhileAbove(GradientConfusionCallback):
        def should_measure(self, trainer):
            asked.append(trainer.global_step)
            return trainer.global_step < 4

    asked = []
    steps, _ = fit(Module(), WhileAbove(every_n_train_steps=2))
    assert asked == [0, 1, 3, 5, 7, 9, 11] and steps == [0, 1, 3]
    steps, _ = fit(Module(), WhileAbove(**FRESH))
    assert steps == [0]


def test_an_error_in_should_measure_is_said_and_training_goes_on():
    class Broken(GradientConfusionCallback):
        def should_measure(self, trainer):
            raise KeyError("loss")

    with pytest.warns(UserWarning, match="KeyError: 'loss'"):
        steps, trainer = fit(Module(), Broken(every_n_train_steps=1))
    assert steps == [] and trainer.global_step == 12


def test_a_run_in_which_no_measurement_was_wanted_says_nothing(recwarn):
    class Never(GradientConfusionCallback):
        def should_measure(self, trainer):
            return False

    fit(Module(), Never())
    assert not [w for w in recwarn if "GradientConfusion" in str(w.message)]


class Skips(Module):
    def training_step(self, batch, batch_idx):
        return None


class SkipsAll(Module):
    def on_train_batch_start(self, batch, batch_idx):
        return -1


class AllFrozen(Skips):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize("module", [Skips, SkipsAll, AllFrozen])
def test_a_module_that_is_never_trained_is_the_reason_for_no_measurement(module):
    with pytest.warns(UserWarning, match="no measurement took place: at each step .* returned None") as caught:
        fit(module())
    assert sum("GradientConfusion" in str(w.message) for w in caught) == 1


class FrozenBackbone(Module):
    """Its first layer is frozen in the first epoch, by a callback or by a hook that runs at each batch."""

    by_hook = False

    def on_train_start(self):
        self.freeze_backbone()

    def on_train_epoch_start(self):
        if not self.by_hook:
            self.freeze_backbone()

    def on_train_batch_start(self, batch, batch_idx):
        if self.by_hook:
            self.freeze_backbone()

    def freeze_backbone(self):
        self.net[0].requires_grad_(self.current_epoch > 0)


@pytest.mark.parametrize("by_hook", [False, True])
def test_parameters_that_are_frozen_at_first_are_measured_when_they_are_not(by_hook, recwarn):
    module, confusion = FrozenBackbone(), GradientConfusionCallback(every_n_train_steps=2, parameters="net.0.*")
    module.by_hook = by_hook
    steps, _ = fit(module, confusion)
    assert steps == [6, 7, 9, 11]
    assert not [w for w in recwarn if "GradientConfusion" in str(w.message)]
