"""The minimum falls with depth: skip connections, BatchNorm, orthogonal weights and width."""

from __future__ import annotations

from typing import Any

from common import Result, Run, digits, draw, panels, sgd, span, train
from torch import Tensor, nn

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


class Block(nn.Module):
    def __init__(self, width: int, *, skip: bool, norm: bool) -> None:
        super().__init__()
        self.linear, self.skip = nn.Linear(width, width), skip
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x)).relu()
        return x + out if self.skip else out


def network(
    depth: int,
    width: int = 64,
    *,
    skip: bool = False,
    norm: bool = False,
    weights: str = "he",
    scale: float = 1.0,
) -> nn.Sequential:
    activation = [] if weights == "he" else [nn.Tanh()]
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU() if weights == "he" else nn.Tanh()]
    for _ in range(depth - 1):
        layers += [Block(width, skip=skip, norm=norm)] if weights == "he" else [nn.Linear(width, width), *activation]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
            if weights == "orthogonal":
                nn.init.orthogonal_(layer.weight)
            elif weights == "glorot":
                nn.init.xavier_normal_(layer.weight)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    for block in net.modules():
        if isinstance(block, Block):
            block.linear.weight.data *= scale
    return net


VARIANTS: dict[str, dict[str, Any]] = {
    "4 layers": {"depth": 4},
    "24 layers": {"depth": 24},
    "24, width 256": {"depth": 24, "width": 256},
    "24, skip connections": {"depth": 24, "skip": True},
    "24, skip connections, weights of blocks / 24": {"depth": 24, "skip": True, "scale": 1 / 24},
    "24, BatchNorm": {"depth": 24, "norm": True},
    "24, skip connections and BatchNorm": {"depth": 24, "skip": True, "norm": True},
    "24, tanh": {"depth": 24, "weights": "glorot"},
    "24, tanh, orthogonal": {"depth": 24, "weights": "orthogonal"},
}


def run(fast: bool = False) -> Result:
    steps, early, seeds, rates = (20, 10, (0,), (0.01,)) if fast else (400, 100, range(3), RATES)
    train_set, test = digits()
    table = [
        [
            "network",
            "rate",
            "lowest cosine at step 0",
            "mean until step 100",
            "training loss at step 100",
            "at the end",
            "test accuracy",
        ]
    ]
    first = {}
    for name, options in VARIANTS.items():

        def go(seed: int, rate: float, every: int, options: dict[str, Any] = options) -> Run:
            return train(
                lambda: network(**options),
                train_set,
                steps=steps,
                seed=seed,
                optimizer=sgd(rate),
                num_units=15,
                unit_size=32,
                source="fresh",
                every_n_train_steps=every,
            )

        tried = {rate: go(100, rate, steps).loss(train_set) for rate in rates}
        best = min(tried, key=lambda rate: (tried[rate] != tried[rate], tried[rate]))
        runs = [go(seed, best, 20) for seed in seeds]
        first[name] = runs[0]
        table.append(
            [
                name,
                str(best),
                span([run.at("min_cosine", 0) for run in runs]),
                span([run.mean("min_cosine", 0, early) for run in runs]),
                span([run.mean("train_loss", early - 10, early) for run in runs]),
                span([run.loss(train_set) for run in runs]),
                span([run.accuracy(test) for run in runs]),
            ]
        )
    figure, axes = panels(["training loss", "lowest cosine of mini-batches"], width=8, height=2.8)
    draw(axes[0], first, "train_loss", smooth=10)
    draw(axes[1], first, "min_cosine", smooth=4)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    return Result(table, figure)
