"""Whether one pass over all units may be believed: what has to be checked again, on which units, and how closely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost.graph import Graph
from lightning_gradconf.gram.ghost.nodes import dtypes, saved, shapes

Signature = Hashable


@dataclass(frozen=True)
class Facts:
    """What a graph of n units of k samples says about whether an earlier calibration holds.

    Attributes:
        signature: What must be the same for it to hold.
        constants: The numbers that the loss is multiplied or divided by.
        epsilon: The least precision of any result.
        kinds: How many nodes of each kind there are.
        proven: Whether there is no room for the data to weigh units differently, or to mix them at times.
    """

    n: int
    k: int
    signature: Signature
    constants: tuple[float, ...]
    epsilon: float
    kinds: Counter[str]
    proven: bool


_SUMS = {"MeanBackward0", "MeanBackward1", "SumBackward0", "SumBackward1"}
_OF_TARGETS = {"NllLossBackward0", "NllLoss2DBackward0"}
# Between the last parameters and the loss, these treat all samples alike, whatever the data, also added up.
_LINEAR = _SUMS | {
    "AddBackward0", "AliasBackward0", "CloneBackward0", "NegBackward0", "PermuteBackward0", "ReshapeAliasBackward0",
    "SelectBackward0", "SliceBackward0", "SqueezeBackward0", "SqueezeBackward1", "SubBackward0", "ToCopyBackward0",
    "TransposeBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
# These too, but not once samples have been added up: NllLoss by `equalise`.
_ALIKE = _LINEAR | _OF_TARGETS | {
    "AbsBackward0", "AdaptiveAvgPool2DBackward0", "AvgPool2DBackward0", "ExpBackward0", "GeluBackward0",
    "HuberLossBackward0", "LogBackward0", "LogSoftmaxBackward0", "MseLossBackward0", "PowBackward0", "ReluBackward0",
    "SigmoidBackward0", "SmoothL1LossBackward0", "SoftmaxBackward0", "TanhBackward0",
}  # fmt: skip
MASK = "product with data"
_PRODUCTS = {"MulBackward0", "DivBackward0"}
_MATRIX_PRODUCTS = {"MmBackward0", "AddmmBackward0"}
_DISTANCES = {"CdistBackward0", "EuclideanDistBackward0", "PdistBackward0"}
_BROADCASTS = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "MaximumBackward0", "MinimumBackward0"}
# These may carry values from one unit to another, depending on the data: along one dimension, or anywhere.
_ALONG = {"IndexSelectBackward0", "GatherBackward0", "SortBackward0", "TopkBackward0", "CumsumBackward0"}
_ANYWHERE = ("Index", "Gather", "Scatter", "MaskedS", "Take", "PackPadded", "Sort", "Topk", "Put", "Unique")


def facts(graph: Graph, n: int, k: int) -> Facts:
    """Return what there is to know about a graph of n units of k samples."""
    proven = _is_proven(graph, n, k)
    return Facts(n, k, _signature(graph, n, k), _constants(graph), _epsilon(graph), _kinds(graph), proven)


def _signature(graph: Graph, n: int, k: int) -> Signature:
    uses = frozenset((tuple(sorted(use.free.leaves)), use.slot, use.node.name()) for use in graph.uses)
    return n, k, uses, frozenset(node.name() for node in graph.tail), weighs_units(graph, n)


def weighs_units(graph: Graph, n: int) -> bool:
    """Whether units have different numbers of targets in a mean over targets."""
    return any(_takes_mean(node) and _weights_by_unit(node, n) is not None for node in graph.tail)


def _kinds(graph: Graph) -> Counter[str]:
    """Kinds of nodes; a product with data and a batch norm in training are such kinds."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        name = node.name()
        if name == "MulBackward0" and any(child is None for child, _ in node.next_functions):
            name = MASK
        elif "BatchNorm" in name and _trains(node):
            name = f"{name} in training"
        found[name] += 1
    return found


def _trains(node: Node) -> bool:
    try:
        return bool(saved(node, "training"))
    except NotImplementedError:  # of a kind that only training has
        return True


def _constants(graph: Graph) -> tuple[float, ...]:
    values = (_constant(node) for node in graph.tail if node.name() in _PRODUCTS)
    return tuple(sorted(float(value) for value in values if value is not None and value.numel() == 1))


def _epsilon(graph: Graph) -> float:
    kinds = {dtype for node in graph.nodes for dtype in dtypes(node) if dtype.is_floating_point}
    return max((torch.finfo(dtype).eps for dtype in kinds), default=0.0)


