"""The callback in LightningCLI: everything about it is in ``cli.yaml``, nothing here knows of it.

A narrow network and a wide one, and their curves beside each other:

    make example NAME=cli ARGS="fit --config examples/cli.yaml --model.width 8"
    make example NAME=cli ARGS="fit --config examples/cli.yaml --model.width 64"
    .venv/bin/python -m lightning_gradconf runs/cli
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class DigitClassifier(pl.LightningModule):
    """A network of ``depth`` hidden layers of ``width`` units each, with ReLU and no shortcuts."""

    def __init__(self, width: int = 32, depth: int = 4, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        sizes = [64, *[width] * depth]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 10))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Digits(pl.LightningDataModule):
    """The handwritten digits that come with scikit-learn, 20 % of them to validate on."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
        x_train, x_val = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        y_train, y_val = (torch.tensor(part) for part in parts[2:])
        self.train, self.val = TensorDataset(x_train, y_train), TensorDataset(x_val, y_val)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, len(self.val))


def main() -> None:
    # Lightning recommends worker processes; for half a megabyte in memory they only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree, and jsonargparse, in ways that these deprecate.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    LightningCLI(DigitClassifier, Digits, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
