"""The Gram of the units' gradients from one pass over all units, without forming the gradients.

One forward pass of all units as one batch gives a loss and its graph (`graph`). A backward pass computes the gradient
of the result of each node that uses a parameter, and no gradient of a parameter. From both follow the factors of the
gradient that each unit contributes (`rules`), and from the factors the inner products (`contraction`).

That the contribution of a unit is its gradient, up to one factor, is not assumed but checked against the loop on a few
units, for each parameter, whenever the graph changes (`_calibrate`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf import units as batches
from lightning_gradconf.engines import graph as graphs
from lightning_gradconf.engines import loop, trust, vmap
from lightning_gradconf.engines.contraction import Contribution, Dense, Rows, Workspace, gram_of_sum, head, whole
from lightning_gradconf.engines.graph import Graph, Use
from lightning_gradconf.engines.nodes import shapes, variable
from lightning_gradconf.engines.objective import Objective, accumulation_dtype, contract, run_backward
from lightning_gradconf.engines.rules import Units, contribution, wide
from lightning_gradconf.engines.trust import Reads, Signature
from lightning_gradconf.isolation import without_warnings

Grams = dict[str, Tensor]
Receiver = Callable[[Sequence[Tensor | None]], None]
_GUESSES = 6
_SAMPLES = 4
_KEPT = 1 << 22  # elements of the copies that are kept between measurements


@dataclass(frozen=True)
class Route:
    """How the Gram of a parameter is found.

    Attributes:
        guess: Where the units lie, as in `rules.Units`; None is the way of the other engines.
        free: Whether the first tensor that might be batched is not.
        scale: What turns a unit's contribution to the loss of all into its own loss: their number for a mean.
    """

    guess: int | None = 0
    free: bool = False
    scale: float = 1.0


@dataclass
class Memory:
    """What was found out in earlier measurements of the same module and loss.

    Attributes:
        routes: For each graph met, the route of each parameter.
        unseen: For each graph met, the parameters that had no gradient when they were to be checked.
        constants: For each graph met, what the loss was multiplied or divided by.
        kinds: For each graph met that leaves no room for the data to weigh units, how many nodes of each kind it has.
        work: What contractions share.
        copies: Of the module's tensors, if they are small: to write to old memory is faster.
        engine: Which engine measured last.
        refused: Why this module and loss cannot be measured in one pass, if so.
    """

    routes: dict[Signature, dict[str, Route]] = field(default_factory=dict)
    unseen: dict[Signature, set[str]] = field(default_factory=dict)
    constants: dict[Signature, tuple[float, ...]] = field(default_factory=dict)
    kinds: dict[Signature, Counter[str]] = field(default_factory=dict)
    work: Workspace = field(default_factory=Workspace)
    copies: dict[str, Tensor] = field(default_factory=dict)
    engine: str | None = None
    refused: str | None = None

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor of the module, a leaf of any graph to come."""
        old = self.copies.get(name)
        if old is None or (old.shape, old.stride(), old.dtype, old.device) != (
            tensor.shape, tensor.stride(), tensor.dtype, tensor.device,
        ):  # fmt: skip
            old = tensor.detach().clone()
            if old.numel() + sum(copy.numel() for copy in self.copies.values()) <= _KEPT:
                self.copies[name] = old
            return old.detach()
        return old.detach().copy_(tensor.detach())


@dataclass
class Pass:
    """One forward and backward pass of all units.

    Attributes:
        grams: Of the contributions to the loss of all, where a rule applies.
        missing: Why no rule applies, for all other parameters.
        guesses: In how many places the units may lie, by parameter.
        signature: What the graph looks like.
        proven: Whether the factor between a unit's contribution and its gradient cannot depend on the data.
        constants: What the loss is multiplied or divided by.
        kinds: How many nodes of each kind there are.
        top: Parameters with no other parameter between one of their uses and the loss.
        live: How many results of each unit reach the loss.
    """

    signature: Signature
    proven: bool
    constants: tuple[float, ...]
    epsilon: float
    kinds: Counter[str]
    grams: Grams = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    guesses: dict[str, int] = field(default_factory=dict)
    top: set[str] = field(default_factory=set)
    live: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """A few units and the true Grams of their gradients."""

    units: list[int]
    grams: Grams

    def fits(self, found: Pass, name: str, scale: float, strictly: bool) -> bool:
        """Whether the Gram of a parameter that a pass found is the true one on these units."""
        gram = found.grams[name][self.units][:, self.units] * scale**2
        return trust.fits(gram, self.grams[name], sum_of(self.grams), found.epsilon, strictly)


