"""When the callback measures, what it logs, and what it refuses."""

from __future__ import annotations

import csv
import logging
import math
import pickle
import warnings
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from runs import CLASSES, FEATURES, PREFIX, QUIET, Data, Module, Rows, loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from lightning_gradconf import GradientConfusionCallback, gradient_gram, gradient_statistics
from lightning_gradconf.gram.select import _say_once
from lightning_gradconf.training import session
from lightning_gradconf.training.isolation import digests

DEFAULT = ["eta", "min_cosine", "p05_cosine", "mean_cosine", "negative_fraction", "gradient_norm"]
pytestmark = pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")


class Plain(Module):
    """Without BatchNorm and dropout: what is measured is what one would compute by hand."""

    def make_net(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def fit(confusion: Any, module: Module | None = None, data: Any = None, **options: Any) -> tuple[Any, Any, Rows]:
    pl.seed_everything(3, verbose=False)
    rows = Rows()
    options = {"max_epochs": 2, "logger": rows, "enable_checkpointing": False, "log_every_n_steps": 2} | options
    confusions = confusion if isinstance(confusion, list) else [confusion]
    trainer = pl.Trainer(callbacks=confusions, **(QUIET | options))
    module = module or Plain()
    trainer.fit(module, loader() if data is None else data)
    return trainer, module, rows


def steps(rows: Rows, key: str = "min_cosine") -> list[int]:
    return [step for step, row in rows.of(ours=True) if f"{PREFIX}/{key}" in row]


# ---- numbers ---------------------------------------------------------------------------------------------------------


class ByHand(pl.Callback):
    """Plain autograd on each unit of the batch about to be trained on."""

    def __init__(self, unit_size: int) -> None:
        self.unit_size, self.grams = unit_size, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rows = []
        for x, y in zip(*(part.split(self.unit_size) for part in batch), strict=True):
            loss = F.cross_entropy(module.net(x), y)
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]).double())
        self.grams[trainer.fit_loop.epoch_loop._batches_that_stepped] = torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize("unit_size", [1, 2])
def test_logged_numbers_are_those_of_the_weights_before_the_step(unit_size):
    confusion, by_hand = GradientConfusionCallback(every_n_train_steps=3, unit_size=unit_size), ByHand(unit_size)
    _, _, rows = fit([by_hand, confusion], max_epochs=1)
    measured = dict(rows.of(ours=True))
    assert sorted(measured) == [0, 2, 5]
    for step, row in measured.items():
        want = gradient_statistics(by_hand.grams[step])
        assert list(row) == [f"{PREFIX}/{name}" for name in DEFAULT]
        for name in DEFAULT:
            torch.testing.assert_close(row[f"{PREFIX}/{name}"], float(want[name]), rtol=1e-5, atol=1e-6)
    assert confusion.last_step == 5
    torch.testing.assert_close(confusion.last_gram, by_hand.grams[5].float(), rtol=1e-5, atol=1e-6)
    assert confusion.last_statistics == {name: measured[5][f"{PREFIX}/{name}"] for name in DEFAULT}


def test_current_batches_are_the_most_recent_ones():
    grams = {}

    class Collect(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch)
            if len(seen) >= 3:
                joined = [torch.cat(part) for part in zip(*seen[-3:], strict=True)]
                loss = lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1])  # noqa: E731
                grams[len(seen) - 1] = sum(gradient_gram(module, loss, joined, unit_size=4, engine="loop").values())

    seen: list[Any] = []
    confusion = GradientConfusionCallback(unit_size="batch", num_units=3, every_n_train_steps=4)
    _, _, rows = fit([Collect(), confusion])
    assert steps(rows) == [2, 3, 7, 11]  # the first as soon as there are three batches
    torch.testing.assert_close(confusion.last_gram, grams[11], rtol=1e-5, atol=1e-7)


