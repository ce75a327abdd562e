"""What a measurement says: numbers for every logger, and pictures and tables for those that can show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradconf import plots
from lightning_gradconf.batches.units import Origin
from lightning_gradconf.reports.loggers import show_cosines, show_figure, show_table
from lightning_gradconf.reports.settings import Settings, row_of
from lightning_gradconf.statistics import cosine_matrix, gradient_statistics, min_cosine, pairwise_cosines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_IMAGES = 8  # pairs; the table has all


@dataclass(frozen=True)
class Measurement:
    """What was measured at one step.

    Attributes:
        grams: The Gram ``(n, n)`` of each parameter, by name.
        unit_size: Samples in a unit, None if they cannot be told.
        step: The step whose weights were measured.
        origins: Where the n units come from, if that is to be told.
        labels: Their classes ``(n,)``, where known.
        units: The units themselves, where all are at hand and there is something to be shown of them.
        engine: The engine that computed the Grams.
        seconds: The time it took.
        name: What tells the loss from the others of a step, empty if there are none; a part of the keys.
    """

    grams: dict[str, Tensor]
    unit_size: int | None
    step: int
    origins: Sequence[Origin] = ()
    labels: Tensor | None = None
    units: Sequence[Any] = ()
    engine: str = "loop"
    seconds: float = 0.0
    name: str = ""

    @cached_property
    def gram(self) -> Tensor:
        """The Gram ``(n, n)`` of the whole gradients, on the CPU."""
        return torch.stack(list(self.grams.values())).sum(0).cpu()

    @cached_property
    def cosines(self) -> Tensor:
        """The cosines of all pairs, ``(m,)``; none if a gradient is not finite."""
        return pairwise_cosines(self.gram) if bool(self.gram.isfinite().all()) else self.gram.new_empty(0)

    @property
    def fault(self) -> str:
        """Return why this measurement says nothing, and what to do about it; empty if it does say something."""
        if not bool(self.gram.isfinite().all()):
            return "a gradient is not finite; such measurements are logged as NaN."
        if self.unit_size == 1 and not bool(self.gram.any()):
            return (
                "the gradient of every single sample is zero, so there are no cosines. A loss that compares "
                "samples, such as a contrastive one, is constant for one of them: pass a larger unit_size."
            )
        return ""


class Pair(NamedTuple):
    """Two units of one measurement.

    Attributes:
        cosine: Of their gradients, in [-1, 1].
        units: Their rows of the Gram.
        origins: Where their samples come from.
        labels: Their classes, None where they are not known.
    """

    cosine: float
    units: tuple[int, int]
    origins: tuple[Origin, Origin]
    labels: tuple[int, int] | None


class Reading(NamedTuple):
    """What a measurement says.

    Attributes:
        measurement: What was measured.
        statistics: Its statistics, by name.
        layers: The lowest cosine of each submodule that is reported by itself.
        pairs: The pairs of units with the lowest cosines, the lowest first.
        prefix: The first part of the keys that its numbers are logged under.
    """

    measurement: Measurement
    statistics: dict[str, float]
    layers: dict[str, float]
    pairs: list[Pair]
    prefix: str

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers, by the keys that they are logged under."""
        numbers = {f"{self.prefix}/{name}": value for name, value in self.statistics.items()}
        return numbers | {f"{self.prefix}/min_cosine/{layer}": value for layer, value in self.layers.items()}


