"""Typical values: twelve small trainings, measured at their first step, in the middle and at their last step.

Prints the table of docs/reading.md, with n and unit_size of each run. The data comes with scikit-learn and Python;
about four minutes on one core.

    python benchmarks/typical.py [--steps 300] [mlp lstm ...]
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMaskedLM

from lightning_gradconf import GradientConfusionCallback

sys.path[:0] = [str(Path(__file__).parent.parent / "examples"), str(Path(__file__).parent.parent / "examples" / "act")]
from common import InMemory, mlp  # noqa: E402
from digits import DigitClassifier  # noqa: E402
from gan_digits import GAN, with_noise  # noqa: E402
from gpt_stdlib import ByteGPT, windows  # noqa: E402
from tabular import Regressor, patients  # noqa: E402
from vit_digits import DigitTransformer  # noqa: E402
from vit_digits import digits as dictionaries  # noqa: E402

KEYS = ("min_cosine", "p05_cosine", "mean_cosine", "negative_fraction", "gradient_norm", "eta")
MASK = 256  # the token that stands for a hidden byte


class Module(pl.LightningModule):
    """A network, the loss of a batch as a function of it, and Adam."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Tensor], rate: float = 1e-3) -> None:
        super().__init__()
        self.net, self.loss, self.rate = net, loss, rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.net, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate)


class Training(NamedTuple):
    """What is trained, and the units that are compared."""

    name: str
    module: pl.LightningModule
    data: Any
    units: int = 32
    unit_size: int = 1
    batch_size: int = 64
    options: dict[str, Any] = {}  # noqa: RUF012


def images(*shape: int) -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16).float().view(-1, *shape), torch.tensor(y))


def classify(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out.relu()


def resnet() -> nn.Sequential:
    blocks = [Residual(32) for _ in range(4)]
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


class NextByte(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = (
            nn.Embedding(256, 64),
            nn.LSTM(64, 128, batch_first=True),
            nn.Linear(128, 256),
        )

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(text))[0])
        return logits


def next_byte(net: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (text,) = batch
    return F.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=257,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=65,
        )
    )


def masked(samples: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Return a batch of texts in which one byte in seven is hidden and to be found."""
    text = torch.stack([sample for (sample,) in samples])
    hidden = (torch.arange(text.shape[1]) + torch.randint(7, (len(text), 1))) % 7 == 0
    return {"input_ids": text.where(~hidden, MASK), "labels": text.where(hidden, -100)}


class Graph(nn.Module):
    """Three layers of means over neighbours, on the bright pixels of an image as a graph."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * before, width) for before in (3, width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
        place = torch.stack([y.flatten(), x.flatten()], 1)
        near = (torch.cdist(place, place) < 0.45).float()
        bright = (images > 0.25).float()
        edges = near * bright[:, :, None] * bright[:, None, :]  # also from each node to itself
        edges = edges / edges.sum(2, keepdim=True).clamp(min=1)
        nodes = torch.cat([images[:, :, None], place.expand(len(images), -1, -1)], 2)
        for layer in self.layers:
            nodes = layer(torch.cat([nodes, edges @ nodes], 2)).relu()
        logits: Tensor = self.head((nodes * bright[:, :, None]).sum(1) / bright.sum(1, keepdim=True))
        return logits


def contrast(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Two noisy views of an image shall be more alike than those of different images."""
    x = batch[0]
    first, second = (F.normalize(net(x + 0.3 * torch.randn_like(x)), dim=1) for _ in range(2))
    return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(x)))


def tumours() -> TensorDataset:
    x, y = load_breast_cancer(return_X_y=True)
    return TensorDataset(torch.tensor((x - x.mean(0)) / x.std(0)).float(), torch.tensor(y))


TRAININGS: dict[str, Callable[[], Training]] = {
    "mlp": lambda: Training("MLP, digits", Module(mlp(64, 128, 128, 10), classify), images(64)),
    "cnn": lambda: Training("CNN, digits", DigitClassifier(), images(1, 8, 8)),
    "resnet": lambda: Training("ResNet with BatchNorm, digits", Module(resnet(), classify), images(1, 8, 8), 16, 8),
    "vit": lambda: Training("ViT, digits", DigitTransformer(), dictionaries(0)[0]),
    "gpt": lambda: Training("GPT, bytes of source code", ByteGPT(), windows(40), batch_size=32),
    "bert": lambda: Training(
        "BERT, masked bytes",
        Module(bert(), lambda net, batch: net(**batch).loss),
        windows(40),
        options={"collate_fn": masked},
    ),
    "lstm": lambda: Training("LSTM, bytes of source code", Module(NextByte(), next_byte), windows(40)),
    "gan": lambda: Training(
        "GAN, digits", GAN(), TensorDataset(images(64).tensors[0]), options={"collate_fn": with_noise}
    ),
    "table": lambda: Training("classification of a table", Module(mlp(30, 64, 64, 2), classify), tumours()),
    "graph": lambda: Training("graph network, digits", Module(Graph(), classify, 3e-3), images(64)),
    "contrastive": lambda: Training("contrastive, digits", Module(mlp(64, 128, 64), contrast), images(64), 16, 8, 128),
    "regression": lambda: Training("regression on a table", Regressor(), patients()[0]),
}


def curves(training: Training, steps: int) -> dict[str, dict[int, float]]:
    logger = InMemory()
    measure = GradientConfusionCallback(
        every_n_train_steps=steps // 2,
        num_units=training.units,
        unit_size=training.unit_size,
        source="current" if training.units * training.unit_size <= training.batch_size else "fresh",
    )
    loader = DataLoader(training.data, training.batch_size, shuffle=True, drop_last=True, **training.options)
    # A step of manual optimisation with two optimizers counts twice.
    each = 2 if not training.module.automatic_optimization else 1
    trainer = pl.Trainer(
        max_steps=steps * each,
        max_epochs=-1,
        accelerator="cpu",
        logger=logger,
        callbacks=[measure],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(training.module, loader)
    return logger.curves


def rows(training: Training, found: dict[str, dict[int, float]]) -> list[str]:
    """Return the row of a training, or one for each network of a GAN: at the start, in the middle and at the end."""
    lines = []
    for infix, network in (("", ""), ("0/", ", discriminator"), ("1/", ", generator")):
        if f"gradient_confusion/{infix}eta" in found:
            of = [found[f"gradient_confusion/{infix}{key}"].values() for key in KEYS]
            cells = [f"{training.name}{network}", str(training.units), str(training.unit_size)]
            # Adding 0 makes 0 of -0.
            cells += ["<br>".join(f"{round(value, 2) + 0.0:.2f}" for value in values) for values in of[:4]]
            cells += ["<br>".join(f"{float(f'{value:.2g}'):g}" for value in values) for values in of[4:]]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRAININGS)}; all by default")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(many workers|LeafSpec|no `val_dataloader`|logging interval)")
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    print("| training | n | unit_size | lowest cosine | 5 % quantile | mean | negative | norm | eta |")
    print("|" + "---|" * 9)
    for name in args.names or TRAININGS:
        pl.seed_everything(0, verbose=False)
        training = TRAININGS[name]()
        print("\n".join(rows(training, curves(training, args.steps))), flush=True)


if __name__ == "__main__":
    main()
