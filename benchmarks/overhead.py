"""The share of a training run that the callback takes, in a Trainer with default settings.

    python benchmarks/overhead.py [--models cnn mlp loop graphs resnet18 gpt] [--seconds 20]

Trains for so many seconds with the default line, one thread, and prints the share of the run's time that was spent in
the callback after its first measurement, which loads libraries and checks the engine, and is given apart. The share
without a bound (``max_overhead=None``), and that an interval given by the user is kept, are shown beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import build

from lightning_gradconf import GradientConfusionCallback

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Timed(GradientConfusionCallback):
    """Notes how long each call took, and which steps were measured."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        start = time.perf_counter()
        super().on_train_batch_start(*args)
        self.calls.append(time.perf_counter() - start)
        if self.last_step is not None and self.last_step not in self.steps[-1:]:
            self.steps.append(self.last_step)


class StopAfter(pl.Callback):
    """Stops after so many seconds, counted from the second step on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.start = self.start or time.perf_counter()
        trainer.should_stop = time.perf_counter() - self.start > self.seconds


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
    """Return the same network with BatchNorm for GroupNorm."""
    for name, child in net.named_children():
        replaced = nn.BatchNorm2d(child.num_channels) if isinstance(child, nn.GroupNorm) else with_batchnorm(child)
        setattr(net, name, replaced)
    return net


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network of examples/digits.py."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(512, 10),
    )  # fmt: skip
    return net, torch.randn(1440, 1, 8, 8), torch.randint(10, (1440,))


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network whose steps take less than a millisecond."""
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10)), torch.randn(3200, 20), labels(3200)


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    return with_batchnorm(build("resnet18").model), torch.randn(512, 3, 32, 32), labels(512)


def gpt() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(1000, (256, 129))
    return build("gpt").model, tokens[:, :-1], tokens[:, 1:]


class GraphNet(nn.Module):
    """Two rounds of messages along edges, and the sum over each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, graphs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        nodes, edges, graph = graphs
        for layer in (self.first, self.second):
            h = layer(nodes)
            nodes = (h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])).relu()
        count = int(graph[-1]) + 1
        logits: Tensor = self.head(torch.zeros(count, nodes.shape[1]).index_add(0, graph, nodes))
        return logits


def graphs() -> tuple[nn.Module, list[Any], Callable[[list[Any]], Any]]:
    """Return graphs of 5 to 20 nodes, joined without edges between them: samples cannot be cut out of that."""
    sizes = torch.randint(5, 21, (1000,)).tolist()
    items = [((torch.randn(n, 8), torch.randint(n, (2, 3 * n))), torch.randint(10, ())) for n in sizes]

    def collate(batch: list[Any]) -> Any:
        counts = torch.tensor([len(nodes) for (nodes, _), _ in batch])
        starts = counts.cumsum(0) - counts
        edges = torch.cat([edges + start for ((_, edges), _), start in zip(batch, starts, strict=True)], 1)
        graph = torch.arange(len(batch)).repeat_interleave(counts)
        return (torch.cat([nodes for (nodes, _), _ in batch]), edges, graph), torch.stack([y for _, y in batch])

    return GraphNet(), items, collate


def labels(samples: int) -> Tensor:
    return torch.randint(10, (samples,))


# What to train, the batch size, and options of the callback beside the default line.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any, Any]], int, dict[str, Any]]] = {
    "cnn": (cnn, 32, {}),
    "mlp": (mlp, 32, {}),
    "loop": (cnn, 32, {"engine": "loop"}),
    "graphs": (graphs, 32, {}),
    "resnet18": (resnet18, 32, {}),
    "gpt": (gpt, 16, {}),
}


def run(name: str, seconds: float, **options: Any) -> tuple[Timed, float]:
    """Train, and return the callback and the share of the time after its first measurement that it took."""
    make, batch_size, more = MODELS[name]
    torch.manual_seed(0)
    net, x, y = make()  # inputs and labels, or items and how they are collated
    data, collate = (x, y) if callable(y) else (TensorDataset(x, y), None)
    timed, stop = Timed(**more, **options), StopAfter(seconds)
    trainer = pl.Trainer(max_epochs=-1, callbacks=[timed, stop], **QUIET)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    trainer.fit(Module(net), loader)
    return timed, sum(timed.calls[1:]) / (time.perf_counter() - stop.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        bounded, share = run(name, args.seconds)
        _, unbounded = run(name, args.seconds, max_overhead=None)
        given, _ = run(name, args.seconds / 4, every_n_train_steps=10)
        kept = all((step + 1) % 10 == 0 for step in given.steps[1:]) and len(given.steps) == len(given.calls) // 10 + 1
        interval = bounded.steps[-1] - bounded.steps[-2] if len(bounded.steps) > 1 else "-"
        print(
            f"{name:9} {len(bounded.calls):6} steps, {len(bounded.steps):4} measured, the last two {interval} steps "
            f"apart: {share:6.2%} of the run, {unbounded:6.2%} without a bound; the first takes "
            f"{bounded.calls[0]:.2f} s; every_n_train_steps=10 is kept: {kept}"
        )


if __name__ == "__main__":
    main()
