"""A run with the callback is bitwise the run without it."""

from __future__ import annotations

import copy
import math
import random
import re
import warnings
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import CombinedLoader
from runs import BATCH, CLASSES, FEATURES, PREFIX, Data, Meter, Module, Scenario, frozen, loader, run
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler, Subset
from torchmetrics import AUROC, Accuracy, MeanMetric, MetricCollection

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.statistics import pairwise_cosines

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


class Stateful(Module):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.outputs, self.table, self.recent, self.labels = 0, [], {"nested": [0]}, deque(maxlen=3), set()
        self.array, self.running, self.totals = np.zeros(3), torch.zeros(3), {"n": torch.zeros(1)}
        self.meter, self.space, self.counter = Meter(), SimpleNamespace(n=0, seen=[]), Counter(a=1)
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
        self.labels.add((self.count, len(x)))
        self.array += 1
        self.running += x.mean().detach()
        self.totals["n"] += len(x)
        self.meter.update(len(x))
        self.space.n += 1
        self.space.seen.append(len(x))
        self.counter["a"] += 1
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


class Teacher(Module):
    """A moving average of the weights, reached in ways that no copy can be put in the place of."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [copy.deepcopy(self.net)]  # in a list, so that optimizers and checkpoints do not see it
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.pairs = [list(part.parameters()) for part in (self.teacher, self.net)]
        self.offset = torch.zeros((), requires_grad=True)
        self.offset.grad = torch.zeros(())

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for teacher, student in zip(*self.pairs, strict=True):
                teacher.lerp_(student, 0.1)
            for teacher, student in zip(self.hidden[0].parameters(), self.net.parameters(), strict=True):
                teacher.lerp_(student, 0.1)
        x, y = batch
        self.offset.grad += 1
        return F.cross_entropy(self.net(x) + 0.1 * self.teacher(x) + 0.1 * self.hidden[0](x) + self.offset, y)


class ClampsWeights(Module):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net[0].weight.mul_(0.99).clamp_(-0.3, 0.3)
        return self.loss(batch)


class ReadsTheTrainer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.notes = []

    def training_step(self, batch, batch_idx):
        trainer = self.trainer
        trainer.noted = getattr(trainer, "noted", 0) + 1
        trainer.fit_loop.noted = getattr(trainer.fit_loop, "noted", 0) + 1
        trainer.fit_loop.epoch_loop.max_steps = max(100, trainer.max_steps) + 1
        checkpoint = trainer.checkpoint_callback
        checkpoint.noted = getattr(checkpoint, "noted", 0) + 1
        self.notes += [trainer.fit_loop.noted, trainer.max_steps, checkpoint.noted]
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(PREFIX)}
        rate = self.optimizers().param_groups[0]["lr"]
        self.notes.append((trainer.global_step, trainer.is_last_batch, trainer.current_epoch, rate, metrics))
        self.notes.append(trainer.noted)
        return super().training_step(batch, batch_idx) * (1 + 0.01 * trainer.noted)


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
        if self.global_step:
            self.lr_schedulers().step()

    def training_step(self, batch, batch_idx):
        alpha, self.alpha = self.alpha, self.alpha + 1
        return self.loss(batch) * alpha

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


class WritesBeforeTheStep(Module):
    """Its hooks write to the module itself, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("steps", torch.zeros(()))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.mean.lerp_(batch[0].mean(0), 0.1)
        return [batch[0] - self.mean, batch[1]]

    def on_train_batch_start(self, batch, batch_idx):
        self.steps += 1
        self.net[0].weight.data.clamp_(-0.3, 0.3)
        self.net[0].bias.requires_grad_(batch_idx % 2 == 0)
        for p in self.parameters():
            if p.grad is not None:
                p.grad *= 0.5
                p.grad = p.grad - 0.1


class WritesToTheBatch(Module):
    def on_train_batch_start(self, batch, batch_idx):
        batch[0].add_(0.1)

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


