"""Layer by layer: a Hugging Face Vision Transformer, made from a config, learns handwritten digits.

The data is the 1797 real 8x8 scans bundled with scikit-learn, and no weights are downloaded. ``per_layer`` logs the
lowest cosine of each block as well, and the run ends with a heatmap of blocks over steps.

    make example NAME=vit_digits
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.plots import plot_layers
from lightning_gradconf.reports.saved_runs import read_runs


class DigitTransformer(pl.LightningModule):
    """Batches are dictionaries, as Hugging Face's own models take them."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=128,
        )
        config.num_labels = 10
        self.model = ViTForImageClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        accuracy = (self.model(**batch).logits.argmax(dim=1) == batch["labels"]).float().mean()
        self.log("val_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def digits(seed: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """80 % of the digits to train on and 20 % to validate on, pixels in [-1, 1]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 8 - 1, labels, test_size=0.2, stratify=labels, random_state=seed)
    x_train, x_val = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    y_train, y_val = (torch.tensor(part) for part in parts[2:])
    train, val = (
        [{"pixel_values": x, "labels": y} for x, y in zip(*pair, strict=True)]
        for pair in ((x_train, y_train), (x_val, y_val))
    )
    return train, val


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--save-dir", default="runs", help="where TensorBoard's event files go")
    parser.add_argument("--picture", help="where the heatmap goes (default: layers.png beside the event files)")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that everything works")
    args = parser.parse_args()

    # Lightning recommends worker processes; for half a megabyte in memory they only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree in a way that torch deprecates; nothing a reader of this example can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    pl.seed_everything(0)
    train, val = digits(seed=0)
    logger = TensorBoardLogger(args.save_dir, name="vit_digits", default_hp_metric=False)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        max_steps=4 if args.fast else -1,
        devices=1,
        logger=logger,
        log_every_n_steps=2 if args.fast else 10,
        # model.vit.layers.0 has four names.
        callbacks=[GradientConfusionCallback(every_n_train_steps=2 if args.fast else 10, per_layer=4)],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(
        DigitTransformer(),
        DataLoader(train, batch_size=64, shuffle=True, drop_last=True),  # type: ignore[arg-type] # a list is a dataset
        DataLoader(val, batch_size=len(val)),  # type: ignore[arg-type]
    )

    (curves,) = read_runs([logger.log_dir]).values()
    start = "gradient_confusion/min_cosine/"
    layers = {key.removeprefix(start): curve for key, curve in curves.items() if key.startswith(start)}
    steps = list(curves["gradient_confusion/min_cosine"])
    picture = args.picture or Path(logger.log_dir) / "layers.png"
    plot_layers({name: [curve[step] for step in steps] for name, curve in layers.items()}, steps).savefig(picture)
    print(f"\nThe layers are in {picture}\npython -m lightning_gradconf {args.save_dir}")


if __name__ == "__main__":
    main()
