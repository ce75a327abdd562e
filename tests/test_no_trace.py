"""A run with the callback is bitwise the run without it."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities import CombinedLoader
from runs import CLASSES, FEATURES, Data, Module, Scenario, loader, run
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, Subset
from torchmetrics import AUROC, Accuracy, MetricCollection

from lightning_gradconf import GradientConfusionCallback

# ---- modules, each with something that a measurement could disturb ---------------------------------------------------


class WithMetrics(Module):
    def __init__(self) -> None:
        super().__init__()
        task = {"task": "multiclass", "num_classes": CLASSES}
        self.accuracy, self.auroc = Accuracy(**task), AUROC(**task)
        self.both = MetricCollection({"a": Accuracy(**task), "b": Accuracy(**task, average="macro")}, prefix="both/")
        self.unregistered = [Accuracy(**task)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        for metric in (self.accuracy, self.auroc, self.both, self.unregistered[0]):
            metric(logits.detach(), y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("auroc", self.auroc, on_step=False, on_epoch=True)
        self.log_dict(self.both)
        return {"loss": F.cross_entropy(logits, y), "logits": logits.detach()}


class Meter:
    def __init__(self) -> None:
        self.total, self.history = 0.0, []


class Stateful(Module):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.outputs, self.table, self.recent, self.labels = 0, [], {"nested": [0]}, deque(maxlen=3), set()
        self.array, self.running, self.totals = np.zeros(3), torch.zeros(3), {"n": torch.zeros(1)}
        self.meter = Meter()
        self.generators = [torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)]
        self.teacher = nn.Parameter(torch.ones(FEATURES), requires_grad=False)
        self.unregistered = [nn.BatchNorm1d(FEATURES)]
        self.register_buffer("ema", torch.zeros(FEATURES))
        self.register_buffer("replaced", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.count += 1
        self.new_attribute = self.count
        self.outputs.append(x.detach().mean())
        self.table["nested"][0] += 1
        self.table[self.count] = "seen"
        self.recent.append(self.count)
        self.labels.add(self.count)
        self.array += 1
        self.running += x.mean().detach()
        self.totals["n"] += len(x)
        self.meter.total += len(x)
        self.meter.history.append(len(x))
        noise = torch.rand((), generator=self.generators[0]) + self.generators[1].random() + self.generators[2].random()
        with torch.no_grad():
            self.teacher.mul_(0.9).add_(0.1 * x.mean(0))
            self.ema.lerp_(x.mean(0), 0.1)
            self.unregistered[0](x if len(x) > 1 else x.repeat(2, 1))
        self.replaced = self.replaced + 1
        return F.cross_entropy(self.net(x * self.teacher + 0.1 * noise), y)


class LogsDirectly(Module):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.logger.log_metrics({"direct": float(loss.detach()) if batch_idx else 0.0}, step=self.global_step)
        if self.global_step == 7:
            self.trainer.should_stop = True
        return loss


class SkipsOddBatches(Module):
    def training_step(self, batch, batch_idx):
        return self.loss(batch) if batch_idx % 2 == 0 else None


class OneArgument(Module):
    def training_step(self, batch):
        return self.loss(batch)


class LBFGS(Module):
    def make_net(self):
        return nn.Linear(FEATURES, CLASSES)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Plateau(Module):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        config = {"scheduler": scheduler, "interval": "step", "monitor": "train_loss_step", "strict": True}
        return {"optimizer": optimizer, "lr_scheduler": config}


class TwoLoaders(Module):
    def loss(self, batch):
        losses = [super(TwoLoaders, self).loss(part) for part in batch.values() if part is not None]
        return sum(losses) / len(losses)


class TransferHooks(Module):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.randn(1), batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + float(np.random.rand()), batch[1]]

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 4 else None


class PreparesTheStep(Module):
    def on_train_batch_start(self, batch, batch_idx):
        self.alpha = torch.rand(()) + batch[0].mean()
        self.optimizers().param_groups[0]["lr"] *= 0.9

    def training_step(self, batch, batch_idx):
        alpha, self.alpha = self.alpha, self.alpha + 1
        return self.loss(batch) * alpha


class WritesToTheBatch(Module):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        return self.loss(batch)


class ReadsGradients(Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms, self.called = [], []
        self.net[0].register_forward_hook(lambda *_: self.called.append("forward"))
        self.net[2].register_full_backward_hook(lambda *_: self.called.append("backward"))
        for p in self.parameters():
            p.register_hook(lambda grad: self.norms.append(float(grad.norm())))
            p.register_post_accumulate_grad_hook(lambda p: self.norms.append(float(p.grad.norm())))

    def on_train_batch_start(self, batch, batch_idx):
        self.norms.append([None if p.grad is None else float(p.grad.norm()) for p in self.parameters()])


class Recurrent(Module):
    def make_net(self):
        return nn.ModuleDict(
            {"rnn": nn.LSTM(2, 5, dropout=0.2, num_layers=2, batch_first=True), "head": nn.Linear(5, 3)}
        )

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net["head"](self.net["rnn"](x.unflatten(1, (3, 2)))[0][:, -1]), y)


class TiedAndNormalised(Module):
    def make_net(self):
        net = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, FEATURES)),
            nn.Linear(FEATURES, FEATURES),
            nn.Tanh(),
            nn.Linear(FEATURES, FEATURES),
            nn.Linear(FEATURES, CLASSES),
        )
        net[4].weight = net[2].weight
        return net


class Checkpointed(Module):
    use_reentrant = False

    def loss(self, batch):
        x, y = batch
        h = checkpoint(self.net[1:4], self.net[0](x), use_reentrant=self.use_reentrant)
        return F.cross_entropy(self.net[4](h), y)


class CheckpointedWithReentry(Checkpointed):
    use_reentrant = True


class Compiled(Module):
    def make_net(self):
        return torch.compile(super().make_net(), backend="aot_eager")


class Stream(IterableDataset):
    def __iter__(self):
        data = Data(augment=True)
        return (data[i] for i in torch.randperm(len(data)).tolist())


class Gan(Module):
    """Manual optimisation with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(FEATURES, 1)
        self.net = nn.Linear(2, FEATURES)

    def generator_loss(self, batch):
        return -self.critic(self.net(torch.randn(len(batch[0]), 2))).mean()

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        loss = self.generator_loss(batch)
        self.log("generator", loss, on_epoch=True)
        self.manual_backward(loss)
        self.clip_gradients(first, 0.5, "norm")
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        loss = self.critic(self.net(torch.randn(len(batch[0]), 2)).detach()).mean() - self.critic(batch[0]).mean()
        self.log("critic", loss, on_epoch=True)
        self.manual_backward(loss)
        second.step()
        second.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net, self.critic)]


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self):
        return loader(shuffle=False)


