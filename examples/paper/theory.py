"""Study (g): what the theorems say, on random data: the noise floor of SGD, and cosines that concentrate at 0.

Nothing is trained on the data of the protocol here, so `finish` has nothing to do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_gradconf import gradient_gram
from lightning_gradconf.statistics import eta, min_cosine, std_cosine

from .figures import PALE, QUALITATIVE, band, canvas, label, save, sizes_on
from .models import initialise, mlp
from .protocol import Protocol
from .sweep import Finish
from .tables import markdown, spread

SAMPLES, DIMENSIONS = 100, (80, 120)  # of the paper's Figure 1: fewer parameters than samples, and more
RATES = (0.1, 0.2, 0.4, 0.8, 1.2)  # smaller ones would need more epochs to come to their floor
RECORDS = 100  # of loss and eta, at equal distances
# What the networks have where it is not what changes.
BASE = {"depth": 4, "width": 64, "dimension": 64, "samples": 64}
SIZES = {
    "depth": (1, 2, 4, 8, 16, 32),
    "width": (8, 16, 32, 64, 128, 256),
    "dimension": (8, 16, 32, 64, 128, 256),
    "samples": (16, 32, 64, 128, 256),
}


def study(protocol: Protocol, finish: Finish, folder: Path) -> str:
    """Return two tables in Markdown; writes ``regression.png`` and ``concentration.png``."""
    return "\n\n".join([regression(protocol, folder), concentration(protocol, folder)])


# ---- linear regression (Figure 1, Theorems 3.1 and 3.2) --------------------------------------------------------------


def descend(dimension: int, rates: Tensor, epochs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Train linear regressions by SGD with batches of one sample, one regression for each of ``rates`` ``(r,)``.

    Returns:
        Loss above the lowest there is, and eta over all pairs of samples: ``(RECORDS + 1, r)`` each, the first before
        training.
    """
    generator = torch.Generator().manual_seed(seed)
    x = nn.functional.normalize(torch.randn(SAMPLES, dimension, generator=generator, dtype=torch.float64))
    y = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    w = torch.zeros(len(rates), dimension, dtype=torch.float64)
    best = (x @ torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution - y[:, None]).square().mean() / 2
    losses, etas = [], []
    for epoch in range(epochs + 1):
        if epoch % (epochs // RECORDS) == 0:
            residuals = w @ x.T - y  # (r, samples); the gradient of sample i is residual_i x_i
            losses.append(residuals.square().mean(1) / 2 - best)
            etas.append(torch.stack([eta((row[:, None] * x) @ (row[:, None] * x).T) for row in residuals]))
        for i in torch.randint(
            SAMPLES, (SAMPLES,), generator=generator
        ).tolist():  # independent draws, as in the theorem
            w -= rates[:, None] * (w @ x[i] - y[i])[:, None] * x[i]
    return torch.stack(losses), torch.stack(etas)


def regression(protocol: Protocol, folder: Path) -> str:
    epochs, seeds = RECORDS * protocol.epochs, range(protocol.seeds)
    at = range(0, epochs + 1, epochs // RECORDS)
    rates = torch.tensor(RATES, dtype=torch.float64)
    figure, (row,) = canvas(1, 3)
    lines = []
    shown = RATES.index(0.4)
    for dimension, colour in zip(DIMENSIONS, QUALITATIVE, strict=False):
        runs = [descend(dimension, rates, epochs, seed) for seed in seeds]
        losses, etas = (torch.stack(values) for values in zip(*runs, strict=True))  # (seeds, records, rates)
        tail = slice(-RECORDS // 10, None)
        floor, level = losses[:, tail].mean(1), etas[:, tail].mean(1)  # (seeds, rates)
        name = f"d = {dimension}"
        for axes in row[:2]:
            axes.set_yscale("log")
        band(row[0], at, losses[..., shown].clamp(min=1e-12), colour, name)
        band(row[1], at, etas[..., shown].clamp(min=1e-12), colour, name)
        for k, rate in enumerate(RATES):
            size = 12 + 14 * k
            row[2].scatter(level[:, k].clamp(min=1e-12), floor[:, k].clamp(min=1e-12), s=size, color=colour, alpha=0.6)
            lines.append([name, f"{rate:g}", *(scientific(values[:, k]) for values in (floor, level))])
    row[0].set(xlabel="epoch", ylabel="training loss above the lowest", title=f"loss, rate {RATES[shown]:g}")
    row[1].set(xlabel="epoch", ylabel="eta", title="gradient confusion of all pairs")
    row[2].set(xscale="log", yscale="log", xlabel="eta, last tenth", ylabel="loss above the lowest, last tenth")
    row[2].set_title(f"floor, rates {RATES[0]:g} to {RATES[-1]:g} (small to large)")
    label(figure, row[0], f"SGD on linear regression, {SAMPLES} samples in d dimensions")
    save(figure, folder / "regression.png")
    return markdown(["regression", "learning rate", "loss above the lowest, last tenth", "eta, last tenth"], lines)


def scientific(values: Tensor) -> str:
    """Return the geometric mean over seeds, below 1e-12 as 0: what is left there is rounding."""
    mean = values.clamp(min=1e-30).log().mean().exp().item()
    return "0" if mean < 1e-12 else f"{mean:.1e}"


# ---- random data and weights (Theorems 4.1 and 4.2) ------------------------------------------------------------------


def random_gram(depth: int, width: int, dimension: int, samples: int, activation: str, seed: int) -> Tensor:
    """Return the Gram ``(samples, samples)`` of a network with random weights, on random points of the unit sphere.

    Labels are -1 or 1 at random, and the loss is the square of the error.
    """
    torch.manual_seed(seed)
    layer = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
    model = mlp(depth, width, layer, (dimension, 1, 1), 1)
    initialise(model, "msra" if activation == "relu" else "glorot", relu=activation == "relu")
    x = nn.functional.normalize(torch.randn(samples, dimension)) * dimension**0.5  # entries of variance 1
    y = torch.randint(2, (samples, 1)) * 2.0 - 1

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        error: Tensor = model(batch[0]) - batch[1]
        return error.square().mean()

    grams = gradient_gram(model, loss, (x, y), engine="vmap")
    return torch.stack(list(grams.values())).sum(0)


def concentration(protocol: Protocol, folder: Path) -> str:
    seeds = range(protocol.init_seeds)
    figure, axes = canvas(2, len(SIZES))
    lines = []
    for (activation, name), colour in zip({"relu": "ReLU", "tanh": "tanh"}.items(), QUALITATIVE, strict=False):
        for column, (what, sizes) in enumerate(SIZES.items()):
            grams = [
                [random_gram(**BASE | {what: size}, activation=activation, seed=s) for size in sizes] for s in seeds
            ]
            for row, statistic in enumerate((std_cosine, min_cosine)):
                values = [[statistic(gram).item() for gram in of_seed] for of_seed in grams]
                band(axes[row, column], sizes, values, colour, name, marker="o", markersize=3)
                ends = [spread([of_seed[end] for of_seed in values]) for end in (0, -1)]
                lines.append([name, f"{what}, {sizes[0]} to {sizes[-1]}", statistic.__name__, *ends])
    for column, (what, sizes) in enumerate(SIZES.items()):
        for row, name in enumerate(("standard deviation of the cosines", "lowest cosine of all pairs")):
            axes[row, column].set(ylabel=name if column == 0 else "")
            axes[row, column].set_ylim((0, None) if row == 0 else (-1.02, 0.02))
            axes[row, column].axhline(0, color=PALE, linewidth=1, zorder=0)
            sizes_on(axes[row, column], sizes, what)
    fixed = ", ".join(f"{what} {size}" for what, size in BASE.items())
    label(figure, axes[0, 0], f"Random weights, data and labels; where not said otherwise {fixed}")
    save(figure, folder / "concentration.png")
    return markdown(["network", "what grows", "statistic", "at first", "at last"], lines)
