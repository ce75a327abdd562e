"""Gradient confusion beside loss and accuracy while a small CNN learns handwritten digits.

The data is the 1797 real 8x8 scans bundled with scikit-learn, so nothing is downloaded.
Ends with a table read back from TensorBoard's event file.

    make demo
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback

COLUMNS = {
    "train_loss": "train loss",
    "val_accuracy": "val accuracy",
    "gradient_confusion/eta": "eta",
    "gradient_confusion/min_cosine": "min_cosine",
    "gradient_confusion/negative_fraction": "negative_fraction",
}


class DigitClassifier(pl.LightningModule):
    """Nothing in this module knows of the callback."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(32 * 4 * 4, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.net(images).argmax(dim=1) == labels).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """80 % of the digits to train on and 20 % to validate on, pixels in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=seed)
    x_train, x_val = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    y_train, y_val = (torch.tensor(part) for part in parts[2:])
    return TensorDataset(x_train, y_train), TensorDataset(x_val, y_val)


def table(log_dir: str) -> str:
    """Return one row for every measured step of the run in ``log_dir``, as its event file holds it."""
    events = EventAccumulator(log_dir, size_guidance={"scalars": 0})  # 0: keep every point
    events.Reload()
    curves = {key: {point.step: point.value for point in events.Scalars(key)} for key in COLUMNS}
    header = ["step", *COLUMNS.values()]
    rows = []
    for step in sorted(curves["gradient_confusion/eta"]):
        # Accuracy is measured once an epoch: show the last value known at this step.
        known = [at for at in curves["val_accuracy"] if at <= step]
        at = dict.fromkeys(COLUMNS, step) | {"val_accuracy": max(known, default=-1)}
        values = [curves[key].get(at[key]) for key in COLUMNS]
        rows.append([str(step), *("-" if value is None else f"{value:.4f}" for value in values)])
    return "\n".join(
        "  ".join(cell.rjust(len(name)) for cell, name in zip(row, header, strict=True)) for row in [header, *rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--every", type=int, default=20, help="measure and log every so many training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-dir", default="runs", help="where TensorBoard's event files go")
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that everything works")
    args = parser.parse_args()
    if args.fast:
        args.epochs, args.every = 1, 10

    # Lightning recommends worker processes; for a data set of half a megabyte in memory they only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree in a way that torch deprecates; nothing a reader of this example can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    pl.seed_everything(args.seed)
    train, val = digits(args.seed)
    logger = TensorBoardLogger(args.save_dir, name="digits", default_hp_metric=False)
    # A plain GradientConfusionCallback() logs the curves; the other arguments add pictures to TensorBoard's tab Images.
    confusion = GradientConfusionCallback(
        every_n_train_steps=args.every, figures=True, labels=1, top_pairs=6, per_layer=2
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=1,
        logger=logger,
        log_every_n_steps=args.every,
        callbacks=[confusion],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        DigitClassifier(),
        DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(val, batch_size=len(val)),
    )

    print(f"\n{table(logger.log_dir)}\n")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    command = "tensorboard" if shutil.which("tensorboard") else os.path.relpath(tensorboard)
    print(f"{command} --logdir {args.save_dir}")


if __name__ == "__main__":
    main()