class LegacyNormalised(Module):
    def make_net(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            net = nn.Sequential(nn.utils.weight_norm(nn.Linear(FEATURES, 8)), nn.Tanh(), nn.Linear(8, CLASSES))
        return net


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


class CompiledFunction(Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = torch.compile(self.loss, backend="aot_eager")


class Quiet(Module):
    """Logs nothing: this Lightning cannot compile `log`."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Tuned(Module):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, BATCH

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Breaks(Module):
    def on_after_backward(self):
        if self.global_step == 8:
            raise ArithmeticError("of the user")


class Thawed(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


class Thaw(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)


class RandomData(Data):
    """Data with random generators and counters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.draws, self.rng = 0, np.random.default_rng(2)
        self.transforms = [Composed(Jitter())]

    def __getitem__(self, i):
        self.draws += 1
        x, y = super().__getitem__(i)
        return self.transforms[0](x + self.rng.random(dtype=np.float32)), y


class Composed:
    """A transform of a library, around one of the user's; it too draws from a generator of its own."""

    __module__ = "torch.nn"

    def __init__(self, inner) -> None:
        self.inner, self.rng = inner, np.random.RandomState(3)

    def __call__(self, x):
        return self.inner(x) * self.rng.randint(1, 3)


class Jitter:
    def __init__(self) -> None:
        self.generator, self.calls = torch.Generator().manual_seed(4), 0

    def __call__(self, x):
        self.calls += 1
        return x + torch.rand((), generator=self.generator)


class Collate:
    def __init__(self) -> None:
        self.rng, self.calls = random.Random(6), 0

    def __call__(self, samples):
        self.calls += 1
        return torch.stack([x for x, _ in samples]) + self.rng.random(), torch.stack([y for _, y in samples])


class OfGraphs(Module):
    """Nodes in a row, with the graph that each belongs to."""

    def loss(self, batch):
        x, of, y = batch
        return F.cross_entropy(torch.zeros(len(y), CLASSES).index_add(0, of, self.net(x)), y)


def graphs(samples):
    sizes = [2 + int(5 * random.random()) for _ in samples]
    x = torch.cat([x.repeat(size, 1) + torch.randn(size, 1) for size, (x, _) in zip(sizes, samples, strict=True)])
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return x, of, torch.stack([y for _, y in samples])


class KeepsNoPadding(Module):
    """Fails on a sample that keeps the padding of its batch."""

    def loss(self, batch):
        x, lengths, y = batch
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return F.cross_entropy(self.net((x * mask[..., None]).sum(1)), y)


def padded(samples):
    lengths = [1 + int(x[0] * 100) % 5 for x, _ in samples]
    rows = [x.repeat(length, 1) for length, (x, _) in zip(lengths, samples, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, True), torch.tensor(lengths), torch.stack([y for _, y in samples])


class Transforms(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.rng = 0, np.random.default_rng(8)

    def train_dataloader(self):
        return loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls += 1
        return [batch[0] + float(self.rng.random()), batch[1]]


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
        self.seen = MeanMetric()

    def generator_loss(self, batch):
        return -self.critic(self.net(torch.randn(len(batch[0]), 2))).mean()

    def critic_loss(self, batch):
        fake = self.net(torch.randn(len(batch[0]), 2)).detach()
        return self.critic(fake).mean() - self.critic(batch[0]).mean()

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
        loss = self.critic_loss(batch)
        self.seen(loss.detach())
        self.log("seen", self.seen, on_step=True, on_epoch=True)
        self.log("critic", loss, on_epoch=True)
        self.manual_backward(loss)
        second.step()
        second.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net, self.critic)]


class GanUntoggled(Gan):
    """The order of the example: the critic's step first, by the second optimizer; backward passes of both kinds."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        second.zero_grad()
        loss = self.critic_loss(batch)
        loss.backward()
        second.step()
        if batch_idx % 2 == 0:
            first.zero_grad()
            self.manual_backward(self.generator_loss(batch))
            first.step()
        self.log("critic", loss)


class WithClosures(Gan):
    """Steps that take a closure, under `toggle_model`."""

    def training_step(self, batch, batch_idx):
        for optimizer, loss_of in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):

            def closure(optimizer=optimizer, loss_of=loss_of):
                loss = loss_of(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            with optimizer.toggle_model():
                self.log("loss", optimizer.step(closure=closure))


class Manual(Module):
    """One optimizer, which accumulates; a scheduler stepped by hand, gradients clipped and changed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.norms = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch) / 2
        self.manual_backward(loss)
        for p in optimizer.param_groups[0]["params"]:
            if p.grad is not None:
                p.grad.mul_(0.9)
        if batch_idx % 2:
            self.norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.5)))
            self.clip_gradients(optimizer, 0.4, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.99
        self.log("train_loss", loss)
        return {"seen": loss.detach()}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class HeldOptimizers(Module):
    """Optimizers, a scheduler and a scaler that the module keeps by itself, and never shows to Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = torch.optim.SGD(self.net[0].parameters(), 0.1, momentum=0.9)
        self.second = torch.optim.Adam(self.net[4].parameters(), 0.01)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.first, 0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def training_step(self, batch, batch_idx):
        self.first.zero_grad()
        self.second.zero_grad()
        self.scaler.scale(self.loss(batch)).backward()
        self.scaler.unscale_(self.first)
        self.scaler.step(self.first)
        self.scaler.step(self.second)
        self.scaler.update()
        self.scheduler.step()

    def configure_optimizers(self):
        return None


class CustomOptimizer(Manual):
    """Sharpness-aware minimisation: two backward passes, weights changed by a method of the optimizer in between."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.climb()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self):
        return Sharp(self.parameters(), 0.05)


class Sharp(torch.optim.SGD):
    @torch.no_grad()
    def climb(self):
        for p in self.param_groups[0]["params"]:
            p.add_(0.01)
            self.state[p]["climbed"] = self.state[p].get("climbed", 0) + 1


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


def whole_module_compiled(trainer, module, data):
    trainer.fit(torch.compile(module, backend="aot_eager"), data)


def learning_rate_found(trainer, module, data):
    Tuner(trainer).lr_find(module, data, num_training=5, update_attr=True)
    trainer.fit(module, data)


def batch_size_found(trainer, module, data):
    Tuner(trainer).scale_batch_size(module, init_val=2, max_trials=2, steps_per_trial=2)
    trainer.fit(module)


def loaders_of_the_module(trainer, module, data):
    trainer.fit(module)


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
    "moving averages of the weights": Scenario(Teacher),
    "weights clamped in the step": Scenario(ClampsWeights),
    "reads the Trainer, writes to it": Scenario(
        ReadsTheTrainer, callbacks=lambda: [ModelCheckpoint("ckpt")], trainer={"enable_checkpointing": True}
    ),
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
    "layers unfrozen on the way": Scenario(Thawed, callbacks=lambda: [Thaw()]),
    "precision 16-mixed with a scaler": Scenario(
        plugins=lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))]
    ),
    **{f"precision {p}": Scenario(trainer={"precision": p}) for p in ("bf16-mixed", "bf16-true", "64-true")},
    "combined loaders, max_size": Scenario(TwoLoaders, combined("max_size")),
    "combined loaders, max_size_cycle": Scenario(TwoLoaders, combined("max_size_cycle")),
    "iterable dataset": Scenario(data=lambda: loader(dataset=Stream(), shuffle=False), sources=CURRENT),
    "loader with its own generator": Scenario(data=lambda: loader(generator=generator())),
    "batch sampler": Scenario(data=batch_sampler),
    "data with random generators of their own": Scenario(
        data=lambda: loader(dataset=RandomData(), collate_fn=Collate())
    ),
    "batches of graphs": Scenario(
        OfGraphs, data=lambda: loader(dataset=RandomData(), collate_fn=graphs, num_workers=1)
    ),
    "padding that cannot be kept": Scenario(
        KeepsNoPadding, data=lambda: loader(dataset=RandomData(), collate_fn=padded)
    ),
    "data module with state": Scenario(data=Transforms),
    "loaders made anew each epoch": Scenario(
        Tuned, fit=loaders_of_the_module, trainer={"reload_dataloaders_every_n_epochs": 1}
    ),
    "a worker": Scenario(data=lambda: loader(dataset=Data(augment=True), num_workers=1)),
    "persistent workers": Scenario(
        data=lambda: loader(dataset=Data(augment=True), num_workers=1, persistent_workers=True)
    ),
    "transfer hooks, -1 on a batch": Scenario(TransferHooks),
    "state and learning rate set before the step": Scenario(PreparesTheStep),
    "tensors written to before the step": Scenario(WritesBeforeTheStep, trainer={"accumulate_grad_batches": 2}),
    "batch written to": Scenario(WritesToTheBatch),
    "gradients read, hooks everywhere": Scenario(ReadsGradients, trainer={"accumulate_grad_batches": 2}),
    "LSTM": Scenario(Recurrent),
    "tied and normalised weights": Scenario(TiedAndNormalised),
    "legacy weight_norm": Scenario(LegacyNormalised),
    "activation checkpointing": Scenario(Checkpointed),
    "activation checkpointing with reentry": Scenario(CheckpointedWithReentry),
    "torch.compile of a submodule": Scenario(Compiled),
    "torch.compile of a function": Scenario(CompiledFunction),
    "torch.compile of the whole module": Scenario(Quiet, fit=whole_module_compiled),
    "manual optimisation, toggled": Scenario(Gan),
    "manual optimisation, untoggled": Scenario(GanUntoggled),
    "manual optimisation, closures": Scenario(WithClosures),
    "manual optimisation, accumulation, a scheduler": Scenario(Manual),
    "manual optimisation, optimizers of its own": Scenario(HeldOptimizers),
    "manual optimisation, two passes a step": Scenario(CustomOptimizer),
    "manual optimisation, precision 16-mixed": Scenario(
        Gan,
        plugins=lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))],
    ),
    "manual optimisation, generator": Scenario(
        Gan, confusion={"loss_fn": lambda module, batch: module.generator_loss(batch), "parameters": "net.*"}
    ),
    "manual optimisation, discriminator": Scenario(
        Gan, confusion={"loss_fn": lambda module, batch: module.critic_loss(batch), "parameters": "critic.*"}
    ),
    "validation in the middle": Scenario(Validated, trainer={"val_check_interval": 0.5}),
    "overfit_batches": Scenario(data=lambda: loader(shuffle=False), trainer={"overfit_batches": 2}),
    "limit_train_batches": Scenario(trainer={"limit_train_batches": 3}),
    "max_steps": Scenario(trainer={"max_epochs": -1, "max_steps": 5}),
    "fast_dev_run": Scenario(trainer={"fast_dev_run": 2}),
    "detect_anomaly": Scenario(trainer={"detect_anomaly": True}),
    "fit twice": Scenario(fit=twice),
    "resumed": Scenario(fit=resumed),
    "learning rate finder": Scenario(Tuned, fit=learning_rate_found),
    "batch size finder": Scenario(Tuned, fit=batch_size_found),
    "an exception of the user": Scenario(
        Breaks,
        callbacks=lambda: [OnExceptionCheckpoint(".", "broken")],
        raises=ArithmeticError,
        trainer={"enable_checkpointing": True},
    ),
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
    "fresh": {
        **{"source": "fresh", "num_units": 3, "every_n_train_steps": 2},
        **{"top_pairs": 2, "labels": lambda batch: torch.randint(2, ())},
    },
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


