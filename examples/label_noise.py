"""Wrong labels among the samples that conflict most.

Trains on the digits of scikit-learn with one label in ten wrong. At the end of every fifth epoch the pairs of samples
whose gradients disagree most are listed, and it is counted how many have a wrong label in them.

    make example NAME=label_noise
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from digits import DigitClassifier, digits
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback, plots
from lightning_gradconf.reports.report import Pair

WRONG, MOST = 0.1, 20  # share of wrong labels; samples looked at, those in most of the conflicting pairs


def with_wrong_labels(data: TensorDataset, seed: int) -> tuple[TensorDataset, set[int]]:
    """Return the data with some labels replaced by another class, and which."""
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(WRONG * len(labels))]
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    labels = labels.index_copy(0, wrong, (labels[wrong] + shift) % 10)
    return TensorDataset(images, labels), set(wrong.tolist())


def shares(pairs: Sequence[Pair], wrong: set[int]) -> tuple[float, float]:
    """Return the share of pairs with a wrong label, and of the samples that are in most pairs, those with one."""
    samples = [[index for origin in pair.origins for index in origin.samples] for pair in pairs]
    most = [index for index, _ in Counter(index for pair in samples for index in pair).most_common(MOST)]
    return (
        sum(any(index in wrong for index in pair) for pair in samples) / len(samples),
        sum(index in wrong for index in most) / len(most),
    )


def picture(pairs: Sequence[Pair], images: Tensor, wrong: set[int]) -> Figure:
    """Draw the images of each pair side by side, with their labels, wrong ones marked."""
    indices = [[origin.samples[0] for origin in pair.origins] for pair in pairs]
    captions = []
    for pair, (i, j) in zip(pairs, indices, strict=True):
        assert pair.labels is not None  # the callback was told where they are
        marked = [
            f"{label} (wrong)" if k in wrong else str(label) for label, k in zip(pair.labels, (i, j), strict=True)
        ]
        captions.append(f"cosine {pair.cosine:.2f}\nlabels {' and '.join(marked)}")
    return plots.plot_pairs(images[torch.tensor(indices)], captions)


class Count(pl.Callback):
    """Prints the shares after each measurement."""

    def __init__(self, confusion: GradientConfusionCallback, wrong: set[int]) -> None:
        self.confusion, self.wrong = confusion, wrong
        self.seen: int | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.confusion.last_step != self.seen:
            self.seen = self.confusion.last_step
            pairs, samples = shares(self.confusion.last_top_pairs, self.wrong)
            print(f"{self.seen:5d} {pairs:28.2f} {samples:28.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a few seconds, too short to learn anything")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`|than the logging interval)")

    pl.seed_everything(options.seed, verbose=False)
    data, wrong = with_wrong_labels(digits(seed=options.seed)[0], options.seed)
    units = 64 if options.fast else 256
    confusion = GradientConfusionCallback(
        every_n_epochs=1 if options.fast else 5, source="fixed", num_units=units, top_pairs=units, labels=1
    )
    chance = 1 - (1 - WRONG) ** 2
    print(f"of the {units} pairs that conflict most, and of the {MOST} samples that are in most of them")
    print(f"{'step':>5} {'pairs with a wrong label':>28} {'samples with a wrong label':>28}")
    print(f"{'':>5} {f'by chance {chance:.2f}':>28} {f'by chance {WRONG:.2f}':>28}")
    logger = TensorBoardLogger("runs", name="label_noise")
    trainer = pl.Trainer(
        max_epochs=1 if options.fast else 15,
        callbacks=[confusion, Count(confusion, wrong)],
        logger=logger,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitClassifier(), DataLoader(data, batch_size=32, shuffle=True))

    path = Path(logger.log_dir, "top_pairs.png")
    picture(confusion.last_top_pairs[:6], data.tensors[0], wrong).savefig(path)
    print(f"the six pairs that conflict most: {path}")


if __name__ == "__main__":
    main()
