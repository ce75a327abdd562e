"""How sure a trend is: intervals over networks and seeds together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .moments import Measure, Record, at_initialisation, trained
from .tables import number

Values: TypeAlias = Sequence[Any]  # whatever belongs to one network: one entry for each seed
DRAWS = 2000


class Estimate(NamedTuple):
    """A number and its 95 % interval; NaN where there is too little to tell."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "too few"
        return f"{number(self.value)} [{number(self.low)}, {number(self.high)}]"


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def bootstrap(networks: Sequence[Values], statistic: Callable[[list[int], list[list[Any]]], float]) -> Estimate:
    """Return a statistic of networks and seeds with the interval that a two-stage bootstrap gives.

    A draw takes as many networks as there are, with repetition, and of each as many of its seeds, with repetition.
    ``statistic`` is given the indices of the networks drawn and their entries; draws for which it is NaN are left out.
    """
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = generator.integers(len(networks), size=len(networks)).tolist()
        seeds = [generator.integers(len(networks[i]), size=len(networks[i])).tolist() for i in chosen]
        entries = [[networks[i][k] for k in row] for i, row in zip(chosen, seeds, strict=True)]
        drawn.append(statistic(chosen, entries))
    value = statistic(list(range(len(networks))), [list(values) for values in networks])
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def slope(sizes: Sequence[int], networks: Sequence[Sequence[float]]) -> Estimate:
    """Return by how much the mean over seeds grows where a size doubles; unknown for fewer than three networks."""
    finite = [[value for value in values if math.isfinite(value)] for values in networks]
    known = [(math.log2(size), values) for size, values in zip(sizes, finite, strict=True) if values]
    if len(known) < 3:
        return UNKNOWN

    def fit(chosen: list[int], entries: list[list[float]]) -> float:
        x = np.array([known[i][0] for i in chosen])
        if np.ptp(x) == 0:
            return math.nan
        x = x - x.mean()
        return float(x @ [np.mean(values) for values in entries] / (x @ x))

    return bootstrap([values for _, values in known], fit)


def slopes(sizes: Sequence[int], groups: Sequence[Sequence[Record]], measures: dict[str, Measure]) -> list[str]:
    """Return a cell for each moment: the trend among the runs that train, at initialisation among all."""
    return [
        str(
            slope(
                sizes,
                [
                    [measure(record) for record in (group if measure is at_initialisation else trained(group))]
                    for group in groups
                ],
            )
        )
        for measure in measures.values()
    ]