@pytest.mark.filterwarnings("ignore:.*units cannot be cut out of the batches")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_run_is_bitwise_the_run_without(name: str, variant: str, plain_runs: Any, tmp_path: Path) -> None:
    scenario, options = SCENARIOS[name], VARIANTS[variant]
    if options.get("source", "current") not in scenario.sources:
        pytest.skip("this source needs datasets with indices")
    confusion = GradientConfusionCallback(**(options | scenario.confusion))
    measured = run(scenario, tmp_path / "measured", [confusion])
    assert_same(plain_runs(name), measured)
    assert confusion.last_gram is not None, "nothing was measured"
    assert confusion.last_gram.isfinite().all()


@pytest.mark.parametrize("name", ["batchnorm, dropout, AdamW, augmentation", "batch written to", "LSTM"])
@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_each_engine(engine: str, name: str, plain_runs: Any, tmp_path: Path) -> None:
    unit_size = 1 if engine == "ghost" else 2  # BatchNorm mixes units in one pass, unless they are single samples
    confusion = GradientConfusionCallback(engine=engine, every_n_train_steps=1, unit_size=unit_size)
    assert_same(plain_runs(name), run(SCENARIOS[name], tmp_path / "measured", [confusion]))
    assert confusion.last_gram is not None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_of_the_users(num_workers: int, plain_runs: Any, tmp_path: Path) -> None:
    name = "batchnorm, dropout, AdamW, augmentation"
    given = loader(dataset=Data(augment=True), num_workers=num_workers)
    confusion = GradientConfusionCallback(source=given, num_units=6)
    assert_same(plain_runs(name), run(SCENARIOS[name], tmp_path / "measured", [confusion]))
    assert len(confusion.last_gram) == 6


