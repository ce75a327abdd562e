"""The tensors that factors hold, along their units: joined over several passes or ranks, and chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf.gram.ghost.convolution import ConvolutionFactors
from lightning_gradconf.gram.ghost.factors import (
    Dense,
    GradientFactors,
    IndexedRows,
    Multiples,
    OuterProducts,
    materialize,
)  # fmt: skip

# The tensors of each kind: along which dimension units lie, and along which more rows of zeros change nothing.
TENSORS: dict[type, dict[str, tuple[int, int | None]]] = {
    Dense: {"gradients": (0, None)},
    OuterProducts: {"left": (1, 2), "right": (1, 2)},
    IndexedRows: {"index": (0, 1), "values": (0, 1)},
    ConvolutionFactors: {"input": (0, None), "delta": (0, None)},
    Multiples: {"coefficients": (0, None)},
}


def joined(groups: Sequence[Sequence[GradientFactors]]) -> list[GradientFactors]:
    """Return the factors of one parameter over the units of several groups, each in a pass of its own."""
    if len(groups) == 1:
        return list(groups[0])
    if len({tuple(map(type, parts)) for parts in groups}) == 1:
        try:
            return [_joined(same) for same in zip(*groups, strict=True)]
        except RuntimeError:  # tensors of other shapes, such as images of other sizes
            pass
    return [Dense(torch.cat([materialize(*parts) for parts in groups]))]


def _joined(parts: Sequence[GradientFactors]) -> GradientFactors:
    found: dict[str, Any] = {}
    for name, (units, rows) in TENSORS[type(parts[0])].items():
        tensors = [getattr(part, name) for part in parts]
        most = None if rows is None else max(tensor.shape[rows] for tensor in tensors)
        found[name] = torch.cat([with_rows(tensor, rows, most) for tensor in tensors], units)
    if isinstance(parts[0], ConvolutionFactors):
        found["n"] = sum(part.n for part in parts)
    return replace(parts[0], **found)


def with_rows(tensor: Tensor, dimension: int | None, rows: int | None) -> Tensor:
    """Return a tensor with rows of zeros added along a dimension, up to a number of them."""
    if dimension is None or rows is None or tensor.shape[dimension] == rows:
        return tensor
    more = list(tensor.shape)
    more[dimension] = rows - tensor.shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(more)], dimension)


def of_units(part: GradientFactors, indices: Tensor) -> GradientFactors:
    """Return the factors of some units, or of all in another order."""
    found: dict[str, Any] = {}
    for name, (units, _) in TENSORS[type(part)].items():
        tensor = getattr(part, name)
        samples = torch.unflatten(tensor, units, (part.n, -1))
        found[name] = samples.index_select(units, indices.to(tensor.device)).flatten(units, units + 1)
    if isinstance(part, ConvolutionFactors):
        found["n"] = len(indices)
    return replace(part, **found)
