"""One forward and one backward pass of all units as one batch, without gradients of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf import units as batches
from lightning_gradconf.engines import graph as graphs
from lightning_gradconf.engines import trust
from lightning_gradconf.engines.collector import Collector, Pass
from lightning_gradconf.engines.memory import Memory, Route
from lightning_gradconf.engines.nodes import shapes
from lightning_gradconf.engines.objective import Objective, run_backward
from lightning_gradconf.engines.trust import Reads


@dataclass(frozen=True)
class Task:
    """What is to be measured: an objective on units of ``unit_size`` samples each."""

    objective: Objective
    units: Sequence[Any]
    unit_size: int


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
    reads = Reads()

    def differentiate(loss: Tensor) -> Pass:
        reads.stop()
        with torch._C.DisableTorchFunction():
            graph = graphs.read(loss.grad_fn, leaves, n * k)
            facts = trust.facts(graph, n, k)
            facts = replace(facts, proven=facts.proven and not reads.happened)
            known = memory.known.get(facts.signature)
            chosen = routes if routes is not None else known.routes if known is not None else {}
            if free := {name for name, route in chosen.items() if route.free}:
                graph = graphs.read(loss.grad_fn, leaves, n * k, free)
            if (carrier := trust.carries_between_units(graph, n, k)) is not None:
                raise RuntimeError(f"{carrier} may carry values from one unit to another, depending on the data")
            trust.equalise(graph, n)
            collector = Collector(graph, facts, chosen, memory.work, keep=keep)
        _run(loss, graph.bottom, collector)
        return collector.found

    with reads:
        found = objective.at(leaves | constants, joint, differentiate)
    if reads.branched:
        raise RuntimeError("the forward pass branches on values that it computed, so units may go different ways")
    return found


def _run(loss: Tensor, bottom: list[Node], collector: Collector) -> None:
    """Run the backward pass down to the nodes at the bottom, and let the collector have what comes by."""
    receivers = collector.receivers
    edges = [GradientEdge(node, i) for node in bottom for i in range(len(shapes(node)))]
    # What the pass ends at is returned by it; a hook there would not be called.
    hooks = [node.register_prehook(receivers[node]) for node in receivers.keys() - set(bottom)]
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
