"""Measuring on the training step's own backward pass: the same numbers, and when it is refused."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision
from runs import CLASSES, FEATURES, QUIET, Module, Rows, Scenario, loader, run
from test_no_trace import SCENARIOS, assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.gram.ghost import ride
from lightning_gradconf.gram.ghost.accumulator import Collector

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.skipif(not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="this torch hides its hooks"),
]


class Plain(Module):
    def make_net(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class Convolutional(Module):
    def make_net(self):
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
            nn.LayerNorm(24), nn.Linear(24, CLASSES),
        )  # fmt: skip


class Tied(Module):
    def make_net(self):
        net = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES), nn.Linear(6, 3))
        net[2].weight = net[0].weight
        return net


class Recurrent(Module):
    def make_net(self):
        return nn.ModuleDict({"rnn": nn.LSTM(2, 5, num_layers=2, batch_first=True), "head": nn.Linear(5, 3)})

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net["head"](self.net["rnn"](x.unflatten(1, (3, 2)))[0][:, -1]), y)


class Positions(Module):
    def make_net(self):
        net = nn.ModuleDict({"table": nn.Embedding(5, 2), "head": nn.Linear(FEATURES, CLASSES)})
        net.register_parameter("start", nn.Parameter(torch.randn(4, 2)))
        return net

    def loss(self, batch):
        x = batch[0].unflatten(1, (3, 2)) + self.net["table"](torch.arange(3)) + self.net.start[:3]
        return F.cross_entropy(self.net["head"](x.tanh().flatten(1)), batch[1])


class SumOfLosses(Plain):
    def loss(self, batch):
        return 0.5 * F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(FEATURES, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, loss in ((second, self.other(batch[0]).square().mean()), (first, self.loss(batch))):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net, self.other)]


class Watch(pl.Callback):
    """The Grams of all measurements, and how they were made."""

    def __init__(self, confusion: GradientConfusionCallback, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grams: dict[int, torch.Tensor] = {}
        self.passes: list[int] = []
        log, measure = confusion._log, confusion._measure

        def _log(trainer, module, measured):
            log(trainer, module, measured)
            self.grams[measured.step] = confusion.last_gram

        def _measure(trainer, *rest):
            self.passes.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
            measure(trainer, *rest)

        monkeypatch.setattr(confusion, "_log", _log)
        monkeypatch.setattr(confusion, "_measure", _measure)


@pytest.fixture
def watched(monkeypatch):
    """Train with the callback; the Grams by step, and the steps that took a pass of their own."""

    def train(module: Any, reuse: bool, data: Any = None, plugins: Any = None, **options: Any) -> Watch:
        names = ("every_n_train_steps", "num_units", "unit_size", "loss_fn", "parameters", "dropout")
        ours = {"every_n_train_steps": 2, "num_units": 3} | {k: options.pop(k) for k in names if k in options}
        confusion = GradientConfusionCallback(reuse_backward=reuse, **ours)
        watch = Watch(confusion, monkeypatch)
        pl.seed_everything(3, verbose=False)
        options = {"max_epochs": 2, "logger": Rows(), "enable_checkpointing": False} | options
        trainer = pl.Trainer(callbacks=[confusion], plugins=plugins, **(QUIET | options))
        trainer.fit(module(), data() if data else loader())
        return watch

    return train


def scaled() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


SAME = {
    "linear": (Plain, {}, 1e-5),
    "float64": (Plain, {"precision": "64-true"}, 1e-12),
    "convolutions and norms": (Convolutional, {}, 1e-5),
    "tied weights": (Tied, {}, 1e-5),
    "LSTM": (Recurrent, {}, 1e-5),
    "positions": (Positions, {}, 1e-5),
    "sum of losses": (SumOfLosses, {}, 1e-5),
    "all units of the batch": (Plain, {"num_units": 32}, 1e-5),
    "units of two samples": (Plain, {"unit_size": 2}, 1e-5),
    "some parameters": (Plain, {"parameters": "net.2.*"}, 1e-5),
    "accumulation and clipping": (Plain, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, 1e-5),
    "bf16-mixed": (Plain, {"precision": "bf16-mixed"}, 5e-2),
    "16-mixed with a scaler": (Plain, {"plugins": scaled}, 1e-2),
    "a batch with a remainder": (Plain, {"data": lambda: loader(batch_size=5)}, 1e-5),
}


@pytest.mark.parametrize("name", SAME)
def test_the_gram_is_that_of_a_pass_of_its_own(name, watched):
    module, options, tolerance = SAME[name]
    plugins = options.get("plugins")
    options = {k: v for k, v in options.items() if k != "plugins"}
    own, riding = (watched(module, reuse, plugins=plugins and plugins(), **options) for reuse in (False, True))
    assert own.grams.keys() == riding.grams.keys()
    assert len(riding.passes) < len(own.passes) == len(own.grams)
    for step, gram in own.grams.items():
        scale = gram.diagonal().sqrt()
        assert float(((riding.grams[step] - gram) / scale.outer(scale)).abs().max()) < tolerance
    assert riding.passes[0] == 0


def test_manual_optimisation(watched):
    options = {"loss_fn": lambda module, batch: module.loss(batch), "parameters": "net.*"}
    own, riding = (watched(Manual, reuse, **options) for reuse in (False, True))
    assert riding.passes == [0] and own.grams.keys() == riding.grams.keys() == {0, 1, 3, 5, 7, 9, 11}
    for step, gram in own.grams.items():
        torch.testing.assert_close(riding.grams[step], gram, rtol=1e-4, atol=1e-6)


# ---- what is different in a training step ----------------------------------------------------------------------------


class ByHand(pl.Callback):
    """The Gram of the samples in the graph of the training step itself."""

    def __init__(self) -> None:
        self.grams: dict[int, torch.Tensor] = {}

    def on_before_backward(self, trainer, module, loss):
        parameters = list(module.parameters())
        rows = [torch.autograd.grad(single, parameters, retain_graph=True) for single in module.losses[:3]]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        self.grams[trainer.fit_loop.epoch_loop._batches_that_stepped] = flat @ flat.T


class Dropout(Module):
    def make_net(self):
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        )

    def loss(self, batch):
        self.losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return self.losses.mean()

    def on_train_batch_end(self, *_):
        self.losses = None


def test_dropout_masks_are_those_of_the_step(monkeypatch):
    confusion, by_hand = GradientConfusionCallback(reuse_backward=True, every_n_train_steps=2, num_units=3), ByHand()
    watch = Watch(confusion, monkeypatch)
    pl.Trainer(callbacks=[by_hand, confusion], max_epochs=1, logger=Rows(), enable_checkpointing=False, **QUIET).fit(
        Dropout(), loader()
    )
    assert watch.passes == [0] and set(watch.grams) == {0, 1, 3, 5}
    for step in (1, 3, 5):
        torch.testing.assert_close(watch.grams[step], by_hand.grams[step], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(watch.grams[0], by_hand.grams[0])  # its own pass has no dropout


class ScalesInBackward(Plain):
    def backward(self, loss, *args, **kwargs):
        (3 * loss).backward(retain_graph=True)
        loss.backward()


def test_a_backward_of_the_users(watched):
    own, riding = (watched(ScalesInBackward, reuse) for reuse in (False, True))
    assert riding.passes == [0]
    for step, gram in own.grams.items():
        torch.testing.assert_close(riding.grams[step], gram, rtol=1e-4, atol=1e-6)


class LBFGS(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def test_of_the_calls_of_a_closure_only_the_first_counts(watched):
    own, riding = (watched(LBFGS, reuse) for reuse in (False, True))
    assert riding.passes == [0]
    for step, gram in own.grams.items():
        torch.testing.assert_close(riding.grams[step], gram, rtol=1e-3, atol=1e-5)


# ---- when it is refused ----------------------------------------------------------------------------------------------


class Checkpointed(Plain):
    reentrant, after = False, -1

    def loss(self, batch):
        h = self.net[0](batch[0])
        if self.trainer.global_step > self.after:
            h = checkpoint(self.net[1], h, use_reentrant=self.reentrant)
        else:
            h = self.net[1](h)
        return F.cross_entropy(self.net[2](h), batch[1])


class CheckpointedWithReentry(Checkpointed):
    reentrant = True


class CheckpointedLater(Checkpointed):
    after = 5


class Compiled(Plain):
    def make_net(self):
        return torch.compile(super().make_net(), backend="aot_eager")


class Masked(Plain):
    def loss(self, batch):
        weights = (batch[0][:, 0] > -10).float()
        return (F.cross_entropy(self.net(batch[0]), batch[1], reduction="none") * weights).sum() / weights.sum()


class Transformed(Plain):
    def make_net(self):
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)))


REFUSED = {
    "BatchNorm": (Module, {}, "NativeBatchNormBackward0 in training"),
    "activation checkpoints": (Checkpointed, {}, "."),
    "activation checkpoints with reentry": (CheckpointedWithReentry, {}, "."),
    "compiled": (Compiled, {}, "."),
    "a mask": (Masked, {}, "the data may weigh units"),
    "another loss": (Plain, {"loss_fn": lambda module, batch: module.loss(batch)}, "with loss_fn="),
    "a transformed parameter": (Transformed, {}, "is transformed before it meets the data"),
    "a batch that units do not fill": (
        Plain,
        {"unit_size": 2, "data": lambda: loader(batch_size=5)},
        "is no whole number of units",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_it_takes_passes_of_its_own_and_says_so_once(name, watched, caplog):
    module, options, words = REFUSED[name]
    options = {"num_units": 2} | options
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        own, riding = (watched(module, reuse, **options) for reuse in (False, True))
    said = [record.message for record in caplog.records if "cannot ride" in record.message]
    assert len(said) == 1 and (words == "." or words in said[0])
    assert riding.passes == own.passes
    assert all(torch.equal(riding.grams[step], gram) for step, gram in own.grams.items())


def test_what_changes_on_the_way_is_measured_at_the_next_batch(watched):
    riding = watched(CheckpointedLater, True)
    assert riding.passes == [0, 8, 9, 11]  # step 7 meets the first checkpoint


class Ignores(Plain):
    """From the fourth batch on, some targets of a sample are ignored."""

    def loss(self, batch):
        x, y = batch
        y = y[:, None].repeat(1, 2)
        if self.trainer.global_step > 2:
            y[0, 0] = -100
        return F.cross_entropy(self.net(x).unsqueeze(2) + torch.zeros(2), y)


def test_ignored_targets_that_come_later(watched):
    riding = watched(Ignores, True, max_epochs=1)
    assert list(riding.grams) == [0, 1, 4, 5] and riding.passes == [0, 4, 5]


# ---- no trace --------------------------------------------------------------------------------------------------------


NEVER_RIDDEN = {
    "torchmetrics logged as objects",  # they branch on values of the network
    "state in Python",  # noise, as in the next ones: no two passes are the same
    "reads the Trainer, writes to it",
    "state and learning rate set before the step",
    "tensors written to before the step",  # other parameters require grad at every step
    "gradients read, hooks everywhere",  # a module's backward hooks are a function that may do anything
    "tied and normalised weights",
    "legacy weight_norm",
    "activation checkpointing",
    "activation checkpointing with reentry",
    "torch.compile of a submodule",
    "torch.compile of a function",
    "torch.compile of the whole module",
    "manual optimisation, generator",
    "manual optimisation, discriminator",
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_run_is_bitwise_the_run_without(name, tmp_path, monkeypatch):
    """As in test_no_trace, with a module that can be ridden on in most of the scenarios."""

    def make_net(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))

    monkeypatch.setattr(Module, "make_net", make_net)
    scenario = SCENARIOS[name]
    confusion = GradientConfusionCallback(reuse_backward=True, every_n_train_steps=1, num_units=3, **scenario.confusion)
    watch = Watch(confusion, monkeypatch)
    assert_same(run(scenario, tmp_path / "plain"), run(scenario, tmp_path / "measured", [confusion]))
    assert len(watch.grams) > 1
    assert (len(watch.passes) == len(watch.grams)) == (name in NEVER_RIDDEN)


class Failing(Plain):
    def training_step(self, batch, batch_idx):
        h = self.net[1](self.net[0](batch[0]))
        if self.global_step == 3:
            h.register_hook(self.fail)
        return F.cross_entropy(self.net[2](h), batch[1])

    error: type[BaseException] = ArithmeticError

    def fail(self, gradient):
        raise self.error


class Interrupted(Failing):
    error = KeyboardInterrupt


@pytest.mark.parametrize("module", [Failing, Interrupted])
def test_a_backward_pass_that_breaks_off(module, tmp_path):
    scenario = Scenario(module, raises=BaseException)
    confusion = GradientConfusionCallback(reuse_backward=True, every_n_train_steps=1)
    plain, measured = run(scenario, tmp_path / "plain"), run(scenario, tmp_path / "measured", [confusion])
    assert_same(plain, measured)
    assert confusion.last_step == 2
    assert confusion._rider is None or confusion._rider._ride is None


def test_an_error_of_ours_reaches_nobody(tmp_path, monkeypatch):
    class Broken(Collector):
        def _receive(self, *_):
            raise MemoryError("no memory")

    scenario = Scenario(Plain)
    plain = run(scenario, tmp_path / "plain")
    confusion = GradientConfusionCallback(reuse_backward=True, every_n_train_steps=1)
    watch = Watch(confusion, monkeypatch)
    monkeypatch.setattr(ride, "Collector", Broken)
    assert_same(plain, run(scenario, tmp_path / "measured", [confusion]))
    assert confusion.last_gram is not None and 2 in watch.passes


class Remembers(Plain):
    activations: list[Any]

    def loss(self, batch):
        h = self.net[1](self.net[0](batch[0]))
        self.activation = weakref.ref(h)
        return F.cross_entropy(self.net[2](h), batch[1])

    def on_after_backward(self):
        assert self.activation() is None, "the graph is kept"


def test_the_graph_is_not_kept(watched):
    assert len(watched(Remembers, True, every_n_train_steps=1).passes) == 1