@pytest.mark.parametrize("options", [{"every_n_epochs": 1}, {"every_n_train_steps": 4, "unit_size": 2}], ids=str)
def test_the_loader_of_the_validation_with_workers_that_persist(options: dict[str, Any], tmp_path: Path) -> None:
    shared: list[Any] = []

    class Validates(Validated):
        def val_dataloader(self):
            return shared[-1]

    def module() -> Validates:
        shared.append(loader(dataset=Data(augment=True), shuffle=False, num_workers=1, persistent_workers=True))
        return Validates()

    class OfValidation(GradientConfusionCallback):
        __qualname__ = GradientConfusionCallback.__qualname__

        def on_train_start(self, trainer, pl_module):
            self.source = shared[-1]
            super().on_train_start(trainer, pl_module)

    scenario, confusion = Scenario(module), OfValidation(num_units=6, **options)
    assert_same(run(scenario, tmp_path / "plain"), run(scenario, tmp_path / "measured", [confusion]))
    assert len(confusion.last_gram) == 6


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_cosines_under_mixed_precision_are_close_to_those_in_float32(engine: str, tmp_path: Path) -> None:
    class Smooth(Module):
        def make_net(self):
            return nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES))

    grams = {}
    for precision in ("32-true", "bf16-mixed"):
        confusion = GradientConfusionCallback(engine=engine)
        run(Scenario(Smooth, trainer={"precision": precision, "max_steps": 1}), tmp_path / precision, [confusion])
        grams[precision] = confusion.last_gram
    assert all(gram.dtype == torch.float32 for gram in grams.values())
    full, mixed = (pairwise_cosines(gram) for gram in grams.values())
    assert not torch.equal(full, mixed), "the step was not measured under autocast"
    torch.testing.assert_close(mixed, full, rtol=0, atol=2e-2)


