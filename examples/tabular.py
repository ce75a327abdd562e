"""Regression on a table: the progress of 442 patients with diabetes, from ten numbers about each.

The data comes with scikit-learn. A squared error pulls every patient up or down, so gradients agree or oppose each
other; the run ends with the density of their cosines.

    make example NAME=tabular
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.plots import plot_density


class Regressor(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x)[:, 0], y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.mse_loss(self.net(x)[:, 0], y), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def patients() -> tuple[TensorDataset, TensorDataset]:
    """80 % of the patients to train on and 20 % to validate on, every column of mean 0 and variance 1."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()  # the ten columns are centred already
    parts = (torch.tensor(part, dtype=torch.float32) for part in train_test_split(x, y, test_size=0.2, random_state=0))
    x_train, x_val, y_train, y_val = parts
    return TensorDataset(x_train, y_train), TensorDataset(x_val, y_val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--save-dir", default="runs", help="where the CSV file goes")
    parser.add_argument("--picture", help="where the density goes (default: density.png beside the CSV file)")
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that everything works")
    args = parser.parse_args()

    # Lightning recommends worker processes; for a table in memory they only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree in a way that torch deprecates; nothing a reader of this example can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    pl.seed_everything(0)
    train, val = patients()
    logger = CSVLogger(args.save_dir, name="tabular")
    # The same 128 patients at every measurement.
    confusion = GradientConfusionCallback(every_n_train_steps=5, num_units=128, source="fixed")
    trainer = pl.Trainer(
        max_epochs=1 if args.fast else args.epochs,
        devices=1,
        logger=logger,
        log_every_n_steps=5,
        callbacks=[confusion],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Regressor(),
        DataLoader(train, batch_size=32, shuffle=True, drop_last=True),
        DataLoader(val, batch_size=len(val)),
    )

    picture = args.picture or Path(logger.log_dir) / "density.png"
    assert confusion.last_gram is not None  # after a training
    plot_density(confusion.last_gram).savefig(picture)
    print(f"\nThe density at the last step is in {picture}\npython -m lightning_gradconf {args.save_dir}")


if __name__ == "__main__":
    main()
