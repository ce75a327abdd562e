"""NaN: which samples have no finite gradient, although the loss is finite."""

from __future__ import annotations

import math

import torch
from common import Result, digits, draw, panels, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gradconf import gradient_gram

BLANK = 100  # the position of a blank image


def distance(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean length of the error: at 0 the root has an infinite derivative, and 0 times that is NaN."""
    return (output - target).pow(2).sum(1).sqrt().mean()


def safe_distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).sum(1).clamp(min=1e-12).sqrt().mean()


def autoencoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 64, bias=False))


def not_finite(net: nn.Module, data: TensorDataset) -> list[int]:
    """Return the positions of the samples whose gradient is not finite."""
    grams = gradient_gram(net, lambda module, batch: distance(module(batch[0]), batch[1]), data.tensors)
    gram = torch.stack(list(grams.values())).sum(0)
    return (~gram.diagonal().isfinite()).nonzero()[:, 0].tolist()


def run(fast: bool = False) -> Result:
    steps = 30 if fast else 200
    images = digits()[0].tensors[0][:512].clone()
    images[BLANK] = 0
    data = TensorDataset(images, images)
    torch.manual_seed(0)
    print(f"samples without a finite gradient: {not_finite(autoencoder(), data)}")
    kept = TensorDataset(*[images[torch.arange(len(images)) != BLANK]] * 2)
    table = [["training", "lowest cosine at step 0", "loss at step 0", "loss at the end"]]
    runs = {}
    for name, part, loss in (
        ("as it is", data, distance),
        ("the blank image taken out", kept, distance),
        ("a root that is safe at 0", data, safe_distance),
    ):
        run = runs[name] = train(autoencoder, part, steps=steps, loss=loss, batch_size=64, num_units=len(part))
        numbers = (run.at("min_cosine", 0), run.at("train_loss", 0), run.loss(part, loss))
        table.append([name, *(f"{number:.2f}".replace("nan", "NaN") for number in numbers)])
    figure, (axes,) = panels(["training loss"], width=4)
    draw(axes, dict(reversed(runs.items())), "train_loss")
    last = max(step for step, loss in runs["as it is"].curve("train_loss").items() if math.isfinite(loss))
    axes.plot(last, runs["as it is"].at("train_loss", last), "x", color="#262626", label="NaN from here on")
    axes.legend(frameon=False, fontsize=7)
    return Result(table, figure)
