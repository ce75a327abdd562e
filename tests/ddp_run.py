"""Training runs on several processes, as a script: Lightning starts processes from the main module.

Takes a JSON file of named runs and writes what each rank of each run left, for `test_distributed` to compare.
"""

from __future__ import annotations

import json
import logging.handlers
import sys
import warnings
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from runs import CLASSES, FEATURES, QUIET, Data, Module, Rows, frozen
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchmetrics import Accuracy

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.batches.layout import Layout
from lightning_gradconf.gram.ranks import data_parallel as distributed
from lightning_gradconf.gram.ranks import factor_exchange as factors
from lightning_gradconf.reports import report
from lightning_gradconf.training import isolation, measure


class Net(Module):
    measured_loss = Module.loss

    def make_net(self):
        self.unused = nn.Linear(2, 2)
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES)
        )


class AllUsed(Net):
    def make_net(self):
        net = super().make_net()
        del self.unused
        return net


class WithoutNoise(AllUsed):
    """Of which a training step is what is measured: no BatchNorm, no dropout. Writes to its batch after the step."""

    def training_step(self, batch, batch_idx):
        self.x = batch[0]
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        self.x.add_(1)

    def make_net(self):
        net = super().make_net()
        return nn.Sequential(net[0], nn.LayerNorm(8), net[2], net[4])


class Manual(AllUsed):
    """Steps its optimizer itself, and computes a metric over all ranks in every step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.accuracy = Accuracy(task="multiclass", num_classes=CLASSES)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.accuracy.update(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy.compute())
        self.log("train_loss", loss)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


class WithoutNoiseUnused(WithoutNoise):
    def make_net(self):
        net = super().make_net()
        self.unused = nn.Linear(2, 2)
        return net


class Sharded(pl.LightningModule):
    """A small transformer over the features in pairs, with layers of its own and of the root to gather."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        parts = [nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), layer, nn.Flatten(), nn.BatchNorm1d(24)]
        self.net = nn.Sequential(*parts, nn.Linear(24, CLASSES))

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[2], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    training_step = Module.training_step
    loss = measured_loss = Module.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Break(pl.Callback):
    """Breaks one stage of a measurement on rank 1."""

    def __init__(self, stage):
        self.stage = stage
        self.calls = 0

    def setup(self, trainer, module, stage):
        whole_loss = type(module).measured_loss

        def broken(*args, **kwargs):
            self.calls += 1
            # The last of 4 gradients and 2 of them again: on copies, and then on the module's own tensors.
            if self.stage == "block" and self.calls % 7 not in (6, 0):
                return whole_loss(*args)
            if self.stage == "sharded forward":  # with nothing left to gather
                whole_loss(*args)
            raise RuntimeError("broken on rank 1")

        owner, name = {
            "isolation": (isolation, "untouched"),
            "sampling": (Layout, "units"),
            "preparation": (measure, "is_overridden"),
            "plan": (distributed, "bytes_for_gradients"),
            "forward": (type(module), "measured_loss"),
            "block": (type(module), "measured_loss"),
            "sharded forward": (type(module), "measured_loss"),
            "statistics": (report, "gradient_statistics"),
            "exchange": (factors, "gram_of_sum"),
        }[self.stage]
        if trainer.global_rank == 1:
            setattr(owner, name, broken)


class Watched(GradientConfusionCallback):
    """Remembers at which steps it took a pass of its own."""

    def on_train_start(self, *args):
        self.passes = []
        super().on_train_start(*args)

    def should_measure(self, trainer):
        self.passes.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
        return super().should_measure(trainer)


class Leave(pl.Callback):
    """Writes what a rank's run left, from the rank itself."""

    def __init__(self, out, warned, said):
        self.out, self.warned, self.said = out, warned, said

    def teardown(self, trainer, module, stage):
        def digest(value):
            return sha256(repr(frozen(value)).encode()).hexdigest()

        def local(tensor):
            return tensor.to_local() if hasattr(tensor, "to_local") else tensor

        result = {
            "weights": digest([local(t) for t in module.state_dict().values()]),
            "gradients": digest([None if p.grad is None else local(p.grad) for p in module.parameters()]),
            "optimizer": digest([local(t) for s in trainer.optimizers[0].state.values() for t in s.values()]),
            "rng": digest(torch.get_rng_state()),
            "logged": digest(trainer.loggers[0].of(ours=False)),
            "steps": trainer.global_step,
            "ours": trainer.loggers[0].of(ours=True),
            "warnings": self.warned,
            "said": [record.getMessage() for record in self.said.buffer],
        }
        for confusion in trainer.callbacks:
            if isinstance(confusion, GradientConfusionCallback) and confusion.last_gram is not None:
                result["statistics"] = {k: v.hex() for k, v in confusion.last_statistics.items()}
                result["gram"] = confusion.last_gram.tolist()
                result["passes"] = confusion.passes
                result["pairs"] = [
                    (pair.cosine, pair.units, [str(origin) for origin in pair.origins], pair.labels)
                    for pair in confusion.last_top_pairs
                ]
        (self.out / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def train(
    out, strategy="ddp", options=None, devices=2, accumulate=1, samples=24, noise=True, smaller=False, confusion=None,
    fail=None, manual=False,
):  # fmt: skip
    out.mkdir(exist_ok=True)  # by the other rank, where that runs the script too
    pl.seed_everything(5, verbose=False)
    options = options or {}
    if strategy == "fsdp2":
        module = Sharded()
        parallel = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    else:
        kinds = (Net, AllUsed) if noise else (WithoutNoiseUnused, WithoutNoise)
        module = Manual() if manual else kinds[not options.get("find_unused_parameters")]()
        parallel = DDPStrategy(
            process_group_backend="gloo", start_method="fork", timeout=timedelta(seconds=60), **options
        )
    warned = []
    warnings.showwarning = lambda message, *_, **__: warned.append(str(message))
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("lightning_gradconf").handlers = [said]
    callbacks = [Leave(out, warned, said)]
    if confusion is not None:
        # Broken where the training step is not.
        loss_fn = None if fail is None else lambda module, batch: module.measured_loss(batch)
        callbacks.append(Watched(loss_fn=loss_fn, **confusion))
    if fail is not None:
        callbacks.append(Break(fail))
    trainer = pl.Trainer(
        max_epochs=2, logger=Rows(), enable_checkpointing=False, log_every_n_steps=2, callbacks=callbacks,
        accumulate_grad_batches=accumulate, use_distributed_sampler=not smaller,
        **(QUIET | {"devices": devices, "strategy": parallel}),
    )  # fmt: skip
    if smaller:
        module.train_dataloader = lambda: loader_of_rank(trainer.global_rank)
        trainer.fit(module)
    else:
        trainer.fit(module, DataLoader(Subset(Data(), range(samples)), batch_size=4, shuffle=True))


def loader_of_rank(rank):
    """Three batches of 4 samples on one rank, and of 3 on the other."""
    size = 4 - rank
    return DataLoader(Subset(Data(), range(12 * rank, 12 * rank + 3 * size)), batch_size=size)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", "GradientConfusionCallback")
    logging.getLogger("lightning_gradconf").setLevel(logging.INFO)
    runs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, options in runs.items():
        train(out / name, **options)


if __name__ == "__main__":
    main()