def unit_grams(
    objective: Objective, units: Sequence[Any], unit_size: int | None, memory: Memory | None = None
) -> Grams:
    """Return the inner products of the units' gradients, ``{parameter name: (n, n)}``.

    Args:
        objective: What to differentiate.
        units: Batches of ``unit_size`` samples each.
        unit_size: Samples in a unit; None if they cannot be told.
        memory: What earlier calls have found out, and room for what this one does.

    Raises:
        RuntimeError: One pass over all units cannot give their gradients; the message says why.
    """
    memory = Memory() if memory is None else memory
    if memory.refused is not None:
        raise RuntimeError(memory.refused)
    if len(units) == 1:
        raise RuntimeError("a single unit is measured as it is")
    if unit_size is None:
        raise RuntimeError("the samples of a unit cannot be told, so its place in a batch of all cannot either")
    found = _measure(objective, units, unit_size, memory, None)
    routes = memory.routes.get(found.signature)
    if routes is None or not _still_right(objective, units, found, routes, memory):
        try:
            found, routes = _calibrate(objective, units, unit_size, memory, found)
        except RuntimeError as error:
            if not found.grams or sum_of(found.grams).isfinite().all():  # otherwise it may do next time
                memory.refused = str(error)
            raise
    if found.proven:
        memory.kinds[found.signature] = found.kinds
    else:
        memory.kinds.pop(found.signature, None)
    scaled = {
        name: gram * routes[name].scale ** 2 for name, gram in found.grams.items() if routes[name].guess is not None
    }
    rest = [name for name in objective.parameters if name not in scaled]
    return _in_order(objective, scaled | (_by_others(objective, units, rest) if rest else {}))


def _measure(
    objective: Objective, units: Sequence[Any], unit_size: int, memory: Memory, routes: dict[str, Route] | None
) -> Pass:
    """One pass, with the given routes or those that are remembered."""
    with torch._C.DisableTorchFunction():  # the modes that watch the user's code see nothing of ours, and cost nothing
        leaves = {name: memory.copy(name, p).requires_grad_() for name, p in objective.parameters.items()}
        constants = {name: memory.copy(name, t) for name, t in objective.constants.items()}
        joint = batches.join(units)
    size = len(units) * unit_size
    reads = Reads()

    def differentiate(loss: Tensor) -> Pass:
        reads.stop()
        with torch._C.DisableTorchFunction():
            graph = graphs.read(loss.grad_fn, leaves, size)
            signature, kinds = trust.signature(graph, len(units), unit_size), trust.kinds(graph)
            chosen = memory.routes.get(signature, {}) if routes is None else routes
            if free := {name for name, route in chosen.items() if route.free}:
                graph = graphs.read(loss.grad_fn, leaves, size, free)
            if (carrier := trust.carries_between_units(graph, len(units), unit_size)) is not None:
                raise RuntimeError(f"{carrier} may carry values from one unit to another, depending on the data")
            trust.equalise(graph, len(units))
            proven = trust.is_proven(graph) and not reads.happened
            found = Pass(signature, proven, trust.constants(graph), trust.epsilon(graph), kinds)
        _differentiate(loss, leaves, graph, chosen, found, len(units), unit_size, memory)
        return found

    with reads:
        found = objective.at(leaves | constants, joint, differentiate)
    if reads.branched:
        raise RuntimeError("the forward pass branches on values that it computed, so units may go different ways")
    return found


