"""The share of a training run that the callback takes, in a Trainer with default settings.

    python benchmarks/overhead.py [--models digits resnet18 gpt] [--steps 300] [--rounds 3]

Runs with and without the callback take turns in one process, one thread, and the medians of processor time are
compared: the callback's own, taken around its calls, with that of the run without it. The first measurement, which
calibrates, is given apart: a long run pays for it once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import build

from lightning_gradconf import GradientConfusionCallback

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Timed(GradientConfusionCallback):
    """Notes how long each call took."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        start = time.process_time()
        super().on_train_batch_start(*args)
        self.calls.append(time.process_time() - start)


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x).flatten(0, -2), y.flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def with_batchnorm(net: nn.Module) -> nn.Module:
    """The same network with BatchNorm for GroupNorm."""
    for name, child in net.named_children():
        replaced = nn.BatchNorm2d(child.num_channels) if isinstance(child, nn.GroupNorm) else with_batchnorm(child)
        setattr(net, name, replaced)
    return net


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(512, 10),
    )  # fmt: skip
    return net, torch.randn(1440, 1, 8, 8), torch.randint(10, (1440,))


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    return with_batchnorm(build("resnet18").model), torch.randn(512, 3, 32, 32), torch.randint(10, (512,))


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(1000, (256, 129))
    return build("gpt").model, tokens[:, :-1], tokens[:, 1:]


MODELS = {"digits": (digits, 32, 600), "resnet18": (resnet18, 32, 101), "gpt": (gpt, 16, 101)}


def run(name: str, steps: int, callbacks: list[Any]) -> float:
    make, batch_size, _ = MODELS[name]
    torch.manual_seed(0)
    net, x, y = make()
    trainer = pl.Trainer(max_epochs=-1, max_steps=steps, callbacks=callbacks, **QUIET)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True, drop_last=True)
    start = time.process_time()
    trainer.fit(Module(net), loader)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        steps = args.steps or MODELS[name][2]
        without, with_, own, first = [], [], [], []
        for _ in range(args.rounds):
            without.append(run(name, steps, []))
            timed = Timed()
            with_.append(run(name, steps, [timed]))
            own.append(sum(timed.calls[1:]))
            first.append(timed.calls[0])
        plain, share = statistics.median(without), statistics.median(own) / statistics.median(without)
        print(
            f"{name:10} {steps} steps, without {plain:6.2f} s, with {statistics.median(with_):6.2f} s, callback "
            f"{share:6.2%} without its first measurement, which takes {statistics.median(first):.2f} s"
        )


if __name__ == "__main__":
    main()
