"""A GAN with manual optimisation draws digits: how much do samples disagree about each of its two networks?

The losses are what ``training_step`` passes to ``manual_backward``; each has curves of its own, with the index of its
optimizer in their names. The data comes with scikit-learn.

    make example NAME=gan_digits
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.plots import plot_runs
from lightning_gradconf.reports.saved_runs import read_runs

NOISE = 16


class GAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )

    def generator_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return how surely the drawn digits are told from real ones."""
        _, noise = batch
        return F.softplus(-self.discriminator(self.generator(noise).sigmoid())).mean()

    def discriminator_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return how often drawn digits are taken for real ones, and real ones for drawn."""
        real, noise = batch
        drawn = self.generator(noise).sigmoid().detach()
        return (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(drawn))).mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for name, optimizer in zip(("discriminator", "generator"), self.optimizers(), strict=True):
            loss = getattr(self, f"{name}_loss")(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log(f"{name}_loss", loss, prog_bar=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.discriminator, self.generator)
        return [torch.optim.Adam(network.parameters(), lr=5e-4, betas=(0.5, 0.999)) for network in networks]


def with_noise(samples: list[tuple[Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate a batch of digits and of noise to draw as many from: samples on dimension 0 of both."""
    real = torch.stack([image for (image,) in samples])
    return real, torch.randn(len(real), NOISE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--save-dir", default="runs", help="where TensorBoard's event files go")
    parser.add_argument("--picture", help="where the curves go (default: confusion.png beside the event files)")
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that everything works")
    args = parser.parse_args()

    # Lightning recommends worker processes; for half a megabyte in memory they only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree in a way that torch deprecates; nothing a reader of this example can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    pl.seed_everything(0)
    images, _ = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32))
    logger = TensorBoardLogger(args.save_dir, name="gan_digits", default_hp_metric=False)
    trainer = pl.Trainer(
        max_epochs=1 if args.fast else args.epochs,
        devices=1,
        logger=logger,
        log_every_n_steps=20,
        callbacks=[GradientConfusionCallback(every_n_train_steps=20)],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(GAN(), DataLoader(data, batch_size=64, shuffle=True, drop_last=True, collate_fn=with_noise))

    (curves,) = read_runs([logger.log_dir]).values()
    networks = {
        name: {key.replace(f"/{i}/", "/"): curve for key, curve in curves.items() if f"/{i}/" in key}
        | {"loss": curves[f"{name}_loss"]}
        for i, name in enumerate(("discriminator", "generator"))
    }
    picture = args.picture or Path(logger.log_dir) / "confusion.png"
    plot_runs(networks).savefig(picture)
    print(f"\nThe curves are in {picture}\npython -m lightning_gradconf {args.save_dir} --prefix gradient_confusion/1")


if __name__ == "__main__":
    main()