def _is_proven(graph: Graph, n: int, k: int) -> bool:
    tail, nodes = set(graph.tail), set(graph.nodes)
    summed: set[Node] = set()  # where units have been added up
    for node in (node for node in graph.nodes if node in tail):
        name = node.name()
        if name in _PRODUCTS:
            value = _constant(node)
            if value is not None and value.numel() != 1:
                return False
        elif name not in _ALIKE or (not _takes_mean(node) and _weights_by_unit(node, n) is not None):
            return False
        below = [child for child, _ in node.next_functions if child in nodes]
        if any(child in summed for child in below):
            by_data = len(below) > 1 or (name == "DivBackward0" and below[0] is not node.next_functions[0][0])
            if by_data if name in _PRODUCTS else name not in _LINEAR:
                return False
            summed.add(node)
        elif _adds_units(node, n * k):
            summed.add(node)
    return not any(isinstance(node, BackwardCFunction) for node in graph.nodes)


def _adds_units(node: Node, batch: int) -> bool:
    """Whether no dimension of the result can be that of the batch, or one that might be is summed over."""
    result = graphs.shape((node, 0))
    if not _multiples(result, batch):
        return True
    return node.name() in _SUMS and _multiples(graphs.shape(node.next_functions[0]), batch) > _multiples(result, batch)


def _multiples(sizes: Sequence[int], batch: int) -> int:
    return sum(size > 0 and size % batch == 0 for size in sizes)


def carries_between_units(graph: Graph, n: int, k: int) -> str | None:
    """Return the name of a node that moves values by indices, if these may lead from one unit to another."""
    uses = {use.node for use in graph.uses}
    for node in graph.nodes:
        name = node.name()
        if node in uses or not (name in _ALONG or name.startswith(_ANYWHERE)):
            continue
        if name in _ALONG:
            sizes = graphs.shape(node.next_functions[0]) if node.next_functions[0][0] is not None else ()
            if sizes and sizes[saved(node, "dim")] % (n * k):
                continue
        elif name == "IndexBackward0" and _stays_inside(node, n, k):
            continue
        return name
    return None


def pairs_units(graph: Graph, n: int, k: int) -> str | None:
    """Return the name of a node in which samples meet one another, each with each."""
    uses = {use.node for use in graph.uses}
    return next((node.name() for node in graph.nodes if node not in uses and _pairs_units(node, n * k)), None)


def _pairs_units(node: Node, batch: int) -> bool:
    """Whether samples meet one another, perhaps to no effect for most of them, or for now."""
    name, operands = node.name(), node.next_functions
    if name in _MATRIX_PRODUCTS:
        first, second = operands[-2:]
        summed = second[0] is not None and _multiples(graphs.shape(second)[:1], batch) > 0
        return summed or (first[0] is not None and second[0] is not None)
    if name in _DISTANCES:
        return len(shapes(node)[0]) < 3
    if name not in _BROADCASTS or len(operands) < 2 or any(child is None for child, _ in operands):
        return False
    dims = len(shapes(node)[0])
    a, b = [(1,) * (dims - len(sizes)) + sizes for sizes in map(graphs.shape, operands[:2])]
    grows = [_first_alone(a, b, batch), _first_alone(b, a, batch)]
    return max(grows) < dims and not _multiples(a[: min(grows)], batch)


def _first_alone(a: Sequence[int], b: Sequence[int], batch: int) -> int:
    """The first dimension that may be the batch in one operand and is broadcast in the other."""
    found = (i for i, (own, other) in enumerate(zip(a, b, strict=True)) if other == 1 and _multiples([own], batch))
    return next(found, len(a))


