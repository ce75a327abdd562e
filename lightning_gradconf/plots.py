"""Figures of a Gram matrix of gradients; they need matplotlib, an optional extra, and leave pyplot alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradconf.statistics import (
    _checked_labels,
    cosine_matrix,
    mean_cosine,
    min_cosine,
    negative_fraction,
    pairwise_cosines,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEGATIVE, _POSITIVE, _INK, _PALE = "#c44e52", "#4c80b6", "#262626", "#d9d9d9"
_MOST_CLASSES = 20  # more lines and names would hide what they mark


def plot_gram(gram: Tensor, *, labels: Tensor | None = None) -> Figure:
    """Heatmap of the cosines of a Gram ``(n, n)``: red where two gradients disagree, blue where they agree.

    Units are ordered by class if ``labels`` ``(n,)`` are given. Zero gradients are hatched. Raises ``ImportError``
    without matplotlib.

    >>> plot_gram(torch.eye(3)).axes[0].get_xlabel()
    'unit'
    """
    figure = _figure(width=5.4, height=4.8)
    axes = figure.subplots()
    cosines = cosine_matrix(gram)
    if labels is not None:
        labels = _checked_labels(cosines, labels)
        order = labels.argsort(stable=True)
        cosines = cosines[order][:, order]
    axes.patch.set(facecolor="white", edgecolor=_PALE, hatch="/////")  # shows through the image where it is NaN
    image = axes.imshow(cosines.detach().cpu().numpy(), cmap="RdBu", vmin=-1, vmax=1)
    bar = figure.colorbar(image, ax=axes, label="cosine of two gradients", ticks=[-1, -0.5, 0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    summary = f"min {_number(min_cosine(gram))}, mean {_number(mean_cosine(gram))}"
    axes.set(xlabel="unit", ylabel="unit", title=f"{len(gram)} gradients: {summary}")
    axes.locator_params(integer=True)
    if labels is not None:
        _mark_classes(axes, labels)
    return _finished(figure, axes)


def plot_density(gram: Tensor) -> Figure:
    """Histogram, of area 1, of the cosines of all pairs of a Gram ``(n, n)``, with their minimum and mean marked.

    The density of the paper's Section 7 (https://arxiv.org/abs/1904.06963). Pairs with a zero gradient are left out.
    Raises ``ImportError`` without matplotlib.

    >>> plot_density(torch.eye(3)).axes[0].get_xlabel()
    'cosine of two gradients'
    """
    figure = _figure(width=5.6, height=3.4)
    axes = figure.subplots()
    cosines = pairwise_cosines(gram).detach().cpu()
    axes.set(xlim=(-1.02, 1.02), xlabel="cosine of two gradients", ylabel="density", title=f"{len(gram)} gradients")
    axes.spines[["top", "right"]].set_visible(False)
    if len(cosines) == 0:
        axes.text(0, 0.5, "no cosines: the gradients are zero or not finite", ha="center", va="center", color=_INK)
        return _finished(figure, axes)
    axes.set_title(f"{len(gram)} gradients: {_number(100 * negative_fraction(gram), digits=0)} % of pairs negative")
    width = 3.5 * cosines.std(correction=0).item() / len(cosines) ** (1 / 3)  # Scott's rule
    bins = 2 * round(min(max(1 / max(width, 1e-6), 12), 60))  # even, so that no bar straddles zero
    heights = torch.histc(cosines, bins, min=-1, max=1) * bins / 2 / len(cosines)
    centres = (torch.arange(bins) + 0.5) * 2 / bins - 1
    colours = [_NEGATIVE if centre < 0 else _POSITIVE for centre in centres.tolist()]
    axes.bar(centres.numpy(), heights.numpy(), width=1.9 / bins, color=colours)
    for name, cosine, style in (("min", min_cosine(gram), ":"), ("mean", mean_cosine(gram), "-")):
        axes.axvline(cosine.item(), color=_INK, linestyle=style, linewidth=1.2, label=f"{name} {_number(cosine)}")
    axes.legend(loc="upper right" if mean_cosine(gram) < 0 else "upper left", frameon=False, labelcolor=_INK)
    return _finished(figure, axes)


def _figure(*, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "lightning_gradconf[plots]"') from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")  # pyplot would keep it alive for ever


def _mark_classes(axes: Axes, labels: Tensor) -> None:
    """Lines between the blocks of classes, and their names."""
    classes, counts = torch.unique(labels.cpu(), return_counts=True)
    if len(classes) > _MOST_CLASSES:
        axes.set(xlabel="unit, by class", ylabel="unit, by class")
        return
    ends = counts.cumsum(0)
    for end in ends[:-1].tolist():
        axes.axhline(end - 0.5, color=_INK, linewidth=0.6)
        axes.axvline(end - 0.5, color=_INK, linewidth=0.6)
    centres = (ends - (counts + 1) / 2).tolist()
    names = [str(label) for label in classes.tolist()]
    axes.set(xlabel="class", ylabel="class", xticks=centres, yticks=centres, xticklabels=names, yticklabels=names)


def _number(value: Tensor, digits: int = 2) -> str:
    return f"{value.item():.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _finished(figure: Figure, axes: Axes) -> Figure:
    """The figure in quiet colours: the data should stand out, not its frame."""
    axes.title.set(fontsize=10, color=_INK)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_color(_PALE)
    return figure