def test_batchnorm_and_dropout_are_measured_as_the_contract_says():
    module = Module()  # BatchNorm, and dropout in training mode
    confusion = GradientConfusionCallback(engine="loop", every_n_train_steps=100)
    data = loader(shuffle=False)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    fit(confusion, module, data, max_steps=1)
    twin = Module()
    twin.load_state_dict(state)
    twin.eval()  # running statistics and no dropout
    x, y = next(iter(data))
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    F.cross_entropy(twin.net(x[i : i + 1]), y[i : i + 1]), list(twin.parameters())
                )
            ]
        )
        for i in range(4)
    ]
    torch.testing.assert_close(confusion.last_gram, torch.stack(rows) @ torch.stack(rows).T, rtol=1e-5, atol=1e-6)


def test_dropout_on_when_asked():
    off, on = (
        GradientConfusionCallback(dropout=d, engine="loop", prefix=f"p{d}", every_n_train_steps=9) for d in (0, 1)
    )
    fit([off, on], Module(), max_steps=1)
    assert not torch.allclose(off.last_gram, on.last_gram)


def test_loss_fn_and_parameters():
    confusion = GradientConfusionCallback(
        loss_fn=lambda module, batch: module.net(batch[0]).sum() / len(batch[0]), parameters=["net.0.bias", "*.2.*"]
    )
    fit(confusion, max_steps=1)
    assert confusion.last_gram is not None
    with pytest.warns(UserWarning, match=r"parameters='x\*' matches none of the 4 parameters.*'net\.0\.weight'"):
        fit(GradientConfusionCallback(parameters="x*"), max_steps=1)
    with pytest.warns(UserWarning, match=r"parameters='layer\.\*' matches none"):
        fit(GradientConfusionCallback(parameters=["net.*", "layer.*"]), max_steps=1)


# ---- when ------------------------------------------------------------------------------------------------------------


def test_cadence_follows_the_trainer():
    _, _, rows = fit(GradientConfusionCallback(), log_every_n_steps=5)
    assert steps(rows) == [0, 4, 9]


def test_every_n_epochs_measures_the_first_batch_and_the_ends():
    _, _, rows = fit(GradientConfusionCallback(every_n_epochs=2, source="fresh"), max_epochs=4)
    assert steps(rows) == [0, 11, 23]


def test_end_of_an_epoch_comes_before_validation_and_is_seen_by_it():
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("seen", self.trainer.callback_metrics[f"{PREFIX}/eta"])

        def val_dataloader(self):
            return loader(shuffle=False)

    confusion = GradientConfusionCallback(every_n_epochs=1, source="fixed")
    trainer, _, _ = fit(confusion, Validated(), max_epochs=1, num_sanity_val_steps=0)
    assert float(trainer.callback_metrics["seen"]) == pytest.approx(confusion.last_statistics["eta"], rel=1e-6)


def test_end_of_a_run_inside_an_epoch_counts_as_its_end():
    _, _, rows = fit(GradientConfusionCallback(every_n_epochs=1, source="fresh"), max_epochs=-1, max_steps=4)
    assert steps(rows) == [0, 3]


def test_accumulation_measures_each_step_once():
    _, _, rows = fit(GradientConfusionCallback(every_n_train_steps=1), accumulate_grad_batches=4)
    assert steps(rows) == [0, 1, 2, 3]


def test_two_optimizers_do_not_hide_steps():
    class TwoSteps(Plain):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    confusion = GradientConfusionCallback(every_n_train_steps=5, loss_fn=lambda module, batch: module.loss(batch))
    _, _, rows = fit(confusion, TwoSteps())
    assert steps(rows) == [0, 4, 9]


