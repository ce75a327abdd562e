"""What the figures of all studies share: lines with mean and standard deviation over seeds, densities, colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.stats import gaussian_kde

from .moments import Record, curve

INK, PALE = "#262626", "#d9d9d9"
QUALITATIVE = ("#4c80b6", "#c44e52", "#55a868", "#8172b3", "#937860", "#da8bc3")


def shades(count: int) -> list[Any]:
    """Return colours from light to dark, for something that grows."""
    return [matplotlib.colormaps["viridis_r"](x) for x in np.linspace(0.15, 0.95, count)]


def canvas(rows: int, columns: int) -> tuple[Figure, Any]:
    """Return a figure and its axes, ``(rows, columns)``."""
    figure = Figure(figsize=(4.1 * columns, 3.3 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(PALE)
        each.tick_params(which="both", colors=INK, labelsize=8)
    return figure, axes


def band(axes: Axes, x: Any, values: Any, colour: Any, name: str, **style: Any) -> None:
    """Mean over seeds and their sample standard deviation; ``values`` is (seeds, x), NaN where a run had ended.

    On a logarithmic axis both are of the logarithm.
    """
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).any():
        return
    logarithmic = axes.get_yscale() == "log"
    if logarithmic:
        values = np.log(np.where(values > 0, values, np.nan))
    count = np.isfinite(values).sum(axis=0)
    x, values, count = np.asarray(x)[count > 0], values[:, count > 0], count[count > 0]
    mean = np.nanmean(values, axis=0)
    deviation = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / np.maximum(count - 1, 1))
    lines = [mean, mean - deviation, mean + deviation]
    middle, low, high = np.exp(lines) if logarithmic else lines
    axes.plot(x, middle, color=colour, label=name, linewidth=1.6, **style)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def density(axes: Axes, records: Sequence[Record], colour: Any, name: str) -> None:
    """Kernel density of the pairwise cosines at the end of training, of each seed, as a band; no diverged runs."""
    grid = np.linspace(-1, 1, 201)
    samples = [record["cosines"] for record in records if len(set(record["cosines"])) > 2]
    if samples:
        band(axes, grid, [gaussian_kde(sample)(grid) for sample in samples], colour, name)


def training(groups: dict[str, list[Record]], colours: Sequence[Any], title: str) -> Figure:
    """Loss, lowest cosine and final density side by side, a colour for each group of seeds."""
    figure, (row,) = canvas(1, 3)
    training_row(row, groups, colours)
    label(figure, row[0], title)
    return figure


def whole_numbers(axes: Axes) -> None:
    """Write only whole numbers at the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))


def training_row(row: Sequence[Axes], groups: dict[str, list[Record]], colours: Sequence[Any]) -> None:
    """Draw loss, lowest cosine and final density of all runs, also of those that fail."""
    row[0].set(yscale="log", xlabel="epoch", ylabel="training loss (nats)", title="loss")
    row[2].set(xlabel="cosine of two mini-batches", ylabel="density", title="all pairs after training", xlim=(-1, 1))
    for colour, (name, records) in zip(colours, groups.items(), strict=True):
        epochs = range(records[0]["run"]["epochs"] + 1)
        band(row[0], epochs, [curve(record, "loss") for record in records], colour, name)
        density(row[2], records, colour, name)
    confusion(row[1], groups, colours, "gradient confusion of mini-batches")
    whole_numbers(row[0])
    plain_logarithm(row[0])
    row[2].set_ylim(bottom=0)  # where the band of a density is one
    row[2].axvline(0, color=PALE, linewidth=1, zorder=0)


def confusion(axes: Axes, groups: dict[str, list[Record]], colours: Sequence[Any], title: str) -> None:
    """Draw the lowest cosine through training, a colour for each group of seeds."""
    axes.set(xlabel="epoch", ylabel="lowest cosine of all pairs", title=title)
    for colour, (name, records) in zip(colours, groups.items(), strict=True):
        epochs = range(records[0]["run"]["epochs"] + 1)
        band(axes, epochs, [curve(record, "min_cosine") for record in records], colour, name)
    whole_numbers(axes)
    axes.axhline(0, color=PALE, linewidth=1, zorder=0)
    cosines(axes)


def cosines(axes: Axes) -> None:
    """Leave out of the y axis where a band of mean and deviation is no cosine any more."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -1.02), min(high, 1.02))


def plain_logarithm(axes: Axes) -> None:
    """Put the ticks of a logarithmic y axis at 1, 2 and 5 times powers of ten, as plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def sizes_on(axes: Axes, sizes: Sequence[int], name: str) -> None:
    """Draw a logarithmic x axis with a tick at each size."""
    axes.set(xscale="log", xlabel=name)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.minorticks_off()


def label(figure: Figure, axes: Axes, title: str, columns: int = 6) -> None:
    """Write one title and one legend, that of ``axes``, for the whole figure."""
    for each in figure.axes:
        each.title.set_fontsize(10)
        each.xaxis.label.set_fontsize(9)
        each.yaxis.label.set_fontsize(9)
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, color=INK)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