# ---- ways to call fit ------------------------------------------------------------------------------------------------


def twice(trainer, module, data):
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data)


def resumed(trainer, module, data):
    trainer.fit(module, data)
    trainer.save_checkpoint("middle.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data, ckpt_path="middle.ckpt", weights_only=False)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def batch_sampler() -> Any:
    return loader(batch_size=1, shuffle=False, batch_sampler=BatchSampler(RandomSampler(range(24)), 4, True))


def combined(mode: str) -> Any:
    return lambda: CombinedLoader({"a": loader(), "b": loader(dataset=Subset(Data(), range(12)))}, mode)


CURRENT = ("current",)
SCENARIOS: dict[str, Scenario] = {
    "batchnorm, dropout, AdamW, augmentation": Scenario(data=lambda: loader(dataset=Data(augment=True))),
    "torchmetrics logged as objects": Scenario(WithMetrics),
    "state in Python": Scenario(Stateful),
    "logs directly and stops itself": Scenario(LogsDirectly),
    "None on odd batches": Scenario(SkipsOddBatches),
    "training_step of one argument": Scenario(OneArgument),
    "LBFGS": Scenario(LBFGS),
    "plateau scheduler on a step metric": Scenario(Plateau),
    "accumulation, clipping, uneven window": Scenario(
        trainer={"accumulate_grad_batches": 4, "gradient_clip_val": 0.1, "log_every_n_steps": 1}
    ),
    "accumulation scheduler": Scenario(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})]),
    "SWA with BatchNorm": Scenario(
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], trainer={"max_epochs": 3}
    ),
    "EMA of weights": Scenario(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    **{f"precision {p}": Scenario(trainer={"precision": p}) for p in ("bf16-mixed", "bf16-true", "64-true")},
    "combined loaders, max_size": Scenario(TwoLoaders, combined("max_size"), sources=CURRENT),
    "combined loaders, max_size_cycle": Scenario(TwoLoaders, combined("max_size_cycle"), sources=CURRENT),
    "iterable dataset": Scenario(data=lambda: loader(dataset=Stream(), shuffle=False), sources=CURRENT),
    "loader with its own generator": Scenario(data=lambda: loader(generator=generator())),
    "batch sampler": Scenario(data=batch_sampler),
    "a worker": Scenario(data=lambda: loader(dataset=Data(augment=True), num_workers=1)),
    "persistent workers": Scenario(
        data=lambda: loader(dataset=Data(augment=True), num_workers=1, persistent_workers=True)
    ),
    "transfer hooks, -1 on a batch": Scenario(TransferHooks),
    "state and learning rate set before the step": Scenario(PreparesTheStep),
    "batch written to": Scenario(WritesToTheBatch),
    "gradients read, hooks everywhere": Scenario(ReadsGradients, trainer={"accumulate_grad_batches": 2}),
    "LSTM": Scenario(Recurrent),
    "tied and normalised weights": Scenario(TiedAndNormalised),
    "activation checkpointing": Scenario(Checkpointed),
    "activation checkpointing with reentry": Scenario(CheckpointedWithReentry),
    "torch.compile of a submodule": Scenario(Compiled),
    "manual optimisation": Scenario(
        Gan, confusion={"loss_fn": lambda module, batch: module.generator_loss(batch), "parameters": "net.*"}
    ),
    "validation in the middle": Scenario(Validated, trainer={"val_check_interval": 0.5}),
    "overfit_batches": Scenario(data=lambda: loader(shuffle=False), trainer={"overfit_batches": 2}),
    "limit_train_batches": Scenario(trainer={"limit_train_batches": 3}),
    "max_steps": Scenario(trainer={"max_epochs": -1, "max_steps": 5}),
    "fast_dev_run": Scenario(trainer={"fast_dev_run": 2}),
    "detect_anomaly": Scenario(trainer={"detect_anomaly": True}),
    "fit twice": Scenario(fit=twice),
    "resumed": Scenario(fit=resumed),
    "checkpoints and early stopping of others": Scenario(
        Validated,
        callbacks=lambda: [
            EarlyStopping("val_loss", patience=1),
            ModelCheckpoint("ckpt", monitor="train_loss", every_n_train_steps=2, save_top_k=2),
            LearningRateMonitor(),
        ],
        trainer={"enable_checkpointing": True, "max_epochs": 3},
    ),
}