def test_short_last_batch_postpones_and_n_stays():
    data = loader(dataset=Subset(Data(), range(22)), shuffle=False)  # 5 batches of 4 and one of 2
    sizes = {}

    class Note(pl.Callback):
        def on_train_batch_end(self, *args):
            sizes[confusion.last_step] = len(confusion.last_gram)

    confusion = GradientConfusionCallback(every_n_train_steps=6)
    _, _, rows = fit([confusion, Note()], data=data)
    assert steps(rows) == [0, 6]  # step 5 is the short batch; step 11 too, and then training ends
    assert sizes == {0: 4, 6: 4}


def test_skipped_batches_postpone():
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 1) else self.loss(batch)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")
        _, _, rows = fit(GradientConfusionCallback(every_n_train_steps=100), Skips(), max_epochs=1)
    assert steps(rows) == [2]


def test_a_batch_that_the_module_skips_postpones():
    class SkipsTheFirstEpoch(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 0 else None

    _, _, rows = fit(GradientConfusionCallback(every_n_train_steps=100), SkipsTheFirstEpoch())
    assert steps(rows) == [0]  # the first step that is taken


def test_units_without_a_loss_have_no_gradient():
    class SkipsSamples(Plain):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) if len(batch[0]) > 1 or batch[0][0, 0] > 0 else None

    confusion = GradientConfusionCallback(engine="loop")
    fit(confusion, SkipsSamples(), loader(batch_size=24, shuffle=False), max_steps=1)
    assert torch.equal(confusion.last_gram.diagonal() > 0, Data().x[:, 0] > 0)


def test_fast_dev_run_measures():
    confusion = GradientConfusionCallback()
    fit(confusion, fast_dev_run=True)
    assert confusion.last_step == 0


def test_fit_twice_measures_the_first_batch_of_each():
    confusion, module = GradientConfusionCallback(every_n_train_steps=100), Plain()
    pl.seed_everything(3, verbose=False)
    rows = Rows()
    trainer = pl.Trainer(
        max_epochs=1, logger=rows, enable_checkpointing=False, callbacks=[confusion], log_every_n_steps=2, **QUIET
    )
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(batch_size=8))
    assert steps(rows) == [0, 6]
    assert len(confusion.last_gram) == 8, "n belongs to one run"


def test_lr_finder_is_not_measured(tmp_path):
    confusion = GradientConfusionCallback()
    module = Plain()
    module.lr = 0.1
    trainer = pl.Trainer(max_epochs=1, logger=False, callbacks=[confusion], default_root_dir=tmp_path, **QUIET)
    Tuner(trainer).lr_find(module, loader(), num_training=5)
    assert confusion.last_gram is None


# ---- where it goes ---------------------------------------------------------------------------------------------------


def test_event_file_has_every_measurement_at_its_own_step(tmp_path):
    confusion = GradientConfusionCallback(every_n_train_steps=3)
    logger = TensorBoardLogger(tmp_path)
    _, _, _ = fit(confusion, logger=logger, log_every_n_steps=5, max_epochs=3)
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0}).Reload()
    values = {event.step: event.value for event in events.Scalars(f"{PREFIX}/min_cosine")}
    assert list(values) == [0, 2, 5, 8, 11, 14, 17]
    assert len(set(values.values())) == len(values), "a value was repeated"
    assert [event.step for event in events.Histograms(f"{PREFIX}/cosines")] == list(values)
    assert [event.step for event in events.Scalars("train_loss_step")] == [4, 9, 14]


def test_histogram_can_be_left_out(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(GradientConfusionCallback(histogram=False), logger=logger)
    assert EventAccumulator(logger.log_dir).Reload().Tags()["histograms"] == []


def test_figures_reach_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(GradientConfusionCallback(figures=True, every_n_train_steps=5), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"{PREFIX}/heatmap", f"{PREFIX}/density"}
    assert [event.step for event in events.Images(f"{PREFIX}/heatmap")] == [0, 4, 9]


def test_several_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path), Rows(), TensorBoardLogger(tmp_path)]
    fit(GradientConfusionCallback(every_n_train_steps=4), logger=loggers)
    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row[f"{PREFIX}/eta"]]
    assert [int(row["step"]) for row in rows] == steps(loggers[1]) == [0, 3, 7, 11]


