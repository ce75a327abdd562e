"""Figures of Grams and of runs; they need matplotlib, an optional extra, and leave pyplot alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_gradconf.reports.saved_runs import Curve, accuracy_keys, loss_keys, read_sources, with_confusion
from lightning_gradconf.reports.settings import Settings, why_not_comparable
from lightning_gradconf.statistics import (
    _checked_labels,
    between_class_cosine,
    cosine_matrix,
    mean_cosine,
    min_cosine,
    pairwise_cosines,
    within_class_cosine,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NEGATIVE, _POSITIVE, _INK, _PALE = "#c44e52", "#4c80b6", "#262626", "#d9d9d9"
_COLOURS = (_POSITIVE, "#dd8452", "#55a868", _NEGATIVE, "#8172b3", "#937860", "#64b5cd", "#8c8c8c")  # of runs
_LINES = ("-", "--", ":")  # of keys
_MOST_CLASSES = 20  # more lines and names would hide what they mark
_MOST_WRITTEN = 12  # more numbers would not fit their cells
_MOST_LAYERS = 80  # more names would touch
_MOST_KERNELS = 4000  # 2 000 000 pairs of 2000 units would take a minute
_NARROWEST = 0.005  # bandwidth that the points of a density resolve


def plot_gram(gram: Tensor, *, labels: Tensor | None = None) -> Figure:
    """Draw a heatmap of the cosines of a Gram ``(n, n)``: red where two gradients disagree, blue where they agree.

    Units are ordered by class if ``labels`` ``(n,)`` are given. Zero gradients are hatched. Raises ``ImportError``
    without matplotlib.

    >>> plot_gram(torch.eye(3)).axes[0].get_xlabel()
    'unit'
    """
    cosines, lowest, mean = cosine_matrix(gram), min_cosine(gram), mean_cosine(gram)
    if labels is not None:
        labels = _checked_labels(cosines, labels)
        order = labels.argsort(stable=True)
        cosines = cosines[order][:, order]
    figure, axes = _heatmap(cosines, "cosine of two gradients", width=5.4, height=4.8)
    axes.set(xlabel="unit", ylabel="unit", title=f"{len(gram)} gradients: min {_number(lowest)}, mean {_number(mean)}")
    axes.locator_params(integer=True)
    if labels is not None:
        _mark_classes(axes, labels)
    _quiet(axes)
    return figure


def plot_density(gram: Tensor) -> Figure:
    """Draw the density of the cosines of all pairs of a Gram ``(n, n)``, with their minimum and mean marked.

    Bars are a histogram of area 1; the line is a Gaussian kernel density estimate of the same area, as in the paper's
    Section 7 (https://arxiv.org/abs/1904.06963), by scipy's rule of bandwidth, folded back at -1 and 1 where cosines
    end. There are only bars where the cosines are too few or too close for a line, and without scipy. Pairs with a
    zero gradient are left out. Raises ``ImportError`` without matplotlib.

    >>> plot_density(torch.eye(3)).axes[0].get_xlabel()
    'cosine of two gradients'
    """
    figure = _figure(width=5.6, height=3.4)
    draw_density(figure.subplots(), gram)
    return figure


def draw_density(axes: Axes, gram: Tensor) -> None:
    """Draw what ``plot_density`` shows in axes that are there already."""
    cosines = pairwise_cosines(gram).detach().cpu()
    axes.set(xlim=(-1.02, 1.02), xlabel="cosine of two gradients", ylabel="density", title=f"{len(gram)} gradients")
    axes.spines[["top", "right"]].set_visible(False)
    if len(cosines) == 0:
        axes.text(0, 0.5, "no cosines: the gradients are zero or not finite", ha="center", va="center", color=_INK)
        return _quiet(axes)
    lowest, mean, negative = cosines.min(), cosines.mean(), 100 * (cosines < 0).float().mean()
    axes.set_title(f"{len(gram)} gradients: {_number(negative, digits=0)} % of pairs negative")
    width = 3.5 * cosines.std(correction=0).item() / len(cosines) ** (1 / 3)  # Scott's rule
    bins = 2 * round(min(max(1 / max(width, 1e-6), 12), 60))  # even, so that no bar straddles zero
    heights, edges = torch.histogram(cosines, bins, range=(-1, 1), density=True)
    colours = [_NEGATIVE] * (bins // 2) + [_POSITIVE] * (bins // 2)
    axes.bar((edges[:-1] + 1 / bins).numpy(), heights.numpy(), width=1.9 / bins, color=colours, alpha=0.45)
    if (density := _density(cosines)) is not None:
        axes.plot(*density, color=_INK, linewidth=1.4)
    for name, cosine, style in (("min", lowest, ":"), ("mean", mean, "--")):
        axes.axvline(cosine.item(), color=_INK, linestyle=style, linewidth=1, label=f"{name} {_number(cosine)}")
    axes.legend(loc="upper right" if mean < 0 else "upper left", frameon=False, labelcolor=_INK)
    _quiet(axes)


def plot_classes(gram: Tensor, labels: Tensor) -> Figure:
    """Draw a heatmap of the mean cosine of each pair of classes, for integer ``labels`` ``(n,)``.

    Pairs are counted; those of the diagonal are within a class. Classes without a pair are hatched. Raises
    ``ImportError`` without matplotlib.

    >>> plot_classes(torch.eye(4), torch.tensor([0, 0, 1, 1])).axes[0].get_xlabel()
    'class'
    """
    cosines = cosine_matrix(gram).detach().cpu()
    labels = _checked_labels(cosines, labels)
    classes, index = torch.unique(labels, return_inverse=True)
    members = torch.nn.functional.one_hot(index, len(classes)).to(cosines.dtype)
    pairs = cosines.isfinite().to(cosines.dtype).fill_diagonal_(0)
    counts = members.T @ pairs @ members
    means = members.T @ (cosines.nan_to_num() * pairs) @ members / counts  # 0 / 0 is NaN: no pair
    counts.diagonal().div_(2)  # each pair within a class was met twice
    within = _number(within_class_cosine(gram, labels))
    between = _number(between_class_cosine(gram, labels))

    figure, axes = _heatmap(means, "mean cosine", width=5.8, height=5.0)
    axes.set(xlabel="class", ylabel="class", title=f"{len(gram)} gradients: within classes {within}, between {between}")
    if len(names := [str(label) for label in classes.tolist()]) <= _MOST_CLASSES:
        axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
    if len(classes) <= _MOST_WRITTEN:
        for i, j in (means.isfinite()).nonzero().tolist():
            colour = "white" if abs(means[i, j]) > 0.6 else _INK
            text = f"{_number(means[i, j])}\n{int(counts[i, j])}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
        axes.set_title(f"{axes.get_title()}\n(mean cosine, and number of pairs)")
    _quiet(axes)
    return figure


def plot_layers(values: Mapping[str, Sequence[float]], steps: Sequence[int]) -> Figure:
    """Draw a heatmap, a row a layer and a column a step, of ``values``: ``{layer: one cosine for each of steps}``.

    Rows are in the order of ``values``, the first on top. NaN is hatched. Raises ``ValueError`` for a layer with
    another number of values than there are steps, and ``ImportError`` without matplotlib.

    >>> plot_layers({"encoder": [0.1, -0.2], "head": [0.0, -0.5]}, [0, 50]).axes[0].get_xlabel()
    'step'
    """
    if not values or not len(steps):
        raise ValueError(f"There is nothing to show in {len(values)} layers at {len(steps)} steps: measure first.")
    for layer, row in values.items():
        if len(row) != len(steps):
            raise ValueError(f"{layer!r} has {len(row)} values for {len(steps)} steps: pass one for each step.")
    names = [layer if len(layer) <= 40 else f"\N{HORIZONTAL ELLIPSIS}{layer[-39:]}" for layer in values]
    labelled = math.ceil(len(names) / _MOST_LAYERS)
    longest = max(len(name) for name in names)
    width, height = 5.5 + 0.07 * longest, 1.5 + 0.155 * min(max(len(names), 6), _MOST_LAYERS)
    cosines = torch.tensor([list(row) for row in values.values()])
    figure, axes = _heatmap(cosines, "min_cosine", width=width, height=height, aspect="auto")
    columns = range(0, len(steps), math.ceil(len(steps) / 8))
    axes.set(xticks=columns, xticklabels=[str(steps[column]) for column in columns], xlabel="step")
    axes.set(yticks=range(0, len(names), labelled), yticklabels=names[::labelled], title="min_cosine of each layer")
    _quiet(axes, size=7)
    return figure


def plot_pairs(images: Tensor, captions: Sequence[str]) -> Figure:
    """Draw the k pairs of images in ``images`` ``(k, 2, C, H, W)``, the two of a pair side by side under its caption.

    Three channels are shown as RGB, others as the grey of their mean, each image scaled to its own range. Raises
    ``ValueError`` for another shape or number of captions, and ``ImportError`` without matplotlib.

    >>> len(plot_pairs(torch.rand(3, 2, 1, 8, 8), ["a", "b", "c"]).axes)
    3
    """
    if images.ndim != 5 or images.shape[1] != 2 or images.numel() == 0 or len(captions) != len(images):
        raise ValueError(
            f"Pairs of images have shape (k, 2, C, H, W), k >= 1, and a caption each, but got {tuple(images.shape)} "
            f"and {len(captions)} captions: stack them with torch.stack."
        )
    images = images.detach().cpu().float().nan_to_num()
    if images.shape[2] != 3:
        images = images.mean(2, keepdim=True)
    low, high = images.amin((2, 3, 4), keepdim=True), images.amax((2, 3, 4), keepdim=True)
    images = (images - low) / (high - low).clamp(min=1e-12)
    gap = images.new_ones(*images.shape[2:4], max(1, images.shape[4] // 8))
    rows = math.ceil(len(images) / 4)
    columns = math.ceil(len(images) / rows)
    shape = images.shape[3] / (2 * images.shape[4] + gap.shape[2])  # height over width
    lines = 1 + max(caption.count("\n") for caption in captions)
    height = min(max(2.0 * shape, 0.8), 4) + 0.25 + 0.17 * lines
    figure = _figure(width=max(2.2 * columns, 2.8), height=rows * height)
    for number, ((left, right), caption) in enumerate(zip(images, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, number)
        image = torch.cat([left, gap, right], dim=2).permute(1, 2, 0).numpy()
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(caption, fontsize=8, color=_INK)
        axes.set_axis_off()
    return figure


def plot_curves(
    source: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    keys: Sequence[str] | None = None,
    prefix: str = "gradient_confusion",
) -> Figure:
    """Draw confusion, loss and accuracy over the steps of runs that TensorBoard's or the CSV logger has saved.

    ``source`` is a folder, searched with all in it, a ``metrics.csv``, several, or ``{name: path}``. The line is
    ``min_cosine``; the band is the 5 % to 95 % quantiles of the cosines, or else ``p05_cosine`` to ``mean_cosine``.
    ``keys`` replace the losses and accuracies, one panel each. Raises ``FileNotFoundError`` for a path without runs,
    ``ValueError`` if no run has ``prefix`` or one of ``keys``, and ``ImportError`` without matplotlib.
    """
    runs, settings = read_sources(source, prefix)
    return plot_runs(with_confusion(runs, keys, prefix), keys, prefix, settings)


def plot_runs(
    runs: Mapping[str, Mapping[str, Curve]],
    keys: Sequence[str] | None = None,
    prefix: str = "gradient_confusion",
    settings: Mapping[str, Settings] | None = None,
) -> Figure:
    """Draw what ``plot_curves`` shows, of ``{run: {key: {step: value}}}``, and say where ``settings`` differ.

    >>> figure = plot_runs({"a": {"gradient_confusion/min_cosine": {0: 0.5, 50: -0.1}, "loss": {0: 2.3, 50: 1.7}}})
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['cosine', 'loss']
    """
    logged = {key for curves in runs.values() for key in curves}
    if keys is None:
        theirs = [key for key in logged if not key.startswith(f"{prefix}/")]
        panels = {"loss": loss_keys(theirs)[: len(_LINES)], "accuracy": accuracy_keys(theirs)[: len(_LINES)]}
    else:
        panels = {key: [key] for key in keys}
    if f"{prefix}/eta" in logged:
        panels = {"eta": [f"{prefix}/eta"], **panels}
    panels = {title: group for title, group in panels.items() if group}

    figure = _figure(width=7, height=2.7 + 1.4 * len(panels))
    heights = [1.7] + [1.0] * len(panels)
    cosines, *others = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights).flat
    cosines.axhline(0, color=_PALE, linewidth=0.8, zorder=0)
    quantiles = all(f"{prefix}/cosines/p95" in curves for curves in runs.values())
    band = ("cosines/p05", "cosines/p95") if quantiles else ("p05_cosine", "mean_cosine")
    named = "5 % to 95 % of the cosines" if quantiles else "p05_cosine to mean_cosine"
    known = {name: settings[name] for name in runs if settings and name in settings}
    names = {name: f"{name} ({known[name]})" if name in known else name for name in runs}
    colours = dict(zip(runs, itertools.cycle(_COLOURS), strict=False))
    # A single run needs no legend: the title names it.
    title = why_not_comparable(known.values()) or (next(iter(names.values())) if len(runs) == 1 else "")
    cosines.set(ylabel="cosine", title=f"line: min_cosine, band: {named}" + f"\n{title}".replace(": ", ":\n").rstrip())
    for name, curves in runs.items():
        lowest, low, high = (curves.get(f"{prefix}/{key}", {}) for key in ("min_cosine", *band))
        steps = [step for step in low if step in high]
        ends = [low[step] for step in steps], [high[step] for step in steps]
        cosines.fill_between(steps, *ends, color=colours[name], alpha=0.18, linewidth=0)
        _draw_curve(cosines, lowest, "-", color=colours[name], linewidth=1.4, label=names[name])
    for axes, (title, group) in zip(others, panels.items(), strict=True):
        lines = dict(zip(group, _LINES, strict=False))
        for name, curves in runs.items():
            for key, line in lines.items():
                _draw_curve(axes, curves.get(key, {}), line, color=colours[name], linewidth=1.2)
        label = group[0].removeprefix(f"{prefix}/") if len(group) == 1 else title
        axes.set_ylabel("eta\n(squared norm)" if label == "eta" else label)
        if len(group) > 1:
            for key, line in lines.items():
                # A key that one run alone has is marked as it is drawn, and one that several have in no run's colour.
                own = [colours[name] for name, curves in runs.items() if key in curves]
                axes.plot([], [], line, color=own[0] if len(own) == 1 else _INK, linewidth=1.2, label=key)
            axes.legend(frameon=False, fontsize=7, labelcolor=_INK)
    if len(runs) > 1:
        style = {"loc": "outside upper center", "ncols": 2 if known else 3, "frameon": False, "fontsize": 8}
        figure.legend(*cosines.get_legend_handles_labels(), **style)
    figure.axes[-1].set_xlabel("step")
    figure.axes[-1].locator_params(axis="x", integer=True)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        _quiet(axes)
    return figure


def _draw_curve(axes: Axes, curve: Curve, line: str, **style: Any) -> None:
    """Draw a curve as a line, or as a dot where it is a single point."""
    axes.plot(list(curve), list(curve.values()), line, marker="." if len(curve) < 2 else "", **style)


def _density(cosines: Tensor) -> tuple[Any, Any] | None:
    """Return points of the kernel density estimate of ``cosines`` on [-1, 1], or None where it would show nothing."""
    try:
        from scipy.stats import gaussian_kde
    except ImportError:
        return None
    bandwidth = cosines.std(correction=0).item() * len(cosines) ** -0.2  # Scott's rule, scipy's own
    if bandwidth < _NARROWEST:
        return None
    points = torch.linspace(-1, 1, 401, dtype=torch.float64).numpy()
    every = math.ceil(len(cosines) / _MOST_KERNELS)  # of the sorted cosines, which keeps their distribution
    density = gaussian_kde(cosines.double().sort().values[every // 2 :: every].numpy(), len(cosines) ** -0.2)
    return points, density(points) + density(-2 - points) + density(2 - points)


def _figure(*, width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install matplotlib scipy") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")  # pyplot would keep it alive for ever


def _mark_classes(axes: Axes, labels: Tensor) -> None:
    """Draw lines between the blocks of classes, and their names."""
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
    rounded = round(value.item(), digits) + 0.0  # which makes 0 of -0
    return f"{rounded:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _heatmap(
    cosines: Tensor, label: str, *, width: float, height: float, aspect: Literal["equal", "auto"] = "equal"
) -> tuple[Figure, Axes]:
    """Return a figure of ``cosines``, red to blue, hatched where they are NaN, beside their scale; and its axes."""
    figure = _figure(width=width, height=height)
    axes = figure.subplots()
    axes.patch.set(facecolor="white", edgecolor=_PALE, hatch="/////")  # shows through the image where it is NaN
    image = axes.imshow(cosines.detach().cpu().numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect=aspect)
    bar = figure.colorbar(image, ax=axes, label=label, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    return figure, axes


def _quiet(axes: Axes, size: int = 8) -> None:
    """Give the frame quiet colours: the data should stand out."""
    axes.title.set(fontsize=10, color=_INK)
    axes.tick_params(colors=_INK, labelsize=size, length=0)
    for spine in axes.spines.values():
        spine.set_color(_PALE)