# Every way of taking units meets every scenario, and so does every engine.
VARIANTS: dict[str, dict[str, Any]] = {
    "current": {},
    "current pairs, loop": {"unit_size": 2, "engine": "loop", "every_n_train_steps": 1},
    "current batches": {"unit_size": "batch", "num_units": 2, "every_n_train_steps": 3},
    "current epochs": {"every_n_epochs": 1, "unit_size": 2},
    "fresh": {"source": "fresh", "num_units": 3, "every_n_train_steps": 2},
    "fresh epochs of pairs": {"source": "fresh", "unit_size": 2, "num_units": 4, "every_n_epochs": 1},
    "fixed pairs": {"source": "fixed", "unit_size": 2, "num_units": 3, "per_layer": True},
}


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    """Each scenario without the callback, trained once for all variants, and once more to see that it repeats."""
    cache: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in cache:
            tmp = tmp_path_factory.mktemp("plain")
            first, again = run(SCENARIOS[name], tmp / "first"), run(SCENARIOS[name], tmp / "again")
            assert_same(first, again)
            cache[name] = first
        return cache[name]

    return get


def assert_same(plain: dict[str, Any], other: dict[str, Any]) -> None:
    assert plain.keys() == other.keys()
    different = [where for key in plain for where in differences(plain[key], other[key], key)]
    assert not different, "\n".join(different[:5])


def differences(a: Any, b: Any, where: str) -> list[str]:
    """Where two fingerprints differ, in words."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a!r:.300} != {b!r:.300}"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_run_is_bitwise_the_run_without(name: str, variant: str, plain_runs: Any, tmp_path: Path) -> None:
    scenario, options = SCENARIOS[name], VARIANTS[variant]
    if options.get("source", "current") not in scenario.sources:
        pytest.skip("this source needs one DataLoader over a dataset with indices")
    confusion = GradientConfusionCallback(**(options | scenario.confusion))
    measured = run(scenario, tmp_path / "measured", [confusion])
    assert_same(plain_runs(name), measured)
    assert confusion.last_gram is not None, "nothing was measured"
    assert confusion.last_gram.isfinite().all()
