"""The autograd graph of unit losses, and where it uses parameters.

A tensor is *free* (of units) if it is computed from parameters alone: a parameter, its transpose, a product of two.
A *use* is a node that takes a free tensor and has a result with units: there gradients of units begin to differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf.gram.ghost.nodes import dtypes, saved, shapes, unpacks, variable

# How the entries of a free tensor lie compared with its parameter: in the same order, as the transposed matrix, or in
# some other order. In all three cases inner products are those of the parameter.
Layout = Literal["same", "transposed", "moved"]

_COARSE = 1e-4  # half precision rounds by more, and the other types by far less
_SAME_ORDER = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "UnsqueezeBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0",
}  # fmt: skip
_REORDER = {"TBackward0", "TransposeBackward0", "PermuteBackward0", "MovedimBackward0"}
_PART = {"SliceBackward0", "SelectBackward0", "NarrowBackward0"}
_ELEMENTWISE = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"}
# Data may enter where the graph knows of no operand.
_HIDDEN_OPERAND = {
    "EmbeddingBackward0", "EmbeddingBagBackward0", "IndexBackward0", "IndexSelectBackward0", "GatherBackward0",
    "ExpandBackward0", "RepeatBackward0", "WhereBackward0", "MaskedFillBackward0", "MkldnnRnnLayerBackward0",
}  # fmt: skip


class Free(NamedTuple):
    """A free tensor: the parameters behind it, and how it lies if it is one parameter in another form."""

    parameters: frozenset[str]
    layout: Layout | None


class Use(NamedTuple):
    """An operand of a node that is free, while the result is not."""

    node: Node
    slot: int
    source: GradientEdge
    free: Free


@dataclass
class Graph:
    """The uses of parameters in unit losses.

    Attributes:
        order: All nodes, operands first.
        uses: In an order that depends on the graph alone.
        bottom: Nodes with a use and none below them; nothing needs to be differentiated further than that.
        leaves: The parameters that it ends at, each with its name; a parameter may have several leaves.
    """

    order: list[Node]
    uses: list[Use] = field(default_factory=list)
    bottom: list[Node] = field(default_factory=list)
    leaves: list[tuple[str, Tensor]] = field(default_factory=list)


def read(
    root: Node | None, names: Mapping[int, str], n: int, has_units: Mapping[Node, bool], free: Collection[int] = ()
) -> Graph:
    """Return the uses of parameters in a graph.

    Args:
        root: The node that computed the losses.
        names: Of the parameters, by the id of the tensor.
        n: The number of units.
        has_units: Of some nodes, whether their results have units. Of all others it is taken to be so if it may be.
        free: Nodes whose results turned out to have none, by their place in the order.
    """
    graph = Graph(nodes(root))
    known: dict[Node, Free] = {}
    used: dict[Node, bool] = {}  # whether a node or one below it has a use
    for position, node in enumerate(graph.order):
        if (leaf := variable(node)) is not None:
            if (name := names.get(id(leaf))) is not None:
                known[node] = Free(frozenset({name}), "same")
                graph.leaves.append((name, leaf))
            continue
        inputs = node.next_functions
        uses = [
            Use(node, slot, GradientEdge(child, number), known[child])
            for slot, (child, number) in enumerate(inputs)
            if child in known
        ]
        if uses and all(child is None or child in known for child, _ in inputs):
            units = has_units.get(node)
            if units is False or position in free or (units is None and not _may_have_units(node, n)):
                behind = frozenset().union(*(use.free.parameters for use in uses))
                known[node] = Free(behind, _layout(node, uses[0].free))
                continue
        below = any(used.get(child, False) for child, _ in inputs if child is not None)
        graph.uses += uses
        if uses and not below:
            graph.bottom.append(node)
        used[node] = below or bool(uses)
    return graph


def signature(graph: Graph) -> Hashable:
    """Return a key of a graph: the names of its nodes and all shapes. Units lie alike in graphs with equal keys."""
    names = {id(leaf): name for name, leaf in graph.leaves}
    kinds: list[Hashable] = []
    for node in graph.order:
        leaf = variable(node)
        kinds.append((node.name(), *shapes(node)) if leaf is None else names.get(id(leaf)))
    return tuple(kinds)


def is_multiple(use: Use) -> bool:
    """Return whether the operand is a scalar, such as a weight penalty. Then units have multiples of its gradient."""
    return use.free.layout is None and math.prod(shape(use.source)) == 1


def formed(graph: Graph, *, to_join: bool) -> set[str]:
    """Return the parameters whose gradients have to be formed: those that are transformed before they meet the data.

    With ``to_join``, factors will meet those of other graphs, in which entries may be rearranged in another way.
    """
    layouts: dict[str, list[Layout | None]] = defaultdict(list)
    for use in graph.uses:
        layout = "same" if is_multiple(use) else use.free.layout
        for name in use.free.parameters:
            layouts[name].append(layout)
    return {name for name, ways in layouts.items() if None in ways or ("moved" in ways and (to_join or len(ways) > 1))}


def shape(edge: GradientEdge) -> tuple[int, ...]:
    """Return the shape of the tensor that an edge of the graph stands for."""
    leaf = variable(edge.node)
    return shapes(edge.node)[edge.output_nr] if leaf is None else tuple(leaf.shape)


def leaves(root: Node | None) -> list[Tensor]:
    """Return the leaves that a graph ends at."""
    return [leaf for node in nodes(root) if (leaf := variable(node)) is not None]


def precisions(nodes: Sequence[Node]) -> set[torch.dtype]:
    """Return the floating-point types of the results of nodes, operands first, that others use; and of the last node.

    Results that were never computed have a type too, which says nothing.
    """
    edges = {edge for node in nodes for edge in node.next_functions}
    used = {dtypes(node)[number] for node, number in edges if node is not None and variable(node) is None}
    kinds = used | {kind for node in nodes[-1:] if variable(node) is None for kind in dtypes(node)}
    return {kind for kind in kinds if kind.is_floating_point}


def coarsest(nodes: Sequence[Node]) -> torch.dtype:
    """Return the least precise of the `precisions`."""
    return max(precisions(nodes), key=lambda kind: torch.finfo(kind).eps)


def is_coarse(nodes: Sequence[Node]) -> bool:
    """Return whether anything is in half precision, whose rounding may hide a wrong place of the units."""
    return torch.finfo(coarsest(nodes)).eps > _COARSE


def nodes(root: Node | None) -> list[Node]:
    """Return all nodes of a graph, operands first."""
    order: list[Node] = []
    seen: set[Node] = set()
    todo: list[tuple[Node | None, bool]] = [(root, False)]
    while todo:
        node, done = todo.pop()
        if node is None:
            continue
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo.extend((child, False) for child, _ in node.next_functions)
    return order


def _may_have_units(node: Node, n: int) -> bool:
    """Return whether the result of a node that differentiates free tensors alone may have units, by its shape."""
    name, operands = node.name(), [child for child, _ in node.next_functions]
    if None not in operands and name not in _HIDDEN_OPERAND:
        return False  # no data
    results = shapes(node)
    if not any(size > 0 and size % n == 0 for result in results for size in result):
        return False
    sources = [shape(GradientEdge(child, number)) for child, number in node.next_functions if child is not None]
    # With units, the result would have a dimension more.
    return not (name in _ELEMENTWISE | {"ExpandBackward0"} and results[0] in sources)


def _layout(node: Node, operand: Free) -> Layout | None:
    name = node.name()
    if operand.layout is not None and (name in _PART or (name == "EmbeddingBackward0" and _looks_up_once(node))):
        return "moved"  # and zeros elsewhere
    if operand.layout is None or name not in _SAME_ORDER | _REORDER:
        return None
    if name in _SAME_ORDER:
        keeps = operand.layout == "same" or name in ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")
        return operand.layout if keeps else "moved"
    swaps = name != "PermuteBackward0" or tuple(saved(node, "dims")) in ((1, 0), (-1, -2))
    if len(shapes(node)[0]) == 2 and swaps:
        return {"same": "transposed", "transposed": "same", "moved": "moved"}[operand.layout]  # type: ignore[return-value]
    return "moved"


def _looks_up_once(node: Node) -> bool:
    """Return whether an embedding takes different rows of its table, as that of positions does."""
    if unpacks(node):  # a checkpoint can be unpacked only once
        return False
    index = saved(node, "indices")
    padding = bool((index == saved(node, "padding_idx")).any()) or saved(node, "scale_grad_by_freq")
    return not padding and len(index.unique()) == index.numel()
