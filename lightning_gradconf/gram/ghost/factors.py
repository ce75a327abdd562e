"""Grams across ranks from the factors of gradients: those of a parameter go to one rank, which contracts them.

The factors of a layer's gradients are its inputs and the gradients of its results, mostly far less than the gradients
of n units. Where they are more, the gradients are formed and sent instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradconf.gram.ghost.contraction import (
    Contribution,
    Dense,
    Lookup,
    Patches,
    Rows,
    Workspace,
    extent,
    gram_of_sum,
    whole,
)
from lightning_gradconf.gram.ranks.process_group import Ranks

Factors = dict[str, list[Contribution]]
# The tensors of each kind: along which dimension units lie, and rows that may be filled up with zeros.
_TENSORS: dict[type, dict[str, tuple[int, int | None]]] = {
    Dense: {"gradients": (0, None)},
    Rows: {"left": (1, 2), "right": (1, 2)},
    Lookup: {"index": (0, 1), "values": (0, 1)},
    Patches: {"input": (0, None), "delta": (0, None)},
}


def partial_grams(ranks: Ranks, factors: Factors, work: Workspace) -> dict[str, Tensor]:
    """Return this rank's part of the Gram ``(ranks * n, ranks * n)`` of each parameter; the ranks' parts add up.

    Args:
        ranks: That measure.
        factors: What each parameter's gradients of this rank's n units are made of.
        work: What contractions share.

    Raises:
        RuntimeError: On all ranks, if they differ in how their parameters are used.
        Exception: What the contraction of one rank's parameters raises, on that rank, after all exchanges.
    """
    described = ranks.gather([{name: [_shapes(part) for part in parts] for name, parts in factors.items()}])
    if any(_without_rows(one) != _without_rows(described[0]) for one in described):
        raise RuntimeError("the ranks use their parameters in different ways")
    grams: dict[str, Tensor] = {}
    failed: Exception | None = None
    for names in zip_longest(*_shares(described)):  # one for each rank, so that all contract at the same time
        found = {
            name: [
                _gathered(ranks, part, [one[name][j] for one in described], owner)
                for j, part in enumerate(factors.pop(name))
            ]
            for owner, name in enumerate(names)
            if name is not None
        }
        mine = names[ranks.rank]
        if mine is not None and failed is None:
            try:
                grams[mine] = gram_of_sum([_joined(part, of_ranks, ranks.size) for part, of_ranks in found[mine]], work)
                work.products = None  # of what was collected, for no other parameter
            except Exception as error:  # the others wait for this rank in the exchanges to come
                failed = error
    if failed is not None:
        raise failed
    return grams


def _shares(described: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The parameters that each rank contracts, the largest first, so that all have about as much to do."""
    sizes = dict.fromkeys(described[0], 0)
    for of_rank in described:
        for name, parts in of_rank.items():
            sizes[name] += sum(math.prod(shape) for _, shapes in parts for _, shape in shapes.values())
    shares: list[list[str]] = [[] for _ in described]
    loads = [0] * len(shares)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def _shapes(part: Contribution) -> tuple[str, dict[str, tuple[torch.dtype, list[int]]]]:
    tensors = {field: getattr(part, field) for field in _TENSORS[type(part)]}
    return type(part).__name__, {field: (tensor.dtype, list(tensor.shape)) for field, tensor in tensors.items()}


def _without_rows(described: Mapping[str, Sequence[Any]]) -> Any:
    """What has to be the same on all ranks."""
    ways = {kind.__name__: ways for kind, ways in _TENSORS.items()}

    def fixed(kind: str, shapes: Mapping[str, Any]) -> Any:
        return kind, [
            (dtype, [size for dim, size in enumerate(shape) if dim != ways[kind][field][1]])
            for field, (dtype, shape) in shapes.items()
        ]

    return [(name, [fixed(*part) for part in parts]) for name, parts in described.items()]


def _gathered(
    ranks: Ranks, part: Contribution, described: Sequence[Any], owner: int
) -> tuple[Contribution, dict[str, list[Tensor]]]:
    """A contribution as it is sent, and its tensors of all ranks in rank order; those on the owner alone."""
    ways = _TENSORS[type(part)]
    rows = {
        field: max(shapes[field][1][way[1]] for _, shapes in described)
        for field, way in ways.items()
        if way[1] is not None
    }
    tensors = {field: _filled(getattr(part, field), way[1], rows.get(field)) for field, way in ways.items()}
    n, numel = extent(part)
    if sum(tensor.numel() for tensor in tensors.values()) > n * numel:  # the same on all ranks, as shapes are now
        part = Dense(whole(part))
        tensors = {"gradients": part.gradients}
    of_ranks: dict[str, list[Tensor]] = {}
    for field, tensor in tensors.items():
        here = tensor.contiguous()
        of_ranks[field] = [torch.empty_like(here) for _ in described] if ranks.rank == owner else []
        dist.gather(here, of_ranks[field] or None, dst=owner, group=ranks.group)
    return part, of_ranks


def _joined(part: Contribution, of_ranks: Mapping[str, list[Tensor]], ranks: int) -> Contribution:
    """The contribution of the units of all ranks."""
    ways = _TENSORS[type(part)]
    found: dict[str, Any] = {field: torch.cat(tensors, ways[field][0]) for field, tensors in of_ranks.items()}
    if isinstance(part, Patches):
        found["n"] = part.n * ranks
    return replace(part, **found)


def _filled(tensor: Tensor, dim: int | None, rows: int | None) -> Tensor:
    """A tensor with rows of zeros added, so that there are as many on all ranks."""
    if dim is None or rows is None or tensor.shape[dim] == rows:
        return tensor
    more = list(tensor.shape)
    more[dim] = rows - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(more)], dim)
