"""From the gradients that reach the uses of parameters, as a backward pass brings them, to Grams."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost.contraction import (
    Contribution,
    Dense,
    Rows,
    Workspace,
    copied,
    gram_of_sum,
    head,
    whole,
)
from lightning_gradconf.gram.ghost.graph import Graph, Use
from lightning_gradconf.gram.ghost.memory import Route
from lightning_gradconf.gram.ghost.nodes import variable
from lightning_gradconf.gram.ghost.rules import Place, Units, contribution, wide
from lightning_gradconf.gram.ghost.trust import Facts
from lightning_gradconf.gram.module_state import without_warnings
from lightning_gradconf.gram.objective import accumulation_dtype, empty_rows

Grams = dict[str, Tensor]
Receiver = Callable[[Sequence[Tensor | None]], None]


@dataclass
class Pass:
    """What one forward and backward pass of all units brought.

    Attributes:
        facts: About its graph.
        grams: Of the contributions to the loss of all, where a rule applies.
        factors: What these contributions are made of, if they are kept; then there are no Grams.
        missing: Why no rule applies, for all other parameters.
        guesses: In how many places the units may lie, by parameter.
        places: Where they were taken to lie, by parameter.
        partners: The parameters that meet in one node, by parameter.
        top: Parameters with no other parameter between one of their uses and the loss.
        live: How many results of each unit reach the loss.
    """

    facts: Facts
    grams: Grams = field(default_factory=dict)
    factors: dict[str, list[Contribution]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    guesses: dict[str, int] = field(default_factory=dict)
    places: dict[str, set[Place]] = field(default_factory=lambda: defaultdict(set))
    partners: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    top: set[str] = field(default_factory=set)
    live: Tensor | None = None


class Collector:
    """Contracts what each use of a parameter contributes as soon as it is known, and drops it.

    ``receivers`` says what each node with a use shall do with the gradients of its results, and holds on to the graph;
    after all of them and `finish`, ``found`` has the Grams. ``scratch`` is what the rules left of the last node.

    Args:
        graph: What is differentiated.
        facts: About it.
        routes: Of the parameters; the usual one for those that it does not name.
        work: What contractions share.
        first: Only so many first units; None is all.
        keep: Keep what would be contracted; of only some units in memory of its own, not with all of the graph's.
    """

    def __init__(
        self,
        graph: Graph,
        facts: Facts,
        routes: Mapping[str, Route],
        work: Workspace,
        first: int | None = None,
        keep: bool = False,
    ) -> None:
        self.found = Pass(facts)
        self.scratch: dict[str, Any] = {}
        self._keeps, self._copies = keep, keep and first is not None
        self._leaves, self._routes, self._work = graph.leaves, routes, work
        self._n = first or facts.n  # units that are measured, of those in the graph
        self._waiting = Counter(name for use in graph.uses for name in use.free.leaves)
        self._parts: dict[str, list[Contribution]] = defaultdict(list)
        self._by_pull = to_pull(graph)
        self._pulled: dict[GradientEdge, Tensor] = {}  # unit gradients of free tensors
        uses: dict[Node, list[Use]] = defaultdict(list)
        for use in graph.uses:
            uses[use.node].append(use)
        top = {child for node in graph.tail for child, _ in node.next_functions}
        self.receivers = {node: self._receiver(of_node, node in top) for node, of_node in uses.items()}

    def finish(self) -> None:
        """Complete the Grams, when there are no more gradients to come."""
        for name in [name for name in self._parts if name not in self.found.missing]:
            self._contract(name)  # not all of its uses had a gradient
        if self._pulled:
            self._pull()
        for name, leaf in self._leaves.items():
            if name in self.found.grams or name in self.found.factors or name in self.found.missing:
                continue
            if self._is_wanted(name) and self._keeps:
                self.found.factors[name] = [Dense(empty_rows(leaf, self._n))]
            elif self._is_wanted(name):
                dtype = accumulation_dtype(leaf)
                self.found.grams[name] = torch.zeros(self._n, self._n, dtype=dtype, device=leaf.device)

    def _receiver(self, uses: Sequence[Use], top: bool) -> Receiver:
        """What to do with the gradients of the results of a node with these uses."""

        def receive(deltas: Sequence[Tensor | None]) -> None:
            delta = next((delta for delta in deltas if delta is not None), None)
            if delta is None:
                return
            device = delta.device.type
            autocast = torch.is_autocast_enabled(device)  # to switch it off takes longer than to ask
            precise = torch.autocast(device, enabled=False) if autocast else nullcontext()
            with torch._C.DisableTorchFunction(), torch.no_grad(), precise:
                self._receive(uses, top, delta, deltas)

        return receive

    def _receive(self, uses: Sequence[Use], top: bool, delta: Tensor, deltas: Sequence[Tensor | None]) -> None:
        self.scratch = {}
        here = frozenset(name for use in uses for name in use.free.leaves)
        for use in uses:
            names = use.free.leaves
            if top:
                self.found.top |= names
            wanted = [name for name in names if self._is_wanted(name) and name not in self.found.missing]
            if not wanted:
                continue
            route = self._routes.get(min(wanted), Route())
            units = Units(self.found.facts.n, self.found.facts.k, route.guess or 0, deltas=deltas, scratch=self.scratch)
            try:
                part = contribution(use.node, use.slot, delta, graphs.shape(use.source), units)
                if not route.leads_to(units.places):
                    raise NotImplementedError("units may lie elsewhere than before, as tensors have other sizes")
            except NotImplementedError as error:
                self.found.missing |= {name: str(error) for name in names}
                continue
            if top and isinstance(part, Rows):
                self._count_live(part, use.slot)
            for name in names:
                self.found.guesses[name] = max(self.found.guesses.get(name, 1), units.guesses)
                self.found.places[name] |= units.places
                self.found.partners[name] |= here
            part = head(part, self._n)
            self._keep(use, copied(part) if self._copies else part)
        self._work.products = None  # a tensor that is written to afterwards would look the same

    def _keep(self, use: Use, part: Contribution) -> None:
        """Put a contribution to the others of its parameter, and contract them if it is the last."""
        if use.free.leaves & self._by_pull:
            node, number = use.source
            assert node is not None
            edge, gradients = GradientEdge(node, number), whole(part)
            self._pulled[edge] = self._pulled[edge] + gradients if edge in self._pulled else gradients
            return
        (name,) = use.free.leaves
        self._parts[name].append(_upright(part, use))
        self._waiting[name] -= 1
        if not self._waiting[name]:
            self._contract(name)

    def _contract(self, name: str) -> None:
        if self._keeps:
            self.found.factors[name] = self._parts.pop(name)
        else:
            self.found.grams[name] = gram_of_sum(self._parts.pop(name), self._work)

    def _is_wanted(self, name: str) -> bool:
        return self._routes.get(name, Route()).guess is not None

    def _count_live(self, part: Rows, slot: int) -> None:
        delta = part.right if slot == 2 or part.left.shape[3] == 0 else part.left
        live = (delta != 0).any(-1).sum((0, 2))
        self.found.live = live if self.found.live is None else self.found.live + live

    def _pull(self) -> None:
        """Take the unit gradients of free tensors back to the parameters that they are made of."""
        wanted = [name for name in self._by_pull if self._is_wanted(name) and name not in self.found.missing]
        leaves = {name: self._leaves[name] for name in wanted}
        names = {id(leaf): name for name, leaf in leaves.items()}
        rows: dict[str, Tensor] = {}
        inner: list[GradientEdge] = []
        for edge, gradients in self._pulled.items():
            leaf = variable(edge.node)
            if leaf is None:
                inner.append(edge)
            elif id(leaf) in names:
                rows[names[id(leaf)]] = gradients
        if inner and leaves:
            shaped = [self._pulled[edge].reshape(self._n, *graphs.shape((edge.node, edge.output_nr))) for edge in inner]
            # Some of PyTorch's operations have no batching rule, are right all the same, and say so each time.
            with without_warnings("There is a performance drop because"):
                back = torch.autograd.grad(
                    inner, list(leaves.values()), shaped, is_grads_batched=True, allow_unused=True, retain_graph=True
                )
            for name, row in zip(leaves, back, strict=True):
                if row is not None:
                    rows[name] = rows.get(name, 0) + row.reshape(self._n, -1)
        for name, row in rows.items():
            self._parts[name] = [Dense(wide(row))]
            self._contract(name)


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


def sum_of(grams: Grams) -> Tensor:
    """Return the Gram of the gradients of all parameters."""
    kinds = {gram.dtype for gram in grams.values()}
    return torch.stack([gram.to(max(kinds, key=lambda kind: kind.itemsize)) for gram in grams.values()]).sum(0)


def _upright(part: Contribution, use: Use) -> Contribution:
    """A contribution to a transposed parameter as one to the parameter."""
    if use.free.layout != "transposed":
        return part
    if isinstance(part, Rows):
        return Rows(part.right, part.left)
    shape = graphs.shape(use.source)
    return Dense(torch.unflatten(whole(part), 1, shape).transpose(1, 2).flatten(1))