def _stays_inside(node: Node, n: int, k: int) -> bool:
    """Whether indexing leaves every value in its unit, wherever the units may lie."""
    sizes = saved(node, "self_sym_sizes")
    for axis, index in enumerate(saved(node, "indices")):
        if index is None or sizes[axis] % (n * k):
            continue
        rows = index.shape[0] if index.dim() else 0
        if axis != 0 or not rows or rows % n:
            return False
        unit = torch.arange(rows, device=index.device) // (rows // n)
        unit = unit.view(-1, *[1] * (index.dim() - 1))
        if not bool(((index % sizes[0]) // (sizes[0] // n) == unit).all()):
            return False
    return True


def _constant(node: Node) -> Tensor | None:
    """The operand of a product that is not differentiated."""
    operands = list(zip(node.next_functions, ("self", "other"), strict=False))
    if len(operands) == 2 and sum(child is None for (child, _), _ in operands) == 1:
        value: Tensor | None = saved(node, next(name for (child, _), name in operands if child is None))
        return value
    return None


def equalise(graph: Graph, n: int) -> None:
    """Let each unit count as much as any other in a mean over targets, however many of its targets are ignored."""
    for node in graph.tail:
        if _takes_mean(node) and (weights := _weights_by_unit(node, n)) is not None:
            factors = weights.sum() / (n * weights)
            node.register_hook(_rescale(factors.masked_fill(weights == 0, 0)))


def _rescale(factors: Tensor) -> Callable[[tuple[Tensor | None, ...], Any], tuple[Tensor | None, ...]]:
    def hook(inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        first, *rest = inputs
        if first is None:
            return inputs
        rows = first.reshape(len(factors), -1)
        return ((rows * factors.to(rows)[:, None]).view_as(first), *rest)

    return hook


def _takes_mean(node: Node) -> bool:
    return node.name() in _OF_TARGETS and saved(node, "reduction") == 1


def _weights_by_unit(node: Node, n: int) -> Tensor | None:
    """How much the targets of each unit weigh, or None where all weigh the same."""
    if node.name() not in _OF_TARGETS:
        return None
    target, weight, ignored = saved(node, "target"), saved(node, "weight"), saved(node, "ignore_index")
    if target.dim() == 0 or target.shape[0] % n:
        return None
    counts = target != ignored
    if weight is not None:
        counts = counts * weight[target.masked_fill(~counts, 0)]
    sums = counts.reshape(n, -1).sum(1, dtype=torch.float64)
    return None if bool((sums == sums[0]).all()) else sums


def extremes(total: Tensor, live: Tensor | None, count: int, traits: Iterable[Sequence[float]] = ()) -> list[int]:
    """Return units that differ most: in how much of them reaches the loss, and in the size of their gradients.

    A factor that depends on the unit, such as the share of padding, is seen on these if on any. If some units have no
    gradient, one of them comes with the others: the loss may have left out what alone would have a gradient. And no
    trait that differs between units, such as their length, is the same in all of these.
    """
    norms = total.diagonal()
    live = torch.zeros_like(norms) if live is None else live
    order = sorted(range(len(norms)), key=lambda i: (float(norms[i]) > 0, float(live[i]), float(norms[i])))
    silent = [i for i in order if float(norms[i]) == 0]
    order = [i for i in order if float(norms[i]) > 0] or order
    ends = [order[0], order[-1], order[len(order) // 2], order[len(order) // 3]]
    chosen = {*list(dict.fromkeys(ends))[:count], *silent[:1]}
    for trait in traits:
        here = trait[order[0]]
        if all(trait[i] == here for i in chosen):
            chosen.add(max(range(len(trait)), key=lambda i: abs(trait[i] - here)))
    return sorted(chosen)


def fits(gram: Tensor, truth: Tensor, total: Tensor, epsilon: float, strictly: bool) -> bool:
    """Whether a Gram is the true one, up to rounding errors of gradients with the Gram ``total``.

    In float32 a ReLU near zero may open in one pass and not in the other, and that is felt in all layers below. So not
    every comparison can be made ``strictly``.
    """
    tight, loose = {torch.float64: (1e-9, 1e-9), torch.float32: (5e-4, 5e-2)}.get(_dtype_of(epsilon), (5e-2, 3e-1))
    relative = tight if strictly else loose
    absolute = noise(epsilon)
    own, all_ = truth.diagonal().clamp_min(0).sqrt(), total.diagonal().clamp_min(0).sqrt()
    mixed = absolute * own.outer(all_)
    allowed = relative * own.outer(own) + mixed + mixed.T + absolute**2 * all_.outer(all_)
    return bool(((gram - truth).abs() <= allowed).all())


def negligible(gram: Tensor, total: Tensor, epsilon: float) -> bool:
    """Whether gradients are nothing but rounding errors of gradients with the Gram ``total``."""
    return bool((gram.diagonal() <= noise(epsilon) ** 2 * total.diagonal()).all())


def alike(gram: Tensor) -> bool:
    """Whether all units have about the same gradient, so that it does not matter which is taken for which."""
    return bool(((gram - gram[0, 0]).abs() <= 1e-2 * gram[0, 0].abs()).all())


def noise(epsilon: float) -> float:
    """Rounding errors of a gradient, relative to the norm of the gradient of all parameters."""
    return min(100 * epsilon, 1e-2)


def _dtype_of(epsilon: float) -> torch.dtype:
    kinds = {torch.finfo(dtype).eps: dtype for dtype in (torch.float64, torch.float32)}
    return kinds.get(epsilon, torch.bfloat16)