def _differentiate(
    loss: Tensor,
    leaves: dict[str, Tensor],
    graph: Graph,
    routes: dict[str, Route],
    found: Pass,
    n: int,
    k: int,
    memory: Memory,
) -> None:
    """Run the backward pass and contract what it brings, as it comes."""
    receivers, finish = collect(leaves, graph, routes, found, n, k, memory)
    bottom = [GradientEdge(node, i) for node in graph.bottom for i in range(len(shapes(node)))]
    hooks = [node.register_prehook(receivers[node]) for node in receivers.keys() - set(graph.bottom)]
    try:
        captured = run_backward(loss, tuple(bottom), keep_graph=False) if bottom else ()
        by_node: dict[Node, list[Tensor | None]] = defaultdict(list)
        for edge, delta in zip(bottom, captured, strict=True):
            by_node[edge.node].append(delta)
        for node, deltas in by_node.items():
            receivers[node](deltas)
    finally:
        for hook in hooks:  # a node, its hook and what the hook knows of the graph would keep one another alive
            hook.remove()
    finish()


def collect(
    leaves: Mapping[str, Tensor],
    graph: Graph,
    routes: dict[str, Route],
    found: Pass,
    n: int,
    k: int,
    memory: Memory,
    first: int | None = None,
) -> tuple[dict[Node, Receiver], Callable[[], None]]:
    """Return what each node with a use shall do with the gradients of its results, and what comes in the end.

    After that ``found`` has the Grams, of all n units or only of the ``first`` of them.
    """
    uses_of: dict[Node, list[Use]] = defaultdict(list)
    waiting: dict[str, int] = defaultdict(int)
    for use in graph.uses:
        uses_of[use.node].append(use)
        for name in use.free.leaves:
            waiting[name] += 1
    parts: dict[str, list[Contribution]] = defaultdict(list)
    pulled: dict[GradientEdge, Tensor] = {}
    by_pull = to_pull(graph)
    top = {child for node in graph.tail for child, _ in node.next_functions if child in uses_of}

    def receive(node: Node, deltas: Sequence[Tensor | None]) -> None:
        if node in top:
            found.top |= {name for use in uses_of[node] for name in use.free.leaves}
        delta = next((delta for delta in deltas if delta is not None), None)
        scratch: dict[str, Any] = {}
        for use in uses_of[node]:
            names = use.free.leaves
            if any(routes.get(name, Route()).guess is None or name in found.missing for name in names):
                continue
            route = routes.get(next(iter(names)), Route())
            units = Units(n, k, route.guess or 0, deltas=deltas, scratch=scratch)
            try:
                if delta is not None:
                    part = contribution(node, use.slot, delta, graphs.shape(use.source), units)
                    if node in top and isinstance(part, Rows):
                        _count_live(found, part, use.slot)
                    if first is not None:
                        part = head(part, first)
                    if names & by_pull:
                        node_below, number = use.source
                        assert node_below is not None
                        edge = GradientEdge(node_below, number)
                        pulled[edge] = pulled[edge] + whole(part) if edge in pulled else whole(part)
                    else:
                        parts[next(iter(names))].append(_upright(part, use))
                for name in names:
                    found.guesses[name] = max(found.guesses.get(name, 1), units.guesses)
            except LookupError as error:
                found.missing |= {name: str(error) for name in names}
                continue
            for name in names - by_pull:
                waiting[name] -= 1
                if not waiting[name] and parts[name]:
                    found.grams[name] = gram_of_sum(parts.pop(name), memory.work)

    def finish() -> None:
        for name in [name for name in parts if parts[name] and name not in found.missing]:
            found.grams[name] = gram_of_sum(parts.pop(name), memory.work)  # not all of its uses had a gradient
        if pulled:
            _pull(pulled, {name: leaves[name] for name in by_pull if name not in found.missing}, found, first or n)
        for name, leaf in leaves.items():
            if name not in found.grams and name not in found.missing and routes.get(name, Route()).guess is not None:
                shape = (first or n,) * 2
                found.grams[name] = torch.zeros(shape, dtype=accumulation_dtype(leaf), device=leaf.device)

    return {node: _hook(receive, node) for node in uses_of}, finish


