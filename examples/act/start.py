"""All gradients aligned at the start: the output bias is far from what the targets are on average."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
from common import Result, Run, draw, mlp, panels, span, train
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

CONTEXT = 8


def patients() -> TensorDataset:
    """Return the progress of 442 patients in hundreds, whose mean is 1.5 and not 0."""
    x, y = load_diabetes(return_X_y=True)
    return TensorDataset(torch.tensor(x / x.std(0)).float(), torch.tensor(y / 100).float())


def text(files: int) -> TensorDataset:
    """Return eight bytes of Python's standard library each, and the byte that follows."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in sources)), dtype=torch.uint8).long()
    windows = data.unfold(0, CONTEXT + 1, 7)
    return TensorDataset(windows[:, :-1].contiguous(), windows[:, -1].contiguous())


def squared(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output[:, 0], target)


def next_byte() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), *mlp(16 * CONTEXT, 128, 256))


def run(fast: bool = False) -> Result:
    steps, seeds = (20, (0,)) if fast else (200, range(5))
    progress, following = patients(), text(3 if fast else 30)
    counts = torch.bincount(following.tensors[1], minlength=256) + 1.0
    mean, frequencies = progress.tensors[1].mean(), (counts / counts.sum()).log()
    tasks: tuple[Any, ...] = (
        ("regression", "mean of the targets", lambda: mlp(10, 64, 64, 1), progress, squared, mean, {}),
        ("text", "log of the frequencies", next_byte, following, F.cross_entropy, frequencies,
         {"num_units": 16, "unit_size": 32}),
    )  # fmt: skip
    table = [["task", "output bias", "mean cosine at step 0", "at step 20", "training loss at step 20", "at the end"]]
    first: dict[str, dict[str, Run]] = {}
    for task, what, make, data, loss, value, units in tasks:

        def prepare(net: Any, value: Tensor = value) -> None:
            net[-1].bias.data.copy_(value)

        for name, change in (("as PyTorch sets it", None), (what, prepare)):
            runs = [
                train(
                    make,
                    data,
                    steps=steps,
                    seed=seed,
                    loss=loss,
                    optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
                    prepare=change,
                    every_n_train_steps=5,
                    **units,
                )
                for seed in seeds
            ]
            cosines = [span([run.at("mean_cosine", step) for run in runs]) for step in (0, 20)]
            losses = [span([run.mean("train_loss", *part) for run in runs]) for part in ((15, 20), (steps - 20, steps))]
            table.append([task, name, *cosines, *losses])
            first.setdefault(task, {})[name] = runs[0]
    figure, axes = panels([f"{task}: {what}" for task in first for what in ("mean cosine", "training loss")], width=10)
    for k, of_task in enumerate(first.values()):
        draw(axes[2 * k], of_task, "mean_cosine")
        draw(axes[2 * k + 1], of_task, "train_loss", smooth=5)
        axes[2 * k + 1].legend(frameon=False, fontsize=7)
    return Result(table, figure)
