"""What a measurement says: numbers for every logger, and pictures for those that can show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf import plots
from lightning_gradconf.statistics import gradient_statistics, min_cosine, pairwise_cosines


@dataclass(frozen=True)
class Measurement:
    """What was measured at one step.

    Attributes:
        grams: The Gram ``(n, n)`` of each parameter, by name.
        unit_size: Samples in a unit, None if they cannot be told.
        step: The step whose weights were measured.
    """

    grams: dict[str, Tensor]
    unit_size: int | None
    step: int

    @cached_property
    def gram(self) -> Tensor:
        """The Gram ``(n, n)`` of the whole gradients, on the CPU."""
        return torch.stack(list(self.grams.values())).sum(0).cpu()


@dataclass(frozen=True)
class Report:
    """Which of the things that a measurement says are wanted; the arguments are those of the callback."""

    statistics: Sequence[str]
    per_layer: bool | int
    histogram: bool
    figures: bool
    prefix: str

    def values(self, measured: Measurement) -> dict[str, float]:
        """Return the statistics of a measurement by their names."""
        values = gradient_statistics(measured.gram, self.statistics, unit_size=measured.unit_size or 1)
        if measured.unit_size is None and "noise_scale" in values:  # in samples, which cannot be counted here
            values["noise_scale"] = torch.tensor(math.nan)
        return {name: float(value) for name, value in values.items()}

    def of_layers(self, measured: Measurement) -> dict[str, float]:
        """Return the lowest cosine of each submodule that is reported by itself."""
        grams = measured.grams
        return {
            layer: float(min_cosine(torch.stack([grams[name] for name in names]).sum(0)))
            for layer, names in _layers(list(grams), self.per_layer).items()
        }

    def show(self, loggers: Sequence[Any], measured: Measurement) -> None:
        """Send the pictures of a measurement to the loggers that can show them."""
        if not bool(measured.gram.isfinite().all()):
            return
        cosines = pairwise_cosines(measured.gram)
        for logger in loggers:
            if "TensorBoardLogger" not in {base.__name__ for base in type(logger).__mro__} or not len(cosines):
                continue
            if self.histogram:
                logger.experiment.add_histogram(f"{self.prefix}/cosines", cosines, measured.step)
            if self.figures:
                for name, figure in (
                    ("heatmap", plots.plot_gram(measured.gram)),
                    ("density", plots.plot_density(measured.gram)),
                ):
                    logger.experiment.add_figure(f"{self.prefix}/{name}", figure, measured.step)


def _layers(names: list[str], per_layer: bool | int) -> dict[str, list[str]]:
    """The names of parameters by the submodule that they are logged under."""
    layers: dict[str, list[str]] = {}
    if per_layer is False or per_layer == 0:
        return layers
    depth = math.inf if per_layer is True else per_layer
    for name in names:
        path = name.split(".")
        owner = path[:-1] or path  # a parameter of the LightningModule itself has no submodule
        layers.setdefault(".".join(owner[: int(min(depth, len(owner)))]), []).append(name)
    return layers
