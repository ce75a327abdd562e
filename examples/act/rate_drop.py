"""Values before and after the learning rate drops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from common import Result, digits, draw, mlp, panels, sgd, span, train
from torch import Tensor

RATE, FACTOR = 0.3, 0.1
SHOWN = {"min_cosine": 2, "p05_cosine": 2, "mean_cosine": 2, "gradient_norm": 2, "eta": 0, "train_loss": 3}


def run(fast: bool = False) -> Result:
    steps, window, seeds = (60, 20, (0,)) if fast else (900, 200, range(5))
    at = 2 * steps // 3
    train_set, _ = digits()

    def dropping(parameters: Iterable[Tensor]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(parameters, RATE)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [at], gamma=FACTOR)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    runs = {
        name: [
            train(
                lambda: mlp(64, 128, 128, 10),
                train_set,
                steps=steps,
                seed=seed,
                batch_size=8,
                optimizer=optimizer,
                num_units=256,
            )
            for seed in seeds
        ]
        for name, optimizer in (("constant rate", sgd(RATE)), ("rate drops", dropping))
    }
    table = [["steps", "lowest cosine", "5 % quantile", "mean cosine", "gradient norm", "eta", "training loss"]]
    for what, name, stop in (
        ("before the drop", "rate drops", at),
        ("after the drop", "rate drops", steps),
        ("no drop", "constant rate", steps),
    ):
        values = [span([run.mean(key, stop - window, stop) for run in runs[name]], n) for key, n in SHOWN.items()]
        table.append([f"{stop - window} to {stop}, {what}", *values])
    keys = ("train_loss", "p05_cosine", "mean_cosine", "gradient_norm")
    figure, axes = panels(["training loss", "5 % quantile of the cosines", "mean cosine", "gradient norm"], width=10)
    for panel, key in zip(axes, keys, strict=True):
        draw(panel, {name: several[0] for name, several in runs.items()}, key, smooth=20 if key == "train_loss" else 1)
        panel.axvline(at, color="#d9d9d9", zorder=0)
    axes[0].set_yscale("log")
    axes[3].legend(frameon=False, fontsize=7)
    return Result(table, figure)
