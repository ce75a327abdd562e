"""Find the dimension that holds the units in a node's tensors, where the usual one turns out to be wrong.

Two backward passes are compared: one starts from ones, the other from random weights r. In the second, every entry that
belongs to unit i is r_i times as large. If no dimension shows this pattern, the result does not depend on units.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf.gram.findings import Places
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost.factor_tensors import TENSORS
from lightning_gradconf.gram.ghost.factors import GradientFactors
from lightning_gradconf.gram.ghost.graph import Graph, Use
from lightning_gradconf.gram.ghost.nodes import shapes
from lightning_gradconf.gram.ghost.placement import Placement
from lightning_gradconf.gram.ghost.rules import factors_of
from lightning_gradconf.gram.objective import run_backward

_GUESSES = 8
_TOLERANCE = 1e-3  # of the largest entry
# In low precision (autocast), accept a place whose error is at most _ROUNDINGS machine epsilons, provided that every
# other place has more than _MARGIN times that error.
_ROUNDINGS, _MARGIN = 16, 4


def search(losses: Tensor, graph: Graph, weights: Tensor, parameters: Collection[str], places: Places) -> bool:
    """Put into ``places`` where the units lie in the uses of some parameters; return whether that changed anything."""
    lost = {i: use for i, use in enumerate(graph.uses) if use.free.parameters & set(parameters)}
    uses = dict(enumerate(graph.uses)) if graphs.is_coarse(graph.order) else lost
    nodes = list(dict.fromkeys(use.node for use in uses.values()))
    ones, weighted = (_deltas(losses, nodes, seed) for seed in (torch.ones_like(losses), weights))
    before = dict(places.guesses), set(places.free)
    guesses, free = {}, set[int]()
    with torch.no_grad():
        for i, use in uses.items():
            guess = _guess(use, ones[use.node], weighted[use.node], weights)
            if guess is None and i in lost:
                free.add(graph.order.index(use.node))
            elif guess:
                guesses[i] = guess
    if free - places.free:
        places.free |= free
        places.guesses = {}  # uses are others now
    else:
        places.guesses |= guesses
    return (places.guesses, places.free) != before


def _deltas(losses: Tensor, nodes: Sequence[Node], seed: Tensor) -> dict[Node, list[Tensor | None]]:
    edges = [GradientEdge(node, i) for node in nodes for i in range(len(shapes(node)))]
    found: dict[Node, list[Tensor | None]] = {node: [] for node in nodes}
    for edge, delta in zip(edges, run_backward(losses, edges, keep_graph=True, seed=seed), strict=True):
        found[edge.node].append(delta)
    return found


def _guess(use: Use, ones: Sequence[Tensor | None], weighted: Sequence[Tensor | None], weights: Tensor) -> int | None:
    """Return which place of the units explains the deltas of a use, None if no place does."""
    delta, other = (next((delta for delta in deltas if delta is not None), None) for deltas in (ones, weighted))
    if delta is None or other is None or not delta.numel():
        return 0
    shape = graphs.shape(use.source)
    errors: list[float] = []
    guesses = 1
    while len(errors) < min(guesses, _GUESSES):
        placements = [Placement(len(weights), len(errors), deltas=deltas) for deltas in (ones, weighted)]
        try:
            part, scaled = (
                factors_of(use.node, use.slot, d, shape, at) for d, at in zip((delta, other), placements, strict=True)
            )
        except NotImplementedError:
            return None
        errors.append(_error(part, scaled, weights))
        if errors[-1] <= max(_TOLERANCE, 4 * torch.finfo(weights.dtype).eps):
            return len(errors) - 1
        guesses = placements[0].guesses
    best, *others = sorted(errors)
    if best > _ROUNDINGS * torch.finfo(delta.dtype).eps:
        return None
    # Rounding may look like another place, so the best has to be much better; without a guess the proof fails again.
    return errors.index(best) if all(error > _MARGIN * best for error in others) else 0


def _error(part: GradientFactors, other: GradientFactors, weights: Tensor) -> float:
    """Return by how much ``other`` differs from ``part`` with unit i scaled by its weight, relative to its maximum."""
    largest, scaled = 0.0, False
    for name, (units, _) in TENSORS[type(part)].items():
        a, b = (getattr(factors, name).movedim(units, 0) for factors in (part, other))
        if torch.equal(a, b):  # an operand of data
            continue
        n = len(weights)
        a, b = (torch.unflatten(tensor, 0, (n, -1)) for tensor in (a, b))
        expected = a * weights.to(a.dtype).view(-1, *[1] * (a.dim() - 1))
        largest = max(largest, float((expected - b).abs().max()) / max(float(b.abs().max()), 1e-300))
        scaled = True
    if scaled or not any(bool(getattr(part, name).any()) for name in TENSORS[type(part)]):
        return largest
    return math.inf
