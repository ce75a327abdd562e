"""A learning rate that is too large."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from common import Result, digits, draw, mlp, panels, sgd, span, train
from torch import Tensor

STATISTICS = ["min_cosine", "negative_fraction", "gradient_norm"]


def warmed_up(parameters: Iterable[Tensor]) -> dict[str, Any]:
    optimizer = torch.optim.SGD(parameters, 2.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(fast: bool = False) -> Result:
    steps, seeds = (30, (0,)) if fast else (400, range(5))
    train_set, test = digits()
    variants: dict[str, dict[str, Any]] = {
        "0.1": {"optimizer": sgd(0.1)},
        "0.3": {"optimizer": sgd(0.3)},
        "1": {"optimizer": sgd(1.0)},
        "2": {"optimizer": sgd(2.0)},
        "2, warmed up over 100 steps": {"optimizer": warmed_up},
        "2, gradients clipped to a norm of 0.5": {"optimizer": sgd(2.0), "clip": 0.5},
    }
    table = [
        ["learning rate", "lowest cosine at step 10", "at the end", "pairs in conflict at the end", "gradient norm"]
    ]
    table[0] += ["layers without a gradient", "training loss", "test accuracy"]
    first = {}
    for name, options in variants.items():
        runs = [
            train(
                lambda: mlp(64, 128, 128, 10),
                train_set,
                steps=steps,
                seed=seed,
                statistics=STATISTICS,
                per_layer=True,
                **options,
            )
            for seed in seeds
        ]
        first[name] = runs[0]
        silent = [sum(math.isnan(run.at(f"min_cosine/net.{layer}", steps)) for layer in (0, 2, 4)) for run in runs]
        table.append(
            [
                name,
                span([run.at("min_cosine", 10) for run in runs]),
                *(span([run.at(key, steps) for run in runs]) for key in STATISTICS),
                span(silent, 0),
                span([run.loss(train_set) for run in runs]),
                span([run.accuracy(test) for run in runs]),
            ]
        )
    figure, axes = panels(["training loss", "lowest cosine", "share of pairs in conflict"], width=10)
    keys = ("train_loss", "min_cosine", "negative_fraction")
    for panel, key in zip(axes, keys, strict=True):
        draw(panel, first, key, smooth=10 if key == "train_loss" else 1)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    return Result(table, figure)