def test_gram_of_half_precision_weights_is_accumulated_in_float32(tmp_path: Path) -> None:
    confusion = GradientConfusionCallback()
    run(Scenario(trainer={"precision": "bf16-true", "max_steps": 1}), tmp_path / "run", [confusion])
    assert confusion.last_gram.dtype == torch.float32


# ---- runs that stop, go on, and depend on what is measured -----------------------------------------------------------


@pytest.mark.parametrize("second", ["without", "with"])
@pytest.mark.parametrize("first", ["without", "with"])
def test_resuming_with_and_without_the_callback(first: str, second: str, tmp_path: Path) -> None:
    def both_parts(first: str, second: str, tmp: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        def fit(trainer, module, data):
            trainer.fit(module, data, ckpt_path=tmp / "first" / "last.ckpt", weights_only=False)

        confusion = {"without": [], "with": [GradientConfusionCallback(every_n_train_steps=1)]}
        return (
            run(Scenario(), tmp / "first", confusion[first]),
            run(Scenario(fit=fit, trainer={"max_epochs": 4}), tmp / "second", confusion[second]),
        )

    plain, other = both_parts("without", "without", tmp_path / "plain"), both_parts(first, second, tmp_path / "other")
    assert plain[1]["progress"][0] == 24
    for a, b in zip(plain, other, strict=True):
        assert_same(a, b)


def test_checkpoints_chosen_by_our_key_are_those_of_the_run_without(tmp_path: Path) -> None:
    def scenario(**options: Any) -> Scenario:
        saving = {"filename": "{step}", "every_n_train_steps": 1, "dirpath": "ckpt"}
        return Scenario(
            callbacks=lambda: [ModelCheckpoint(**saving, **options)], trainer={"enable_checkpointing": True}
        )

    confusion = GradientConfusionCallback(every_n_train_steps=1)
    run(scenario(save_top_k=-1), tmp_path / "plain")
    run(scenario(monitor=f"{PREFIX}/min_cosine", mode="max", save_top_k=3), tmp_path / "measured", [confusion])
    chosen = sorted((tmp_path / "measured/ckpt").iterdir())
    assert len(chosen) == 3
    for path in chosen:
        ours, plain = (
            torch.load(run / path.name, weights_only=False) for run in (path.parent, tmp_path / "plain/ckpt")
        )
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops"):
            assert frozen(ours[key]) == frozen(plain[key])


def test_stopping_early_by_our_key_is_stopping(tmp_path: Path) -> None:
    stop = Scenario(
        callbacks=lambda: [EarlyStopping(f"{PREFIX}/eta", stopping_threshold=math.inf, check_on_train_epoch_end=True)],
        trainer={"max_epochs": 5},
    )
    stopped = run(stop, tmp_path / "stopped", [GradientConfusionCallback()])
    plain = run(Scenario(trainer={"max_epochs": 1}), tmp_path / "plain")
    assert stopped["progress"] == (6, 1, True)
    for key in plain.keys() - {"progress", "checkpoint last.ckpt"}:
        assert not differences(plain[key], stopped[key], key)


# ---- what cannot be measured -----------------------------------------------------------------------------------------


class HoldsIterator(Module):
    def __init__(self) -> None:
        super().__init__()
        self.factors = iter(np.linspace(0.5, 1.5, 100))

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * float(next(self.factors))


class BatchStatistics(Module):
    """BatchNorm without running statistics, which a single sample has not."""

    def make_net(self):
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, CLASSES)
        )


