"""How the statistics depend on the number of units and on their size, measured on scikit-learn's digits.

A CNN like that of examples/digits.py is trained; at its start, in the middle and at its end the Gram of 1024 samples is
computed, once. Its submatrices are the Grams of fewer samples, and since the loss is a mean and nothing mixes samples,
its block means are the Grams of larger units, so every point below is exact and the average of many draws.

    python benchmarks/reading.py [--picture docs/images/reading_n_and_unit_size.png]
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradconf import gradient_gram, gradient_statistics

NAMES = ("min_cosine", "p05_cosine", "mean_cosine")
COLOURS = {"min_cosine": "#c44e52", "p05_cosine": "#dd8452", "mean_cosine": "#4c80b6"}
SAMPLES, DRAWS, UNITS = 1024, 200, 16
COUNTS = [4, 8, 16, 32, 64, 128, 256, 512]
SIZES = [1, 2, 4, 8, 16, 32, 64]


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def grams(epochs: int) -> dict[str, Tensor]:
    """``{moment: Gram (SAMPLES, SAMPLES)}`` in float64."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = images.float().view(-1, 1, 8, 8) / 16
    model, found = network(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = torch.randperm(len(x))
    chosen = order[:SAMPLES]
    for epoch in range(epochs + 1):
        if epoch in (0, epochs // 4, epochs):
            parts = gradient_gram(model, loss_fn, (x[chosen], labels[chosen])).values()
            found[f"after {epoch} epochs"] = torch.stack([part.double() for part in parts]).sum(0)
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            loss_fn(model, (x[batch], labels[batch])).backward()
            optimizer.step()
    return found


def of_units(gram: Tensor, units: int, size: int) -> dict[str, float]:
    """Mean statistics of ``units`` units of ``size`` samples drawn anew DRAWS times."""
    sums = dict.fromkeys(NAMES, 0.0)
    for _ in range(DRAWS):
        drawn = torch.randperm(len(gram))[: units * size]
        blocks = gram[drawn][:, drawn].view(units, size, units, size).mean((1, 3))
        for name, value in gradient_statistics(blocks, NAMES).items():
            sums[name] += value.item() / DRAWS
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--picture", help="where to save the figure")
    args = parser.parse_args()
    torch.manual_seed(0)

    moments = grams(args.epochs)
    figure = Figure(figsize=(9, 2.6 * len(moments)), dpi=120, layout="constrained")
    grid = figure.subplots(len(moments), 2, sharey=True, sharex="col")
    for (moment, gram), row in zip(moments.items(), grid, strict=True):
        for axes, what, values in ((row[0], "units of 1 sample", COUNTS), (row[1], f"{UNITS} units", SIZES)):
            by_count = axes is row[0]
            points = [of_units(gram, value, 1) if by_count else of_units(gram, UNITS, value) for value in values]
            for name in NAMES:
                axes.plot(values, [point[name] for point in points], ".-", color=COLOURS[name], label=name)
                print(f"{moment}, {what}: {name} {[round(point[name], 3) for point in points]} at {values}")
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
            axes.axhline(0, color="#d9d9d9", linewidth=0.8, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{moment}, {what}", fontsize=10)
        row[0].set_ylabel("cosine")
    grid[-1][0].set_xlabel("number of units, num_units")
    grid[-1][1].set_xlabel("samples in a unit, unit_size")
    grid[0][0].legend(frameon=False)
    if args.picture:
        figure.savefig(args.picture)


if __name__ == "__main__":
    main()
