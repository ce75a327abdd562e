"""The autograd graph of a loss, and where it uses parameters.

A tensor is *free* (of the batch) if it is computed from parameters alone: a parameter, its transpose, a product of two.
A *use* is a node that takes a free tensor and data: there the batch enters, and there gradients of units differ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradconf.gram.ghost.nodes import saved, shapes, unpacks, variable

# How the entries of a free tensor lie compared with its parameter: in the same order, as the transposed matrix, or in
# some other order. In all three cases inner products are those of the parameter.
Layout = Literal["same", "transposed", "moved"]

_SAME_ORDER = {
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "UnsqueezeBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0",
}  # fmt: skip
_REORDER = {"TBackward0", "TransposeBackward0", "PermuteBackward0", "MovedimBackward0"}
_SELECT = {
    "SliceBackward0", "SelectBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0",
    "ChunkBackward0", "NarrowBackward0", "AsStridedBackward0",
}  # fmt: skip
_PART = {"SliceBackward0", "SelectBackward0", "NarrowBackward0"}
_ELEMENTWISE = {"AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0"}
# Their data is no operand that the graph knows of.
_HIDDEN_OPERAND = {
    "EmbeddingBackward0", "EmbeddingBagBackward0", "IndexBackward0", "IndexSelectBackward0", "GatherBackward0",
    "ExpandBackward0", "RepeatBackward0", "WhereBackward0", "MaskedFillBackward0", "MkldnnRnnLayerBackward0",
}  # fmt: skip

Edge = tuple[Node | None, int]


@dataclass(frozen=True)
class Free:
    """A free tensor: the parameters behind it, and how it lies if it is one parameter in other clothes."""

    leaves: frozenset[str]
    layout: Layout | None


@dataclass(frozen=True)
class Use:
    """An operand of a node that is free, while the result is not."""

    node: Node
    slot: int
    source: Edge
    free: Free


@dataclass
class Graph:
    """The uses of parameters in a loss.

    Attributes:
        leaves: The parameters, by name.
        uses: In the order of the forward pass.
        bottom: Nodes with a use and none below them; nothing needs to be differentiated further than that.
        tail: All nodes between the loss and the first uses met from there.
        nodes: All nodes between the loss and any use.
        others: Leaves that are none of the parameters.
    """

    leaves: Mapping[str, Tensor]
    uses: list[Use] = field(default_factory=list)
    bottom: list[Node] = field(default_factory=list)
    tail: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)


def read(root: Node | None, leaves: Mapping[str, Tensor], batch: int, free: Collection[str] = ()) -> Graph:
    """Return the uses of ``leaves`` in the graph of a loss.

    Args:
        root: The node that computed the loss.
        leaves: The parameters, by name.
        batch: The number of samples, which tells a batched tensor from a free one.
        free: Parameters for which the first tensor that may be batched is taken to be free.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    graph = Graph(leaves)
    known: dict[Node, Free] = {}
    used: dict[Node, bool] = {}  # whether a node or one below it has a use
    for node in _leaves_first(root):
        if (leaf := variable(node)) is not None:
            if (name := names.get(id(leaf))) is not None:
                known[node] = Free(frozenset({name}), "same")
            else:
                graph.others.append(leaf)
            continue
        inputs = [child for child, _ in node.next_functions]
        operands = {slot: known[child] for slot, child in enumerate(inputs) if child in known}
        if operands and all(child is None or child in known for child in inputs):
            behind = frozenset().union(*(operand.leaves for operand in operands.values()))
            if _stays_free(node, batch, bool(behind & set(free))):
                known[node] = Free(behind, _layout(node, next(iter(operands.values()))))
                continue
        graph.nodes.append(node)
        below = any(used.get(child, False) for child in inputs if child is not None)
        for slot, operand in operands.items():
            graph.uses.append(Use(node, slot, node.next_functions[slot], operand))
        if operands and not below:
            graph.bottom.append(node)
        used[node] = below or bool(operands)
    with_use = {use.node for use in graph.uses}
    graph.tail = [node for node in _until(root, with_use) if used.get(node, False)]
    graph.nodes = [node for node in graph.nodes if used[node]]
    return graph


def shape(edge: Edge) -> tuple[int, ...]:
    """Return the shape of the tensor that an edge of the graph stands for."""
    node, number = edge
    assert node is not None
    leaf = variable(node)
    return shapes(node)[number] if leaf is None else tuple(leaf.shape)


def leaves(root: Node | None) -> list[Tensor]:
    """Return the leaves that a graph ends at."""
    return [leaf for node in _leaves_first(root) if (leaf := variable(node)) is not None]


def _leaves_first(root: Node | None) -> list[Node]:
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


def _until(root: Node | None, stop: set[Node]) -> list[Node]:
    seen: set[Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen and node not in stop:
            seen.add(node)
            todo.extend(child for child, _ in node.next_functions)
    return list(seen)


def _stays_free(node: Node, batch: int, prefer: bool) -> bool:
    """Whether a node that differentiates nothing but free tensors is free itself, or data enters in it."""
    name = node.name()
    if name in _SAME_ORDER | _REORDER | _SELECT:
        return True
    results = shapes(node)
    if prefer or not any(size and size % batch == 0 for result in results for size in result):
        return True
    operands = [(child, number) for child, number in node.next_functions if child is not None]
    if len(operands) == len(node.next_functions):
        return name not in _HIDDEN_OPERAND
    # A batch would have made the result larger than the parameter.
    return name in _ELEMENTWISE and results[0] in map(shape, operands)


def _layout(node: Node, operand: Free) -> Layout | None:
    name = node.name()
    if operand.layout is not None and (name in _PART or (name == "EmbeddingBackward0" and _looks_up_once(node))):
        return "moved"  # and zeros elsewhere
    if operand.layout is None or name not in _SAME_ORDER | _REORDER:
        return None
    if name in _SAME_ORDER:
        keeps = operand.layout == "same" or name in ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")
        return operand.layout if keeps else "moved"
    if len(shapes(node)[0]) == 2 and name != "PermuteBackward0":
        return {"same": "transposed", "transposed": "same", "moved": "moved"}[operand.layout]  # type: ignore[return-value]
    return "moved"


def _looks_up_once(node: Node) -> bool:
    """Whether an embedding takes different rows of its table, as that of positions does."""
    if unpacks(node):  # a checkpoint can be unpacked only once
        return False
    index = saved(node, "indices")
    padding = bool((index == saved(node, "padding_idx")).any()) or saved(node, "scale_grad_by_freq")
    return not padding and len(index.unique()) == index.numel()
