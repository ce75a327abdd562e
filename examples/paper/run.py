"""One run: a network trained with plain SGD while the callback measures it, and what came out as a dictionary."""

from __future__ import annotations

import logging
import math
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback, gradient_gram
from lightning_gradconf.statistics import pairwise_cosines

from . import data, models


@dataclass(frozen=True)
class Run:
    """All that a run depends on, beside the files of its data set."""

    data: str
    model: str  # a name for models.build
    init: str  # a name for models.initialise
    seed: int  # of the weights, of the order of the samples and of the units drawn
    channels: int = 16  # of the first convolution
    lr: float = 0.0
    epochs: int = 0  # 0: measured at initialisation only
    batch_size: int = 128
    batches: int | None = None  # of an epoch; None: as many as the training set has
    num_units: int = 15
    unit_size: int = 128


def train(run: Run, folder: str | None = None) -> dict[str, Any]:
    """Train one network and return what it recorded: ``rows``, the ``cosines`` of the last measurement, and its costs.

    There is a row for each epoch. Row 0 is the initialisation, and has no loss. In the others ``loss`` is the mean over
    the epoch's batches. The learning rate is divided by 10 after 40 % and 80 % of the epochs, as from epochs 80 and 160
    of 200. A run whose loss is not finite ends there.
    """
    quiet()
    started = time.process_time()
    torch.manual_seed(run.seed)
    dataset = _loaded(run.data, folder)
    image = dataset.train_images.shape[1:]
    net = models.build(run.model, (image[0], image[1], image[2]), data.classes_of(run.data), run.channels)
    models.initialise(net, run.init, relu=not run.model.startswith(("tanh", "linear")))
    module = Classifier(net, run.lr, [round(0.4 * run.epochs), round(0.8 * run.epochs)])
    # Without training, the one step is measured before it is taken; the end of its epoch would come after.
    when: dict[str, Any] = {"every_n_epochs": 1} if run.epochs else {"every_n_train_steps": 1}
    confusion = GradientConfusionCallback(
        **when, source="fresh", num_units=run.num_units, unit_size=run.unit_size, seed=run.seed
    )
    history = History(confusion, run.epochs)
    trainer = pl.Trainer(
        max_epochs=run.epochs or 1,
        max_steps=-1 if run.epochs else 1,
        limit_train_batches=run.batches,
        callbacks=[confusion, history],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_set = Batches(dataset.train_images, dataset.train_labels)
    loader = DataLoader(train_set, run.batch_size, shuffle=True, drop_last=True, collate_fn=tuple)
    trainer.fit(module, loader)
    assert confusion.last_gram is not None
    return {
        "run": asdict(run),
        "rows": history.rows,
        "cosines": [round(cosine, 4) for cosine in pairwise_cosines(confusion.last_gram).tolist()],
        "samples_in_effect": samples_in_effect(module, dataset, run) if run.epochs else math.nan,
        "accuracy": accuracy(net, dataset.test_images, dataset.test_labels) if run.epochs else math.nan,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "cpu_seconds": round(time.process_time() - started, 2),
        "processor": processor(),
    }


class Classifier(pl.LightningModule):
    """Plain SGD: no momentum, no weight decay."""

    def __init__(self, net: nn.Module, learning_rate: float, milestones: list[int]) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.milestones = milestones

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones)]


class History(pl.Callback):
    """One row an epoch, after one of the initialisation; stands after the callback whose measurements it keeps."""

    def __init__(self, confusion: GradientConfusionCallback, epochs: int) -> None:
        self.confusion, self.epochs = confusion, epochs
        self.rows: list[dict[str, float]] = []
        self.losses: list[Tensor] = []
        self.last_gram: Tensor | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.rows:
            self._record(math.nan)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.epochs:
            return
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        self._record(loss)
        trainer.should_stop = not math.isfinite(loss)

    def _record(self, loss: float) -> None:
        # A failed measurement is a warning to a training; here there is nothing to show without it.
        if self.confusion.last_gram is self.last_gram:
            raise RuntimeError(f"the confusion of epoch {len(self.rows)} was not measured; a warning above says why")
        self.last_gram = self.confusion.last_gram
        self.rows.append({"epoch": len(self.rows), "loss": loss, **self.confusion.last_statistics})


class Batches(TensorDataset):
    """Gives a batch at once instead of sample by sample; of small images that takes most of an epoch."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[indices] for tensor in self.tensors)


def samples_in_effect(module: Classifier, dataset: data.Data, run: Run) -> float:
    """Return of how many samples the gradient of a mini-batch consists, the others being small beside them.

    It is the participation ratio of their squared norms, between 1 and the batch size: the mean over four mini-batches.
    """
    generator = torch.Generator().manual_seed(run.seed)
    count = min(4 * run.batch_size, len(dataset.train_labels))
    drawn = torch.randperm(len(dataset.train_labels), generator=generator)[:count]
    device = next(module.parameters()).device
    batch = (dataset.train_images[drawn].to(device), dataset.train_labels[drawn].to(device))
    gram = sum(gradient_gram(module, lambda module, batch: module.training_step(batch, 0), batch).values())
    squared = torch.as_tensor(gram).diagonal().double().split(run.batch_size)
    return float(torch.stack([part.sum() ** 2 / (part**2).sum() for part in squared]).mean())


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that a network puts in the right class, in evaluation mode."""
    net.eval()
    device = next(net.parameters()).device
    right = [
        (net(x.to(device)).argmax(dim=1).cpu() == y).sum()
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    ]
    return float(sum(right) / len(labels))


@cache
def processor() -> str:
    """Name what runs are trained on: a GPU where there is one, as the Trainer chooses it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    # Virtual machines hide the name; the instruction set decides on rounding then.
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def _loaded(name: str, folder: str | None) -> data.Data:
    """Read a data set once in each process."""
    return data.load(name, folder)


def quiet() -> None:
    """Leave out what Lightning says at the start of each of some hundred runs."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_gradconf"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree in a way that torch deprecates; nothing a reader of this example can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
