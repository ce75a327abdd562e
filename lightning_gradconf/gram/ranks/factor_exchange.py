"""Grams across ranks from the factors of gradients: those of a parameter go to one rank, which contracts them.

The factors of a layer's gradients are its inputs and the gradients of its results, mostly far less than the gradients
of n units. Where they are more, the gradients are formed and sent instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.factor_tensors import TENSORS, joined, with_rows
from lightning_gradconf.gram.ghost.factors import Dense, GradientFactors, gram_of_sum, materialize
from lightning_gradconf.gram.ranks.process_group import Ranks

Factors = dict[str, list[GradientFactors]]


def partial_grams(ranks: Ranks, factors: Factors, workspace: Workspace) -> dict[str, Tensor]:
    """Return this rank's part of the Gram ``(ranks * n, ranks * n)`` of each parameter; the ranks' parts add up.

    Args:
        ranks: That measure.
        factors: What each parameter's gradients of this rank's n units are made of.
        workspace: What contractions share.

    Raises:
        Exception: What the contraction of one rank's parameters raises, on that rank, after all exchanges.
    """
    described = _described(ranks, factors)
    fixed = [{name: [part.fixed for part in parts] for name, parts in one.items()} for one in described]
    if different := {name for one in fixed for name in one if one[name] != fixed[0][name]}:
        # The ranks use these parameters in different ways, or images of other sizes; gradients have one shape on all.
        for name in sorted(different):
            factors[name] = [Dense(materialize(*factors[name]))]
        described = _described(ranks, factors)
    grams: dict[str, Tensor] = {}
    failed: Exception | None = None
    for names in zip_longest(*_shares(described)):  # one for each rank, so that all contract at the same time
        found: dict[str, list[list[GradientFactors]]] = {}
        for owner, name in enumerate(names):
            if name is not None:
                shapes = zip(*(one[name] for one in described), strict=True)
                found[name] = [
                    _gathered(ranks, part, of_ranks, owner)
                    for part, of_ranks in zip(factors.pop(name), shapes, strict=True)
                ]
        mine = names[ranks.rank]
        if mine is not None and failed is None:
            try:
                grams[mine] = gram_of_sum(joined([*zip(*found[mine], strict=True)]), workspace)
                workspace.products = None  # of what was collected, for no other parameter
            except Exception as error:  # the others wait for this rank in the exchanges to come
                failed = error
    if failed is not None:
        raise failed
    return grams


class _Shapes(NamedTuple):
    """What other ranks need to know of the tensors of a contribution.

    Attributes:
        fixed: The kind of the contribution, and the types and sizes that have to be the same on all ranks.
        rows: Of each tensor to which rows of zeros may be added, how many it has.
        elements: How many all tensors have.
    """

    fixed: Any
    rows: dict[str, int]
    elements: int


def _described(ranks: Ranks, factors: Factors) -> list[dict[str, list[_Shapes]]]:
    return ranks.gather([{name: [_shapes(part) for part in parts] for name, parts in factors.items()}])


def _shapes(part: GradientFactors) -> _Shapes:
    fixed, rows, elements = [], {}, 0
    for field, (_, dimension) in TENSORS[type(part)].items():
        tensor = getattr(part, field)
        fixed.append((tensor.dtype, [size for i, size in enumerate(tensor.shape) if i != dimension]))
        if dimension is not None:
            rows[field] = tensor.shape[dimension]
        elements += tensor.numel()
    return _Shapes((type(part).__name__, fixed), rows, elements)


def _shares(described: Sequence[Mapping[str, Sequence[_Shapes]]]) -> list[list[str]]:
    """Return the parameters that each rank contracts, the largest first, so that all have about as much to do."""
    sizes = {name: sum(part.elements for one in described for part in one[name]) for name in described[0]}
    shares: list[list[str]] = [[] for _ in described]
    loads = [0] * len(shares)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares


def _gathered(ranks: Ranks, part: GradientFactors, shapes: Sequence[_Shapes], owner: int) -> list[GradientFactors]:
    """Return a contribution of all ranks, in rank order; on the owner alone.

    The tensors are filled up to those of the rank with the most rows.
    """
    rows = {field: max(of_rank.rows[field] for of_rank in shapes) for field in shapes[0].rows}
    tensors = {
        field: with_rows(getattr(part, field), dimension, rows.get(field))
        for field, (_, dimension) in TENSORS[type(part)].items()
    }
    # The same on all ranks, as shapes are now.
    if sum(tensor.numel() for tensor in tensors.values()) > part.n * part.numel:
        part = Dense(materialize(part))
        tensors = {"gradients": part.gradients}
    found: list[list[Tensor]] = []
    for tensor in tensors.values():
        here = tensor.contiguous()
        found.append([torch.empty_like(here) for _ in shapes] if ranks.rank == owner else [])
        dist.gather(here, found[-1] or None, dst=owner, group=ranks.group)
    return [replace(part, **dict(zip(tensors, of_rank, strict=True))) for of_rank in zip(*found, strict=True)]
