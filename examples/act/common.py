"""What all examples share: the digits, a training that keeps its curves in memory, and tables and figures of runs."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers.logger import Logger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback

COLOURS = ("#c44e52", "#4c80b6", "#55a868", "#dd8452", "#8172b3", "#8c8c8c", "#64b5cd", "#262626", "#937860")


@dataclass
class Result:
    """What an example found: a table, as rows of cells with the columns first, and a figure."""

    rows: Sequence[Sequence[str]]
    figure: Figure

    def __str__(self) -> str:
        first, *others = self.rows
        return "\n".join("| " + " | ".join(row) + " |" for row in [first, ["---"] * len(first), *others])


class InMemory(Logger):
    """Keeps ``{key: {step: value}}``, as ``read_runs`` returns it."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, dict[int, float]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.curves.setdefault(key, {})[step or 0] = float(value)


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimizers: Any) -> None:
        super().__init__()
        self.net, self.loss, self.optimizers_of = net, loss, optimizers

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self.parameters())


@dataclass
class Run:
    """A finished training."""

    net: nn.Module
    curves: dict[str, dict[int, float]]
    confusion: GradientConfusionCallback

    @property
    def gram(self) -> Tensor:
        """The Gram of the last measurement."""
        assert self.confusion.last_gram is not None
        return self.confusion.last_gram

    def curve(self, name: str) -> dict[int, float]:
        return self.curves[name if name == "train_loss" else f"gradient_confusion/{name}"]

    def at(self, name: str, step: int) -> float:
        """Return the value of a curve at the measurement nearest to a step."""
        curve = self.curve(name)
        return curve[min(curve, key=lambda measured: abs(measured - step))]

    def mean(self, name: str, start: int, stop: int) -> float:
        """Return the mean of a curve from step ``start`` to before step ``stop``."""
        values = [value for step, value in self.curve(name).items() if start <= step < stop]
        return sum(values) / len(values)

    def accuracy(self, data: TensorDataset) -> float:
        x, y = data.tensors
        with torch.no_grad():
            logits: Tensor = self.net.eval()(x)
        return (logits.argmax(1) == y).float().mean().item()

    def loss(self, data: TensorDataset, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> float:
        x, y = data.tensors
        with torch.no_grad():
            return loss(self.net.eval()(x), y).item()


def sgd(rate: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, rate)


def train(
    make: Callable[[], nn.Module],
    data: TensorDataset | DataLoader[Any],
    *,
    steps: int,
    optimizer: Callable[..., Any] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    batch_size: int = 32,
    seed: int = 0,
    prepare: Callable[[nn.Module], None] | None = None,
    clip: float | None = None,
    **confusion: Any,
) -> Run:
    """Train the network that ``make`` returns for ``steps`` steps; other arguments are the callback's."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", ".*(many workers|LeafSpec|no `val_dataloader`|logging interval|GPU available|lr_scheduler.step)"
    )
    pl.seed_everything(seed, verbose=False)
    net = make()
    if prepare is not None:
        prepare(net)
    usual: dict[str, Any] = {"every_n_train_steps": 10, "num_units": 64, "source": "fixed", "histogram": False}
    callback = GradientConfusionCallback(**usual | confusion)
    logger = InMemory()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=logger,
        log_every_n_steps=1,
        gradient_clip_val=clip,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if not isinstance(data, DataLoader):
        data = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    trainer.fit(Module(net, loss, optimizer or sgd(0.1)), data)
    return Run(net, logger.curves, callback)


def digits(seed: int = 0, *, flat: bool = True) -> tuple[TensorDataset, TensorDataset]:
    """80 % of the digits to train on and 20 % to test on, pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    x_train, x_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y_train, y_test = (torch.tensor(part) for part in parts[2:])
    if not flat:
        x_train, x_test = x_train.view(-1, 1, 8, 8), x_test.view(-1, 1, 8, 8)
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def span(values: Sequence[float], digits: int = 2) -> str:
    """Return the values of all seeds: their mean, or the least and the greatest where these differ when rounded."""
    low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def panels(names: Sequence[str], *, width: float = 7.5, height: float = 2.4) -> tuple[Figure, list[Any]]:
    """Return a figure with one panel for each name, side by side."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    row = list(figure.subplots(1, len(names), squeeze=False).flat)
    for axes, name in zip(row, names, strict=True):
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def draw(axes: Any, runs: dict[str, Run], name: str, *, smooth: int = 1) -> None:
    """Draw a curve of each run, of means over ``smooth`` neighbouring points where there are as many."""
    for (label, run), colour in zip(runs.items(), COLOURS, strict=False):
        curve = run.curve(name)
        steps, values = list(curve), torch.tensor(list(curve.values()))
        width = min(smooth, len(values))
        values, steps = values.unfold(0, width, 1).mean(1), steps[width - 1 :]
        axes.plot(steps, values, color=colour, linewidth=1.3, label=label)
    axes.set_xlabel("step", fontsize=8)
    if "cosine" in name:
        axes.axhline(0, color="#d9d9d9", linewidth=0.8, zorder=0)


def heatmaps(cosines: dict[str, Tensor], limit: float) -> Figure:
    """Draw the mean cosine of each pair of classes, ``(10, 10)``, one panel a training, on one scale."""
    figure, axes = panels(list(cosines), height=2.7)
    for panel, matrix in zip(axes, cosines.values(), strict=True):
        image = panel.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
        panel.set(xticks=range(10), yticks=range(10))
        panel.set_xlabel("class", fontsize=8)
        panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, extend="both")
    bar.set_label("mean cosine", fontsize=8)
    bar.outline.set_visible(False)
    return figure