class TakesTheIterator(Module):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


REFUSED = {
    "iterator on the module": (Scenario(HoldsIterator), r"HoldsIterator\.factors is an iterator"),
    "statistics of a single sample": (Scenario(BatchStatistics), "Expected more than 1 value per channel"),
    "dataloader_iter": (Scenario(TakesTheIterator), "takes a dataloader_iter"),
    "barebones": (
        Scenario(
            Quiet, trainer=dict.fromkeys(["logger", "enable_checkpointing", "log_every_n_steps"]) | {"barebones": True}
        ),
        r"barebones=True\) switches logging off",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_warning(name: str, tmp_path: Path) -> None:
    scenario, words = REFUSED[name]
    confusion = GradientConfusionCallback()
    with pytest.warns(UserWarning, match=words) as caught:
        measured = run(scenario, tmp_path / "measured", [confusion])
    assert sum("GradientConfusionCallback" in str(w.message) for w in caught) == 1
    assert_same(run(scenario, tmp_path / "plain"), measured)
    assert confusion.last_gram is None


# ---- what is shown ---------------------------------------------------------------------------------------------------


class Talks(Module):
    def training_step(self, batch, batch_idx):
        warnings.warn("the user's own warning", UserWarning, stacklevel=1)
        torch.cross(torch.ones(1, 3), torch.ones(1, 3))  # torch warns about this once in a process
        self.print("step")
        return self.loss(batch)


def test_warnings_and_prints_of_the_step_appear_as_often_as_without(tmp_path: Path, capsys: Any) -> None:
    scenario, shown = Scenario(Talks), {}
    both = [
        GradientConfusionCallback(engine=engine, prefix=engine, every_n_train_steps=1) for engine in ("vmap", "loop")
    ]
    for name, confusions in {"with": both, "without": []}.items():  # torch says its own once, so it is said with
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            run(scenario, tmp_path / name, confusions)
        shown[name] = Counter(str(w.message).partition(" specifying")[0] for w in caught), capsys.readouterr().out
    assert all(confusion.last_gram is not None for confusion in both)
    assert shown["with"][0].pop("Using torch.cross without") == 1
    assert shown["with"] == shown["without"]
    assert shown["without"][0]["the user's own warning"] == 1 and shown["without"][1] == "step\n" * 12


def test_the_documentation_lists_the_scenarios() -> None:
    documentation = (Path(__file__).parent.parent / "docs" / "no_trace.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (.+?) \| .+ \|$", documentation, re.MULTILINE)[1:] == list(SCENARIOS)
