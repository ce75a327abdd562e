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

from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.convolution import ConvolutionFactors
from lightning_gradconf.gram.ghost.factors import Dense, GradientFactors, gram_of_sum, materialize
from lightning_gradconf.gram.ghost.joining import TENSORS, with_rows
from lightning_gradconf.gram.ranks.process_group import Ranks

Factors = dict[str, list[GradientFactors]]


def partial_grams(ranks: Ranks, factors: Factors, workspace: Workspace) -> dict[str, Tensor]:
    """Return this rank's part of the Gram ``(ranks * n, ranks * n)`` of each parameter; the ranks' parts add up.

    Args:
        ranks: That measure.
        factors: What each parameter's gradients of this rank's n units are made of.
        workspace: What contractions share.

    Raises:
        RuntimeError: On all ranks, if they differ in how their parameters are used.
        Exception: What the contraction of one rank's parameters raises, on that rank, after all exchanges.
    """
    described = _described(ranks, factors)
    first = {name: _fixed(parts) for name, parts in described[0].items()}
    if different := {name for one in described for name, parts in one.items() if _fixed(parts) != first[name]}:
        # The ranks use these parameters in different ways, or images of other sizes; gradients have one shape on all.
        for name in sorted(different):
            factors[name] = [Dense(materialize(*factors[name]))]
        described = _described(ranks, factors)
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
                grams[mine] = gram_of_sum(
                    [_joined(part, of_ranks, ranks.size) for part, of_ranks in found[mine]], workspace
                )
                workspace.products = None  # of what was collected, for no other parameter
            except Exception as error:  # the others wait for this rank in the exchanges to come
                failed = error
    if failed is not None:
        raise failed
    return grams


def _shares(described: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the parameters that each rank contracts, the largest first, so that all have about as much to do."""
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


def _described(ranks: Ranks, factors: Factors) -> list[dict[str, Any]]:
    return ranks.gather([{name: [_shapes(part) for part in parts] for name, parts in factors.items()}])


def _shapes(part: GradientFactors) -> tuple[str, dict[str, tuple[torch.dtype, list[int]]]]:
    tensors = {field: getattr(part, field) for field in TENSORS[type(part)]}
    return type(part).__name__, {field: (tensor.dtype, list(tensor.shape)) for field, tensor in tensors.items()}


def _fixed(parts: Sequence[Any]) -> Any:
    """Return what has to be the same on all ranks of one parameter's factors."""
    kinds = {kind.__name__: ways for kind, ways in TENSORS.items()}
    return [
        (kind, [
            (dtype, [size for dim, size in enumerate(shape) if dim != kinds[kind][field][1]])
            for field, (dtype, shape) in shapes.items()
        ])
        for kind, shapes in parts
    ]  # fmt: skip


def _gathered(
    ranks: Ranks, part: GradientFactors, described: Sequence[Any], owner: int
) -> tuple[GradientFactors, dict[str, list[Tensor]]]:
    """Return a contribution as it is sent, and its tensors of all ranks in rank order; those on the owner alone."""
    ways = TENSORS[type(part)]
    rows = {
        field: max(shapes[field][1][way[1]] for _, shapes in described)
        for field, way in ways.items()
        if way[1] is not None
    }
    tensors = {field: with_rows(getattr(part, field), way[1], rows.get(field)) for field, way in ways.items()}
    if (
        sum(tensor.numel() for tensor in tensors.values()) > part.n * part.numel
    ):  # the same on all ranks, as shapes are now
        part = Dense(materialize(part))
        tensors = {"gradients": part.gradients}
    of_ranks: dict[str, list[Tensor]] = {}
    for field, tensor in tensors.items():
        here = tensor.contiguous()
        of_ranks[field] = [torch.empty_like(here) for _ in described] if ranks.rank == owner else []
        dist.gather(here, of_ranks[field] or None, dst=owner, group=ranks.group)
    return part, of_ranks


def _joined(part: GradientFactors, of_ranks: Mapping[str, list[Tensor]], ranks: int) -> GradientFactors:
    """Return the contribution of the units of all ranks."""
    ways = TENSORS[type(part)]
    found: dict[str, Any] = {field: torch.cat(tensors, ways[field][0]) for field, tensors in of_ranks.items()}
    if isinstance(part, ConvolutionFactors):
        found["n"] = part.n * ranks
    return replace(part, **found)
