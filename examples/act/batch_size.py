"""A mean cosine near 0 and a large noise scale: larger batches, smaller rates, and when neither helps."""

from __future__ import annotations

from typing import Any

import torch
from common import Result, Run, digits, draw, mlp, panels, sgd, span, train
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

# Batch sizes and learning rates: of a regression until it has learned what it can, and of a classifier's first steps.
LATE = ((4, 0.1), (32, 0.1), (256, 0.1), (4, 0.01))
EARLY = ((4, 0.1), (32, 0.1), (256, 0.1), (4, 0.5), (32, 0.5), (256, 0.5))


def patients() -> TensorDataset:
    x, y = load_diabetes(return_X_y=True)
    return TensorDataset(torch.tensor(x / x.std(0)).float(), torch.tensor((y - y.mean()) / y.std()).float())


def linear() -> nn.Linear:
    return nn.Linear(10, 1)


def squared(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output[:, 0], target)


def classifier() -> nn.Sequential:
    return mlp(64, 128, 10)


def run(fast: bool = False) -> Result:
    seeds = (0,) if fast else range(5)
    tasks = (
        ("regression, late", patients(), squared, linear, 20 if fast else 500, LATE),
        ("digits, early", digits()[0], F.cross_entropy, classifier, 30, EARLY),
    )
    table = [["task", "batch", "rate", "mean cosine", "noise scale", "training loss", "samples seen"]]
    first: dict[str, dict[str, Run]] = {}
    for task, data, loss, make, steps, variants in tasks:
        for size, rate in variants:
            runs = []
            for seed in seeds:
                draws = RandomSampler(
                    data, replacement=True, num_samples=size * steps, generator=torch.Generator().manual_seed(seed)
                )
                measured: dict[str, Any] = {"num_units": 256, "every_n_train_steps": steps // 10}
                measured["statistics"] = ["min_cosine", "mean_cosine", "noise_scale"]
                loader = DataLoader(data, size, sampler=draws)
                runs.append(train(make, loader, steps=steps, seed=seed, optimizer=sgd(rate), loss=loss, **measured))
            first.setdefault(task, {})[f"batch {size}, rate {rate}"] = runs[0]
            values = [
                span([run.mean(key, steps // 2, steps) for run in runs], n)
                for key, n in (("mean_cosine", 3), ("noise_scale", 0))
            ]
            table.append(
                [
                    task,
                    str(size),
                    str(rate),
                    *values,
                    span([run.loss(data, loss) for run in runs], 3),
                    str(size * steps),
                ]
            )
    figure, axes = panels(
        [f"{task}: {what}" for task in first for what in ("training loss", "mean cosine")], width=10, height=2.8
    )
    for k, of_task in enumerate(first.values()):
        draw(axes[2 * k], of_task, "train_loss", smooth=50 if k == 0 else 5)
        draw(axes[2 * k + 1], of_task, "mean_cosine")
        axes[2 * k].set_ylim(*((0.4, 1.5) if k == 0 else (0, 2.5)))
        axes[2 * k].legend(frameon=False, fontsize=7, loc="upper right" if k == 0 else "lower left")
    return Result(table, figure)
