"""The Gram of the units from the backward pass that the training runs anyway.

The nodes of the graph are given hooks that read the gradients which pass by; nothing is called, captured or changed.
Which units the graph holds, and how, is known from an earlier measurement of the whole batch in one pass (`ghost`). So
a graph that was not met then, or that leaves room for the data to weigh or mix units, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost import trust
from lightning_gradconf.gram.ghost.accumulator import Collector, Grams, Pass, Receiver, to_pull
from lightning_gradconf.gram.ghost.calibration import told_nothing
from lightning_gradconf.gram.ghost.contraction import Contribution, Workspace, gram_of_sum, scaled
from lightning_gradconf.gram.ghost.memory import Known, Memory
from lightning_gradconf.gram.ghost.nodes import saved, unpacks

# With dropout, nodes of these kinds come into the graph. They act on each number alone, so they mix nothing.
_DROPOUT = {trust.MASK, "NativeDropoutBackward0", "FusedDropoutBackward0", "DropoutBackward0"}


@dataclass
class Ride:
    """A backward pass that is listened to.

    Attributes:
        collector: Makes Grams of what it brings, or keeps it.
        parameters: That are measured.
        work: What contractions share.
        known: About the graph.
        scale: What the training multiplied the loss by.
        error: The first error in a hook.
        handles: Of the hooks.
    """

    collector: Collector
    parameters: Mapping[str, Tensor]
    work: Workspace
    known: Known
    scale: Tensor | None = None
    error: Exception | None = None
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def listen(self, root: Node) -> None:
        """Register the hooks; ``root`` is the node that computed the loss of the module."""
        self.handles.append(root.register_prehook(self._once(self._read_scale)))
        self.handles += [node.register_prehook(self._once(hook)) for node, hook in self.collector.receivers.items()]

    def _read_scale(self, deltas: Sequence[Tensor | None]) -> None:
        self.scale = None if deltas[0] is None else deltas[0].detach().clone()

    def _once(self, hook: Receiver) -> Receiver:
        """An error in ``hook`` must not reach the training, nor a second backward pass through the same graph us."""
        called = False

        def safe(deltas: Sequence[Tensor | None]) -> None:
            nonlocal called
            if called or self.error is not None:
                return
            called = True
            try:
                hook(deltas)
            except Exception as error:
                self.error = error.with_traceback(None)  # its frames would keep the graph

        return safe

    def leave(self) -> None:
        """Remove the hooks: they and the graph would keep one another alive."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.collector.receivers.clear()

    def grams(self) -> Grams:
        """Return the inner products of the units' gradients, after the backward pass.

        Raises:
            RuntimeError: They could not be told.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            found, scales = self._completed()
            self._check(found.grams)
            return {name: gram * scales[name] ** 2 for name, gram in found.grams.items()}

    def factors(self) -> dict[str, list[Contribution]]:
        """Return what the units' gradients are made of, after a backward pass that kept it.

        Raises:
            RuntimeError: It could not be told.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            found, scales = self._completed()
            if self.known.untold:
                self._check({name: gram_of_sum(parts, self.work) for name, parts in found.factors.items()})
            return {name: [scaled(part, scales[name]) for part in found.factors.pop(name)] for name in self.parameters}

    def _completed(self) -> tuple[Pass, dict[str, float]]:
        """What the backward pass brought, and by what the factors of each parameter are to be multiplied."""
        if self.error is not None:
            raise self.error
        if self.scale is None:
            raise RuntimeError("the backward pass did not begin at the loss")
        self.collector.finish()
        if missing := self.collector.found.missing:
            raise RuntimeError(next(iter(missing.values())))
        scale = float(self.scale)
        return self.collector.found, {name: route.scale / scale for name, route in self.known.routes.items()}

    def _check(self, grams: Grams) -> None:
        if not told_nothing(self.known, grams, self.collector.found.facts):
            raise RuntimeError("a parameter has a gradient now that could not be checked before")


def board(
    root: Node,
    parameters: Mapping[str, Tensor],
    samples: int,
    k: int,
    first: int,
    memory: Memory,
    keep: bool = False,
) -> Ride:
    """Prepare to measure the first units of the batch in the backward pass that is about to begin at ``root``.

    Args:
        root: The node that computed the loss of the module.
        parameters: Of the module, by name.
        samples: In the batch.
        k: Samples in a unit.
        first: How many units are measured.
        memory: What measurements of batches of this size have found out.
        keep: Keep what the gradients are made of, for units of other ranks to be added.

    Raises:
        RuntimeError: The graph is none that was measured before, or not only its units decide about gradients.
        NotImplementedError: An attribute of a node is missing.
    """
    graph = graphs.read(root, parameters, samples)
    if any(unpacks(node) for node in graph.nodes):
        raise RuntimeError("saved tensors may be made only when they are asked for, as with activation checkpoints")
    facts = trust.facts(graph, samples // k, k)
    known = memory.known.get(facts.signature)
    if known is None or known.routes.keys() != parameters.keys():
        raise RuntimeError("its parameters are used in other ways than in the measurement before")
    if any(route.guess is None for route in known.routes.values()):
        raise RuntimeError("some parameters take another engine")
    if known.kinds is None or not facts.proven or facts.constants != known.constants:
        raise RuntimeError("the data may weigh units, which is to be checked each time")
    if new := [kind for kind in facts.kinds - known.kinds if kind not in _DROPOUT] or list(known.kinds - facts.kinds):
        raise RuntimeError(f"it differs from the graph measured before ({new[0]})")
    if free := {name for name, route in known.routes.items() if route.free}:
        graph = graphs.read(root, parameters, samples, free)
    if (carrier := trust.carries_between_units(graph, facts.n, k)) is not None:
        raise RuntimeError(f"{carrier} may carry values from one unit to another")
    if trust.weighs_units(graph, facts.n):
        raise RuntimeError("units have different numbers of targets")
    if names := to_pull(graph):
        raise RuntimeError(f"{min(names)} is transformed before it meets the data")
    collector = Collector(graph, facts, known.routes, memory.work, first, keep)
    return Ride(collector, parameters, memory.work, known)


def root_of(loss: Tensor, divided_by: int | None, scaled: bool) -> Node:
    """Return the node that computed the loss of the module, below what the training made of it.

    Args:
        loss: What the training differentiates.
        divided_by: The number of batches that gradients accumulate over, if the training divided by it.
        scaled: Whether a GradScaler has scaled the loss after that.

    Raises:
        RuntimeError: The training did something else.
    """
    node, number = loss.grad_fn, loss.output_nr
    for name, expected, applied in (("MulBackward0", None, scaled), ("DivBackward0", divided_by, bool(divided_by))):
        if not applied:
            continue
        factor = saved(node, "other") if node is not None and node.name() == name else None
        if factor is None or factor.numel() != 1 or (expected is not None and float(factor) != expected):
            raise RuntimeError("the training has changed the loss in a way that is not known")
        assert node is not None
        node, number = node.next_functions[0]
    if node is not None and node.name() == "_DDPSinkBackward":  # hands on all that training_step returned
        node = node.next_functions[number][0]
    if node is None:
        raise RuntimeError("the loss does not depend on any parameter")
    return node