def _hook(receive: Callable[[Node, Sequence[Tensor | None]], None], node: Node) -> Receiver:
    def hook(deltas: Sequence[Tensor | None]) -> None:
        if all(delta is None for delta in deltas):
            return
        device = next(delta.device.type for delta in deltas if delta is not None)
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch.autocast(device, enabled=False):
            receive(node, deltas)

    return hook


def to_pull(graph: Graph) -> set[str]:
    """The parameters whose gradients come out of the free part of the graph, where it is more than a rearrangement."""
    layouts: dict[str, list[Any]] = defaultdict(list)
    for use in graph.uses:
        for name in use.free.leaves:
            layouts[name].append(use.free.layout)
    names = {name for name, ways in layouts.items() if None in ways or (len(ways) > 1 and "moved" in ways)}
    while more := {name for use in graph.uses if use.free.leaves & names for name in use.free.leaves} - names:
        names |= more
    return names


def _upright(part: Contribution, use: Use) -> Contribution:
    """A contribution to a transposed parameter as one to the parameter."""
    if use.free.layout != "transposed":
        return part
    if isinstance(part, Rows):
        return Rows(part.right, part.left)
    shape = graphs.shape(use.source)
    return Dense(torch.unflatten(whole(part), 1, shape).transpose(1, 2).flatten(1))


def _count_live(found: Pass, part: Rows, slot: int) -> None:
    delta = part.right if slot == 2 or part.left.shape[3] == 0 else part.left
    live = (delta != 0).any(-1).sum((0, 2))
    found.live = live if found.live is None else found.live + live


def _pull(pulled: dict[GradientEdge, Tensor], leaves: dict[str, Tensor], found: Pass, n: int) -> None:
    """Take the unit gradients of free tensors back to the parameters that they are made of."""
    rows: dict[str, Tensor] = {}
    inner: list[GradientEdge] = []
    names = {id(leaf): name for name, leaf in leaves.items()}
    for edge in pulled:
        leaf = variable(edge.node)
        if leaf is None:
            inner.append(edge)
        elif id(leaf) in names:
            rows[names[id(leaf)]] = pulled[edge]
    if inner and leaves:
        gradients = [pulled[edge].reshape(n, *graphs.shape((edge.node, edge.output_nr))) for edge in inner]
        # Some of PyTorch's operations have no batching rule, are right all the same, and say so each time.
        with without_warnings("There is a performance drop because"):
            back = torch.autograd.grad(
                inner, list(leaves.values()), gradients, is_grads_batched=True, allow_unused=True, retain_graph=True
            )
        for name, row in zip(leaves, back, strict=True):
            if row is not None:
                rows[name] = rows.get(name, 0) + row.reshape(n, -1)
    for name, row in rows.items():
        row = wide(row)
        found.grams[name] = row @ row.T


def _still_right(
    objective: Objective, units: Sequence[Any], found: Pass, routes: dict[str, Route], memory: Memory
) -> bool:
    """Whether what was calibrated before holds for these units too."""
    total = sum_of(found.grams)
    if not all(trust.negligible(found.grams[name], total, found.epsilon) for name in memory.unseen[found.signature]):
        return False
    if found.proven and found.constants == memory.constants[found.signature]:
        return True
    sample = _truth(objective, units, trust.extremes(total, found.live, 2))
    return all(
        sample.fits(found, name, route.scale, strictly=name in found.top)
        for name, route in routes.items()
        if route.guess is not None
    )