@dataclass
class Report:
    """Reads from each measurement what is wanted, by the arguments of the callback, and shows it and the whole run."""

    statistics: Sequence[str]
    per_layer: bool | int
    histogram: bool
    figures: bool
    top_pairs: int
    prefix: str
    _compared: Settings | None = None  # what the last measurement compared
    _of_layers: dict[int, dict[str, float]] = field(default_factory=dict)  # by step

    def read(self, measured: Measurement) -> Reading:
        """Return what a measurement says, and keep what it says of submodules for the end of the run."""
        statistics, layers = self._statistics_of(measured), self._layers_of(measured)
        return Reading(measured, statistics, layers, self._pairs_of(measured), self.prefix)

    def _statistics_of(self, measured: Measurement) -> dict[str, float]:
        size = measured.unit_size
        own = {"num_units": float(len(measured.gram)), "seconds": measured.seconds}
        names = [name for name in self.statistics if name not in own]
        if measured.labels is None:  # units that span ranks have none
            names = [name for name in names if not name.endswith("class_cosine")]
        values = gradient_statistics(measured.gram, names, labels=measured.labels, unit_size=size or 1)
        if size is None and "noise_scale" in values:  # in samples, which cannot be counted here
            values["noise_scale"] = torch.tensor(math.nan)
        numbers = {name: float(value) for name, value in values.items()}
        return numbers | {name: value for name, value in own.items() if name in self.statistics}

    def _layers_of(self, measured: Measurement) -> dict[str, float]:
        layers = _layers(measured.grams, self.per_layer)
        values = {layer: float(min_cosine(torch.stack(grams).sum(0))) for layer, grams in layers.items()}
        self._of_layers[measured.step] = values
        return values

    def _pairs_of(self, measured: Measurement) -> list[Pair]:
        if not measured.origins:
            return []
        cosines, labels, origins = cosine_matrix(measured.gram), measured.labels, measured.origins
        rows, columns = torch.triu_indices(len(cosines), len(cosines), offset=1)
        of_pairs = cosines[rows, columns]
        wanted = min(self.top_pairs, int((~of_pairs.isnan()).sum()))
        lowest = of_pairs.argsort()[:wanted].tolist()  # NaN sorts last
        pairs = []
        for k in lowest:
            i, j = int(rows[k]), int(columns[k])
            classes = None if labels is None else (int(labels[i]), int(labels[j]))
            pairs.append(Pair(float(of_pairs[k]), (i, j), (origins[i], origins[j]), classes))
        return pairs

    def figures_of(self, reading: Reading) -> dict[str, Figure]:
        """Return the figures of a measurement by their names; none of one without any cosine."""
        measured, pairs = reading.measurement, reading.pairs
        figures: dict[str, Figure] = {}
        if not len(measured.cosines):
            return figures
        if self.figures:
            figures["heatmap"] = plots.plot_gram(measured.gram, labels=measured.labels)
            figures["density"] = plots.plot_density(measured.gram)
            if measured.labels is not None:
                figures["classes"] = plots.plot_classes(measured.gram, measured.labels)
        images = [image for unit in measured.units if (image := _image(unit)) is not None]
        of_all = len(images) == len(measured.gram) and len({image.shape for image in images}) == 1
        if pairs and of_all and find_spec("matplotlib") is not None:
            first = pairs[:_MOST_IMAGES]
            shown = torch.stack([torch.stack([images[i] for i in pair.units]) for pair in first])
            figures["top_pairs"] = plots.plot_pairs(shown, [_caption(pair) for pair in first])
        return figures

    def tables_of(self, reading: Reading) -> dict[str, list[dict[str, str]]]:
        """Return the tables of a measurement, as rows by their names.

        The settings are one at the first measurement, and again when they change, as the engine does if ``auto`` falls
        back.
        """
        measured, tables = reading.measurement, {}
        if reading.pairs:
            tables["top_pairs"] = [_row(pair) for pair in reading.pairs]
        compared = Settings(len(measured.gram), measured.unit_size, measured.engine)
        if compared != self._compared:
            self._compared = compared
            tables["settings"] = [row_of(compared)]
        return tables

    def show(
        self,
        logger: Any,
        measured: Measurement,
        tables: Mapping[str, Sequence[Mapping[str, str]]],
        figures: Mapping[str, Figure],
    ) -> None:
        """Send the tables and pictures of a measurement to a logger that can show them.

        Its numbers come first: a CSVLogger wants an empty folder until then.
        """
        for name, rows in tables.items():
            show_table(logger, f"{self.prefix}/{name}", rows, measured.step)
        if self.histogram and len(measured.cosines):
            show_cosines(logger, f"{self.prefix}/cosines", measured.cosines, measured.step)
        for name, figure in figures.items():
            show_figure(logger, f"{self.prefix}/{name}", figure, measured.step)

    def show_layers(self, loggers: Sequence[Any]) -> None:
        """Send the picture of what all measurements have found layer by layer."""
        layers = list(dict.fromkeys(layer for values in self._of_layers.values() for layer in values))
        if not layers or find_spec("matplotlib") is None:
            return
        # A layer that was frozen at a step has no value there.
        curves = {layer: [values.get(layer, math.nan) for values in self._of_layers.values()] for layer in layers}
        steps = list(self._of_layers)
        figure = plots.plot_layers(curves, steps)
        for logger in loggers:
            show_figure(logger, f"{self.prefix}/layers", figure, steps[-1])


def _layers(grams: Mapping[str, Tensor], per_layer: bool | int) -> dict[str, list[Tensor]]:
    """Return the Grams of parameters by the submodule that they are logged under."""
    layers: dict[str, list[Tensor]] = {}
    if not per_layer:
        return layers
    depth = None if per_layer is True else per_layer
    for name, gram in grams.items():
        path = name.split(".")
        owner = path[:-1] or path  # a parameter of the LightningModule itself has no submodule
        layers.setdefault(".".join(owner[:depth]), []).append(gram)
    return layers


def _image(unit: Any) -> Tensor | None:
    """Return the image ``(C, H, W)`` in a unit of one sample, None if there is none."""
    for leaf in tree_leaves(unit):
        if isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.shape[:2] in ((1, 1), (1, 3)) and leaf.numel() > 9:
            return leaf[0].detach().float().cpu()
    return None


def _row(pair: Pair) -> dict[str, str]:
    first, second = pair.origins
    row = {"cosine": f"{pair.cosine:.3f}", "first": str(first), "second": str(second)}
    return row if pair.labels is None else row | {"labels": f"{pair.labels[0]}, {pair.labels[1]}"}


def _caption(pair: Pair) -> str:
    classes = "" if pair.labels is None else f"\nclasses {pair.labels[0]}, {pair.labels[1]}"
    return f"cosine {pair.cosine:.2f}{classes}"
