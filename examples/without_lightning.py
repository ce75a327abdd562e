"""Gradient confusion in a plain PyTorch loop, on scikit-learn's bundled handwritten digits.

Two ways to look at it:

* every few steps, the gradients of single samples, with ``gradient_gram`` and ``gradient_statistics``;
* at the end of every epoch, the gradients of whole mini-batches at the same weights, with the
  ``GradientConfusion`` metric, which takes gradients wherever they come from.

    make example NAME=without_lightning
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_gradconf import GradientConfusion, gradient_gram, gradient_statistics


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--every", type=int, default=20, help="compare samples every so many training steps")
    parser.add_argument("--save-dir", default="runs/without_lightning", help="where TensorBoard's event files go")
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that everything works")
    args = parser.parse_args()
    if args.fast:
        args.epochs = 1

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    probe = list(DataLoader(data, batch_size=128, drop_last=True))  # the same mini-batches after every epoch

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = GradientConfusion()

    step = 0
    with SummaryWriter(f"{args.save_dir}/{time.strftime('%Y%m%d-%H%M%S')}") as writer:
        for epoch in range(args.epochs):
            for batch in loader:
                if step % args.every == 0:
                    gram = gradient_gram(model, loss_fn, [part[:32] for part in batch])  # {parameter: (32, 32)}
                    statistics = gradient_statistics(torch.stack([*gram.values()]).sum(0))
                    for name, value in statistics.items():
                        writer.add_scalar(f"samples/{name}", value, step)
                    print(f"step {step:5d}  32 samples       {show(statistics)}")
                optimizer.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                writer.add_scalar("train_loss", loss.detach(), step)
                step += 1

            for batch in probe:
                gradients = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
                metric.update([gradient[None] for gradient in gradients])  # (1, *shape) for each parameter
            statistics = metric.compute()
            metric.reset()
            for name, value in statistics.items():
                writer.add_scalar(f"mini_batches/{name}", value, step)
            print(f"epoch {epoch + 1:4d}  {len(probe)} mini-batches  {show(statistics)}")

    print(f"\ntensorboard --logdir {args.save_dir}")


def show(statistics: dict[str, Tensor]) -> str:
    return "  ".join(f"{name} {float(statistics[name]):8.4f}" for name in ("eta", "min_cosine", "negative_fraction"))


if __name__ == "__main__":
    main()