def _calibrate(
    objective: Objective, units: Sequence[Any], unit_size: int, memory: Memory, found: Pass
) -> tuple[Pass, dict[str, Route]]:
    """Find the route of each parameter on which a few units agree with the loop."""
    n, first = len(units), found
    if not found.grams:
        raise RuntimeError(next(iter(found.missing.values())))
    total = sum_of(found.grams)
    sample = _truth(objective, units, trust.extremes(total, found.live, 3))
    for _ in range(3):  # a parameter without a gradient on these units, such as an expert that none of them asked
        if (unit := _telling_unit(found, total, sample)) is None:
            break
        sample = _truth(objective, units, [*sample.units, unit])
    samples = [sample]
    routes: dict[str, Route] = {}
    grams: Grams = {}
    guess, free = 0, False
    while True:
        for name in found.grams.keys() - routes.keys():
            if free and not sample.grams[name].any():
                continue  # a graph without any use of a parameter fits this too
            for scale in (float(n), 1.0):
                if _agrees(objective, units, found, name, scale, samples):
                    routes[name], grams[name] = Route(guess, free, scale), found.grams[name]
                    break
        lost = [name for name in objective.parameters if name not in routes]
        if any(found.guesses.get(name, 1) > guess + 1 for name in lost) and guess + 1 < _GUESSES:
            guess += 1
        elif lost and not free:
            guess, free = 0, True
        else:
            break
        trial = {name: Route(guess, free) if name in lost else Route(None) for name in objective.parameters}
        found = _measure(objective, units, unit_size, memory, trial)
    if len(lost) > len(routes):
        raise RuntimeError(
            "one pass over all units does not give the gradients of single units: "
            + first.missing.get(lost[0], "the loss or a layer mixes units, or weighs them by the data")
        )
    first.grams = grams
    memory.routes[first.signature] = routes | {name: Route(None) for name in lost}
    memory.constants[first.signature] = first.constants
    total = sum_of(grams)
    memory.unseen[first.signature] = {
        name for name in grams if name in first.guesses and trust.negligible(grams[name], total, first.epsilon)
    }
    return first, memory.routes[first.signature]


def _agrees(
    objective: Objective, units: Sequence[Any], found: Pass, name: str, scale: float, samples: list[Sample]
) -> bool:
    """Whether the Gram of a parameter is the true one on all samples up to rounding, and on one of them closely.

    Rounding in the layers above may make a difference on some units, but not on all of them, as a mistake would. More
    samples are taken only while there is a doubt, and are kept in ``samples``.
    """
    for i in range(_SAMPLES):
        if i == len(samples):
            seen = {unit for sample in samples for unit in sample.units}
            fresh = [unit for unit in range(len(units)) if unit not in seen][:2]
            if not fresh:
                return False
            samples.append(_truth(objective, units, fresh))
        if not samples[i].fits(found, name, scale, strictly=name in found.top):
            return False
        if samples[i].fits(found, name, scale, strictly=True):
            return True
    return False


def _telling_unit(found: Pass, total: Tensor, sample: Sample) -> int | None:
    """A unit on which a parameter has a gradient, if it has none on those checked."""
    for name, gram in found.grams.items():
        silent = trust.negligible(sample.grams[name], sum_of(sample.grams), found.epsilon)
        if silent and not trust.negligible(gram, total, found.epsilon):
            unit = int(gram.diagonal().argmax())
            return None if unit in sample.units else unit
    return None


def sum_of(grams: Grams) -> Tensor:
    """Return the Gram of the gradients of all parameters."""
    kinds = {gram.dtype for gram in grams.values()}
    return torch.stack([gram.to(max(kinds, key=lambda kind: kind.itemsize)) for gram in grams.values()]).sum(0)


def _truth(objective: Objective, units: Sequence[Any], checked: Sequence[int]) -> Sample:
    return Sample(list(checked), contract(loop.unit_gradients(objective, [units[i] for i in checked])))


def _by_others(objective: Objective, units: Sequence[Any], names: Sequence[str]) -> Grams:
    """The Grams of some parameters alone."""
    kept = {name: objective.parameters[name] for name in names}
    others = {name: p for name, p in objective.parameters.items() if name not in kept}
    part = replace(objective, parameters=kept, constants=objective.constants | others)
    try:
        rows = vmap.unit_gradients(part, units)
    except Exception:
        rows = loop.unit_gradients(part, units)
    return contract(rows)


def _in_order(objective: Objective, grams: Grams) -> Grams:
    return {name: grams[name] for name in objective.parameters}
