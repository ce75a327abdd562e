"""A small GPT learns to continue the source of the Python standard library, byte by byte.

The text is what is installed with Python, so nothing is downloaded. Gradients are those of whole windows of 64 bytes.

    make example NAME=gpt_stdlib
"""

from __future__ import annotations

import argparse
import sysconfig
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.plots import plot_curves

LENGTH, WIDTH, HEADS, LAYERS = 64, 128, 4, 3


class ByteGPT(pl.LightningModule):
    """A transformer before whose every layer stands a norm, and which sees the past only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position
        future = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=text.device)
        for block in self.blocks:
            x = block(x, src_mask=future, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        (text,) = batch
        logits = self(text[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        accuracy = (logits.argmax(-1) == text[:, 1:]).float().mean()
        self.log_dict({"train_loss": loss, "train_accuracy": accuracy}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def windows(files: int) -> TensorDataset:
    """Return windows of LENGTH + 1 bytes of the first modules of the standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    text = torch.frombuffer(bytearray(b"".join(source.read_bytes() for source in sources)), dtype=torch.uint8)
    return TensorDataset(text.long()[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-dir", default="runs", help="where TensorBoard's event files go")
    parser.add_argument("--picture", help="where the curves go (default: confusion.png beside the event files)")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that everything works")
    args = parser.parse_args()

    # Lightning recommends worker processes; for a few megabytes in memory they only cost time.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch's pytree in a way that torch deprecates; nothing a reader of this example can change.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    pl.seed_everything(0)
    logger = TensorBoardLogger(args.save_dir, name="gpt_stdlib", default_hp_metric=False)
    trainer = pl.Trainer(
        max_steps=4 if args.fast else args.steps,
        devices=1,
        logger=logger,
        log_every_n_steps=2 if args.fast else 20,
        # By default the interval is stretched until measuring takes 5 % of the run. One that is given is kept.
        callbacks=[GradientConfusionCallback(every_n_train_steps=2 if args.fast else 20)],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = windows(files=5 if args.fast else 120)
    trainer.fit(ByteGPT(), DataLoader(data, batch_size=32, shuffle=True, drop_last=True))

    picture = args.picture or Path(logger.log_dir) / "confusion.png"
    plot_curves(logger.log_dir).savefig(picture)
    print(f"\nThe curves are in {picture}\npython -m lightning_gradconf {args.save_dir}")


if __name__ == "__main__":
    main()