def test_callback_metrics_progress_bar_and_no_logger():
    confusion = GradientConfusionCallback(prog_bar=True)
    trainer, _, _ = fit(confusion, logger=False)
    for name, value in confusion.last_statistics.items():
        assert float(trainer.callback_metrics[f"{PREFIX}/{name}"]) == pytest.approx(value, rel=1e-6)
    assert list(trainer.progress_bar_metrics) == [f"{PREFIX}/min_cosine"]
    trainer, _, _ = fit(GradientConfusionCallback())
    assert trainer.progress_bar_metrics == {}


def test_logged_metrics_and_what_a_measurement_costs(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr("lightning_gradconf.training.overhead.perf_counter", lambda: float(next(seconds)))
    confusion = GradientConfusionCallback(statistics="all", every_n_train_steps=2)
    trainer, _, _ = fit(confusion)
    assert confusion.last_engine in ("ghost", "vmap", "loop") and confusion.last_seconds == 1.0
    assert confusion.last_statistics["num_units"] == 4 and confusion.last_statistics["seconds"] == 1.0
    assert {f"{PREFIX}/{name}" for name in confusion.last_statistics} <= trainer.logged_metrics.keys()
    confusion = GradientConfusionCallback(statistics=["seconds", "eta"])
    fit(confusion, max_steps=1)
    assert set(confusion.last_statistics) == {"seconds", "eta"}


def test_batches_that_become_smaller_are_told_once():
    class Smaller(Plain):
        def train_dataloader(self):
            return loader(batch_size=8 if self.trainer.current_epoch == 0 else 4)

    def train(**options):
        module, confusion = Smaller(), GradientConfusionCallback(every_n_train_steps=1, **options)
        rows = Rows()
        trainer = pl.Trainer(
            max_epochs=3, logger=rows, callbacks=[confusion], reload_dataloaders_every_n_epochs=1,
            enable_checkpointing=False, log_every_n_steps=1, **QUIET,
        )  # fmt: skip
        trainer.fit(module)
        return steps(rows)

    with pytest.warns(
        UserWarning, match="too small for the n=8 units of unit_size=1.*since step 2.*num_units="
    ) as caught:
        assert train() == [0, 1, 2]
    assert len([w for w in caught if "GradientConfusionCallback" in str(w.message)]) == 1
    assert train(num_units=4) == list(range(15))


def test_early_stopping_and_checkpoints_monitor_a_key(tmp_path):
    stopping = EarlyStopping(f"{PREFIX}/negative_fraction", stopping_threshold=2.0, check_on_train_epoch_end=True)
    saving = ModelCheckpoint(
        tmp_path, monitor=f"{PREFIX}/min_cosine", every_n_train_steps=2, filename="best", mode="max"
    )
    confusion = GradientConfusionCallback(every_n_train_steps=2)
    trainer, _, rows = fit([stopping, saving, confusion], max_epochs=5, enable_checkpointing=True)
    assert trainer.current_epoch == 1, "below the threshold at the first check"
    best = max(row[f"{PREFIX}/min_cosine"] for step, row in rows.of(ours=True) if step % 2)
    assert float(saving.best_model_score) == pytest.approx(best, rel=1e-6)


def test_per_layer():
    def keys(per_layer):
        _, _, rows = fit(GradientConfusionCallback(per_layer=per_layer), max_steps=1)
        return {k.removeprefix(f"{PREFIX}/min_cosine/") for k in rows.of(ours=True)[0][1] if k.count("/") > 1}

    assert keys(False) == keys(0) == set()
    assert keys(True) == keys(2) == {"net.0", "net.2"}
    assert keys(1) == {"net"}


def test_per_layer_numbers():
    confusion = GradientConfusionCallback(per_layer=True, every_n_train_steps=100)
    only = GradientConfusionCallback(parameters="net.2.*", prefix="only", every_n_train_steps=100)
    _, _, rows = fit([confusion, only], max_steps=1)
    merged = {k: v for _, row in rows.rows for k, v in row.items()}
    assert merged[f"{PREFIX}/min_cosine/net.2"] == pytest.approx(merged["only/min_cosine"], rel=1e-6)


def test_two_callbacks_side_by_side():
    first, second = GradientConfusionCallback(), GradientConfusionCallback(prefix="other", num_units=3)
    assert first.state_key != second.state_key
    _, _, rows = fit([first, second])
    assert {key.partition("/")[0] for _, row in rows.rows for key in row} >= {PREFIX, "other"}


def test_pickles():
    confusion = pickle.loads(pickle.dumps(GradientConfusionCallback(num_units=5, per_layer=2)))
    assert (confusion.num_units, confusion.per_layer) == (5, 2)


# ---- sources ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return (Data()[i] for i in range(24))


class Seen(Plain):
    """Notes the first feature of the samples that are measured."""

    measured: ClassVar[list[float]] = []

    def training_step(self, batch, batch_idx):
        if len(batch[0]) == 1:
            type(self).measured.append(float(batch[0][0, 0]))
        return self.loss(batch)


def samples_measured(data: Any = None, **options: Any) -> list[set[float]]:
    Seen.measured = []
    confusion = GradientConfusionCallback(num_units=5, engine="loop", every_n_train_steps=4, **options)
    fit(confusion, Seen(), data)
    assert len(Seen.measured) == 5 * 4
    return [set(Seen.measured[i : i + 5]) for i in range(0, 20, 5)]


def test_fresh_draws_differ_and_repeat_with_the_seed():
    first, again, other = (samples_measured(source="fresh", seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(len(draw) == 5 for draw in first), "drawn with replacement"
    assert len(set(map(frozenset, first))) == len(first)


def test_fixed_draw_stays():
    draws = samples_measured(source="fixed")
    assert all(draw == draws[0] for draw in draws) and len(draws[0]) == 5


def test_a_loader_of_the_users_gives_its_first_samples():
    given = DataLoader(Data(), batch_size=3)
    draws = samples_measured(source=given)
    assert all(draw == {float(x) for x in Data().x[:5, 0]} for draw in draws)


@pytest.mark.parametrize("source", ["fresh", "fixed"])
def test_draws_keep_to_what_the_sampler_admits(source):
    data = loader(shuffle=False, sampler=SubsetRandomSampler(range(12, 24)))
    admitted = {float(x) for x in Data().x[12:, 0]}
    Seen.measured = []
    fit(GradientConfusionCallback(num_units=5, engine="loop", source=source, every_n_train_steps=2), Seen(), data)
    assert set(Seen.measured) <= admitted and len(set(Seen.measured)) >= 5


@pytest.mark.filterwarnings("ignore:.*overfit")
@pytest.mark.parametrize("source", ["fresh", "fixed"])
def test_draws_are_of_the_batches_that_are_overfitted(source):
    Seen.measured = []
    confusion = GradientConfusionCallback(num_units=5, engine="loop", source=source, every_n_train_steps=1)
    fit(confusion, Seen(), loader(shuffle=False), overfit_batches=2, max_epochs=4)
    assert len(confusion.last_gram) == 5
    assert set(Seen.measured) <= {float(x) for x in Data().x[:8, 0]}


def test_units_of_a_batch_size_each():
    confusion = GradientConfusionCallback(source="fresh", unit_size="batch", num_units=4)
    fit(confusion)
    assert len(confusion.last_gram) == 4


def test_data_that_cannot_be_indexed_cannot_be_drawn_from():
    with pytest.warns(UserWarning, match="source='fresh' and 'fixed' draw from the dataset of a DataLoader"):
        fit(GradientConfusionCallback(source="fresh"), data=loader(dataset=Stream(), shuffle=False))


def test_the_training_loader_itself_is_refused():
    data = loader()
    with pytest.warns(UserWarning, match="source= is the training loader itself.*source='fresh'"):
        _, _, rows = fit(GradientConfusionCallback(source=data), data=data)
    assert steps(rows) == []


# ---- what cannot be measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("every_n_train_steps", 0),
        ("every_n_train_steps", 1.5),
        ("every_n_epochs", -1),
        ("num_units", 1),
        ("unit_size", 0),
        ("unit_size", "sample"),
        ("source", "val"),
        ("engine", "fast"),
        ("loss_fn", "mse"),
        ("statistics", ["eta", "mean"]),
        ("statistics", ["within_class_cosine"]),
        ("per_layer", -1),
        ("prefix", ""),
        ("seed", -1),
    ],
)
def test_arguments_are_checked_and_named(argument, value):
    name = argument if argument != "statistics" else "statistic|labels"
    with pytest.raises(ValueError, match=name) as caught:
        GradientConfusionCallback(**{argument: value})
    shown = value[-1] if isinstance(value, list) else value
    assert str(shown) in str(caught.value)


def test_two_schedules_exclude_each_other():
    with pytest.raises(MisconfigurationException, match="every_n_train_steps=1 and every_n_epochs=2"):
        GradientConfusionCallback(every_n_train_steps=1, every_n_epochs=2)


def refused(words: str, confusion: GradientConfusionCallback, *args: Any, **options: Any) -> None:
    """One warning, no measurement, and the training goes to its end."""
    with pytest.warns(UserWarning, match=words) as caught:
        trainer, _, _ = fit(confusion, *args, **options)
    assert sum("GradientConfusionCallback" in str(w.message) for w in caught) == 1
    assert confusion.last_gram is None
    assert trainer.current_epoch == 2


def test_one_unit_is_refused():
    refused(r"source='current' gives 1 unit\(s\) of unit_size=4", GradientConfusionCallback(unit_size=4))


def test_barebones_is_refused():
    options = dict.fromkeys(["logger", "enable_checkpointing", "log_every_n_steps"])
    refused("barebones", GradientConfusionCallback(), barebones=True, **options)


def test_never_logging_is_refused():
    refused(r"log_every_n_steps=0\) means never", GradientConfusionCallback(), log_every_n_steps=0)


def test_dataloader_iter_is_refused():
    class Iter(Plain):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    refused("dataloader_iter", GradientConfusionCallback(), Iter(), loader())


def test_an_iterator_on_the_module_is_refused():
    class Holds(Plain):
        def __init__(self):
            super().__init__()
            self.numbers = iter(range(1000))

        def training_step(self, batch, batch_idx):
            return self.loss(batch) + next(self.numbers)

    module = Holds()
    refused(r"Holds\.numbers is an iterator", GradientConfusionCallback(), module)
    assert next(module.numbers) == 12


def test_too_few_batches_are_named_at_the_end():
    confusion = GradientConfusionCallback(unit_size="batch", num_units=3)
    with pytest.warns(UserWarning, match="no measurement took place: 2 units"):
        fit(confusion, data=loader(dataset=Stream(), batch_size=12, shuffle=False), max_epochs=1)


def test_an_error_is_reported_once_and_stops_after_three():
    calls = []

    def broken(module, batch):
        calls.append(len(batch[0]))
        raise RuntimeError("the reason\nand its details")

    with pytest.warns(
        UserWarning, match=r"RuntimeError: the reason\. .*training goes on|training goes on.*RuntimeError: the reason"
    ) as caught:
        trainer, _, rows = fit(GradientConfusionCallback(loss_fn=broken, engine="loop", every_n_train_steps=1))
    assert len([w for w in caught if "GradientConfusionCallback" in str(w.message)]) == 1
    # Each on copies of the module's tensors, and then on its own.
    assert calls == [1, 1, 2, 2, 1, 1, 1, 1], "a pair is tried once"
    assert trainer.global_step == 12 and steps(rows) == []


def test_measuring_resumes_after_a_single_error():
    calls = []

    def sometimes(module, batch):
        calls.append(1)
        if len(calls) in (2, 3):  # on copies of the module's tensors, and on its own
            raise RuntimeError("once")
        return module.loss(batch)

    with pytest.warns(UserWarning, match="once"):
        _, _, rows = fit(GradientConfusionCallback(loss_fn=sometimes, engine="loop", every_n_train_steps=3))
    assert steps(rows) == [2, 5, 8, 11]


def test_not_finite_is_logged_as_nan_and_said_once():
    confusion = GradientConfusionCallback(
        loss_fn=lambda module, batch: module.loss(batch) * math.inf, every_n_train_steps=4
    )
    with pytest.warns(UserWarning, match="not finite.*First at step 0") as caught:
        trainer, _, rows = fit(confusion)
    assert len([w for w in caught if "GradientConfusionCallback" in str(w.message)]) == 1
    assert steps(rows) == [0, 3, 7, 11] and trainer.global_step == 12
    assert all(math.isnan(value) for value in confusion.last_statistics.values())


@pytest.mark.parametrize(("num_units", "times"), [(4, 0), (32, 1)])
def test_fewer_units_than_were_asked_for_are_said_once(num_units, times, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(session, "inform", lambda trainer, message: said.append(message))
    fit(GradientConfusionCallback(every_n_train_steps=1, num_units=num_units))
    assert len(said) == times and all("not num_units=32" in message for message in said)


def test_falling_back_is_said_once_with_the_reason(caplog):
    class Branches(Plain):
        def loss(self, batch):
            return super().loss(batch) * (1 + float(batch[0].sum()))  # another number for each unit

    _say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        fit(GradientConfusionCallback(every_n_train_steps=1), Branches(), loader(batch_size=24))
    messages = [record.getMessage() for record in caplog.records if record.name == "lightning_gradconf"]
    assert len(messages) == 1 and "Branches" in messages[0] and "engine='loop'" in messages[0]


# ---- verify ----------------------------------------------------------------------------------------------------------


class Leaks(Plain):
    """Writes where no isolation can follow: into the weights, through a reference that nobody knows of."""

    def __init__(self):
        super().__init__()
        weight = self.net[0].weight
        self.leak = lambda: weight.data.add_(1e-3)

    def training_step(self, batch, batch_idx):
        self.leak()
        return self.loss(batch)


def test_verify_switches_off_what_leaves_a_trace():
    confusion = GradientConfusionCallback(verify=True, engine="loop", every_n_train_steps=1)
    refused("the first measurement changed parameters; it measures nothing more", confusion, Leaks())


def test_verify_says_nothing_of_what_leaves_none():
    confusion = GradientConfusionCallback(verify=True, every_n_train_steps=3, source="fresh")
    _, _, rows = fit(confusion, Module())
    assert steps(rows) == [0, 2, 5, 8, 11]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("parameters", lambda trainer, module: module.net[0].weight.data.mul_(2)),
        ("buffers", lambda trainer, module: module.net[1].running_mean.add_(1)),
        ("gradients", lambda trainer, module: module.net[0].weight.grad.add_(1)),
        ("optimizer state", lambda trainer, module: trainer.optimizers[0].param_groups[0].update(lr=7.0)),
        ("random states", lambda trainer, module: torch.rand(1)),
    ],
)
def test_digests_see_each_kind_of_change(kind, change):
    module = Module()
    trainer, _, _ = fit([], module, max_steps=1)
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    before = digests(trainer, module)
    assert digests(trainer, module) == before
    change(trainer, module)
    after = digests(trainer, module)
    assert [name for name in before if before[name] != after[name]] == [kind]
