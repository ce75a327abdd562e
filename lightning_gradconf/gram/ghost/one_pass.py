"""One forward and one backward pass of all units as one batch, without gradients of parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf.batches import units as batches
from lightning_gradconf.gram.blockwise import megabytes
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost import lstm, trust
from lightning_gradconf.gram.ghost.accumulator import Collector, Pass, to_pull
from lightning_gradconf.gram.ghost.memory import Memory, Route
from lightning_gradconf.gram.ghost.nodes import shapes
from lightning_gradconf.gram.ghost.reads import Reads
from lightning_gradconf.gram.objective import Objective, accumulation_dtype, run_backward, sizes


@dataclass(frozen=True)
class Task:
    """What is to be measured: an objective on units of ``unit_size`` samples each.

    ``room`` is the bytes that gradients may fill where they have to be formed; None is without bound.
    """

    objective: Objective
    units: Sequence[Any]
    unit_size: int
    room: int | None = None


def measure(task: Task, memory: Memory, routes: dict[str, Route] | None = None, keep: bool = False) -> Pass:
    """Return what one pass over all units brings, on the given routes or those that are remembered.

    With ``keep``, that has the factors of the units' gradients too.

    Raises:
        RuntimeError: Units mix in a way that can be seen from the graph, or may go different ways.
    """
    objective, n, k = task.objective, len(task.units), task.unit_size
    with torch._C.DisableTorchFunction():  # the modes that watch the user's code see nothing of ours, and cost nothing
        leaves = {name: memory.copy(name, p).requires_grad_() for name, p in objective.parameters.items()}
        constants = {name: memory.copy(name, t) for name, t in objective.constants.items()}
        joint = batches.join(task.units)
    reads = Reads(n * k, (*leaves.values(), *constants.values()))
    reads.happened = batches.differ_beside_tensors(task.units)

    def differentiate(loss: Tensor) -> Pass:
        reads.stop()
        with torch._C.DisableTorchFunction():
            graph = graphs.read(loss.grad_fn, leaves, n * k)
            facts = trust.facts(graph, n, k)
            facts = replace(facts, proven=facts.proven and not reads.happened and not reads.mixed)
            known = memory.known.get(facts.signature)
            chosen = routes if routes is not None else known.routes if known is not None else {}
            if free := {name for name, route in chosen.items() if route.free}:
                graph = graphs.read(loss.grad_fn, leaves, n * k, free)
            objective.check_leaves(graph.others)
            if (carrier := trust.carries_between_units(graph, n, k)) is not None:
                raise RuntimeError(f"{carrier} may carry values from one unit to another, depending on the data")
            if (pairing := trust.pairs_units(graph, n, k)) is not None:
                memory.refused = f"{pairing} mixes units, each with each"
                raise RuntimeError(memory.refused)
            trust.equalise(graph, n)
            if pulled := to_pull(graph):
                shapes_of = {use.source: graphs.shape(use.source) for use in graph.uses if use.free.leaves & pulled}
                check_room(task, memory, pulled, sum(math.prod(shape) for shape in shapes_of.values()))
            collector = Collector(graph, facts, chosen, memory.work, keep=keep)
        _run(loss, graph.bottom, collector)
        return collector.found

    with reads:
        found = objective.at(leaves | constants, joint, differentiate)
    if reads.branched:
        raise RuntimeError("the forward pass branches on values that it computed, so units may go different ways")
    return found


def check_room(task: Task, memory: Memory, names: Collection[str], more: int = 0) -> None:
    """Refuse to form the gradients of some parameters, and ``more`` elements for each unit, where they do not fit."""
    formed = [task.objective.parameters[name] for name in names]
    needed = len(task.units) * (sum(sizes(formed)) + more * accumulation_dtype(formed[0]).itemsize)
    if task.room is not None and needed > task.room:
        memory.refused = (
            f"the gradients of {len(names)} parameters, of {min(names)} for one, have to be formed, and take "
            f"{megabytes(needed)}, which the memory budget has no room for"
        )
        raise RuntimeError(memory.refused)


def _run(loss: Tensor, bottom: list[Node], collector: Collector) -> None:
    """Run the backward pass down to the nodes at the bottom, and let the collector have what comes by."""
    receivers = collector.receivers
    edges = [GradientEdge(node, i) for node in bottom for i in range(len(shapes(node)))]
    # What the pass ends at is returned by it; a hook there would not be called.
    passed = receivers.keys() - set(bottom)
    hooks = [node.register_prehook(receivers[node]) for node in passed]
    for node in passed:
        if node.name() == lstm.NAME:
            hooks += lstm.shorten(node, lambda: collector.scratch.pop("gates", None))
    try:
        captured = run_backward(loss, tuple(edges), keep_graph=False) if edges else ()
        by_node: dict[Node, list[Tensor | None]] = defaultdict(list)
        for edge, delta in zip(edges, captured, strict=True):
            by_node[edge.node].append(delta)
        for node, deltas in by_node.items():
            receivers[node](deltas)
    finally:
        for hook in hooks:  # a node, its hook and what the hook knows of the graph would keep one another alive
            hook.remove()
        receivers.clear()
    collector.finish()
