"""One backward pass: from the deltas that it brings to the uses of parameters, to factors and Grams."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf.gram.findings import Places
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost import lstm
from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.custom_functions import unit_of
from lightning_gradconf.gram.ghost.factors import (
    Dense,
    GradientFactors,
    Multiples,
    OuterProducts,
    gram_of_sum,
    materialize,
)  # fmt: skip
from lightning_gradconf.gram.ghost.graph import Graph, Use
from lightning_gradconf.gram.ghost.nodes import dtypes, shapes
from lightning_gradconf.gram.ghost.placement import Placement
from lightning_gradconf.gram.ghost.rules import factors_of
from lightning_gradconf.gram.ghost.verify import Proof
from lightning_gradconf.gram.memory_budget import megabytes
from lightning_gradconf.gram.objective import accumulation_dtype, as_rows, empty_rows, run_backward, sizes
from lightning_gradconf.gram.process_state import without_warnings


class Accumulator:
    """Contracts what each parameter's uses contribute as soon as all of it is known, and drops it.

    Args:
        graph: The graph of unit losses.
        parameters: All parameters, by name.
        n: The number of units.
        places: Where the units lie.
        workspace: What contractions share.
        keep: Keep factors instead of contracting them.
        proof: What checks them.
        budget: Bytes that gradients may fill, where they have to be formed.

    Attributes:
        grams: The Gram of each parameter, after `run`.
        factors: With ``keep``, what it is made of instead.
        missing: Why no rule applies, by parameter.
        surprises: Whether a use without a proof had a gradient.

    Raises:
        NotImplementedError: More gradients have to be formed than the budget allows.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Mapping[str, Tensor],
        n: int,
        places: Places,
        workspace: Workspace,
        *,
        keep: bool,
        proof: Proof | None,
        budget: int | None,
    ) -> None:
        self.grams: dict[str, Tensor] = {}
        self.factors: dict[str, list[GradientFactors]] = {}
        self.missing: dict[str, str] = {}
        self.surprises = False
        self._scratch: dict[Any, Any] = {}  # what the rules left of the last node
        self._graph = graph
        self._parameters, self._n, self._places, self._workspace = parameters, n, places, workspace
        self._keeps, self._proof, self._budget = keep, proof, budget
        self._leaves: dict[str, list[Tensor]] = defaultdict(list)
        for name, leaf in graph.leaves:
            self._leaves[name].append(leaf)
        self._waiting = Counter(name for use in graph.uses for name in use.free.parameters)
        self._parts: dict[str, list[GradientFactors]] = defaultdict(list)
        self._moved: dict[str, Use] = {}
        self._by_pull = graphs.formed(graph, to_join=keep)
        self._pulled: dict[GradientEdge, Tensor] = {}  # unit gradients of free tensors
        self._busy = False
        if budget is not None and (needed := self._formed()) > budget:
            raise NotImplementedError(
                f"gradients of parameters that are transformed before they meet the data take {megabytes(needed)}, for "
                "which the memory budget has no room"
            )

    def _formed(self) -> int:
        """Return the bytes of the gradients that have to be formed."""
        parameters = [self._parameters[name] for name in self._by_pull]
        sources = {use.source for use in self._graph.uses if use.free.parameters & self._by_pull}
        elements = sum(math.prod(graphs.shape(source)) for source in sources)
        itemsize = max((accumulation_dtype(p).itemsize for p in parameters), default=0)
        return self._n * (sum(sizes(parameters)) + elements * itemsize)

    def run(self, losses: Tensor, *, keep_graph: bool) -> None:
        """Run the backward pass down to the lowest uses, and take what comes by."""
        uses: dict[Node, list[tuple[int, Use]]] = defaultdict(list)
        for index, use in enumerate(self._graph.uses):
            uses[use.node].append((index, use))
        edges = [GradientEdge(node, i) for node in self._graph.bottom for i in range(len(shapes(node)))]
        # What the pass ends at is returned by it; a hook there would not be called.
        passed = uses.keys() - set(self._graph.bottom)
        hooks = [node.register_prehook(partial(self._receive, uses[node])) for node in passed]
        for node in passed:
            if node.name() == lstm.NAME:
                hooks += lstm.shorten(node, lambda: self._scratch.pop("gates", None))
        try:
            captured = run_backward(losses, edges, keep_graph=keep_graph) if edges else ()
            deltas: dict[Node, list[Tensor | None]] = defaultdict(list)
            for edge, delta in zip(edges, captured, strict=True):
                deltas[edge.node].append(delta)
            for node, of_node in deltas.items():
                self._receive(uses[node], of_node)
        finally:
            for hook in hooks:  # a node, its hook and what the hook knows of the graph would keep one another alive
                hook.remove()
        self._finish()

    def _finish(self) -> None:
        """Complete what not all uses had a gradient for, when there are no more gradients to come."""
        if self._pulled:
            self._pull()
        for name in [name for name in self._parts if name not in self.missing]:
            self._complete(name)
        for name, p in self._parameters.items():
            if name in self.grams or name in self.factors or name in self.missing:
                continue
            if self._keeps:
                self.factors[name] = [Dense(empty_rows(p, self._n))]
            else:
                self.grams[name] = torch.zeros(self._n, self._n, dtype=accumulation_dtype(p), device=p.device)

    def _receive(self, uses: Sequence[tuple[int, Use]], deltas: Sequence[Tensor | None]) -> None:
        """Take the gradients of the results of a node with these uses."""
        if self._busy:  # a rule that differentiates the node comes by here again
            return
        given = [delta for delta in deltas if delta is not None]
        if not any(delta.numel() for delta in given):  # of an expert without tokens there is no gradient
            return
        device = given[0].device.type
        autocast = torch.is_autocast_enabled(device)  # to switch it off takes longer than to ask
        precise = torch.autocast(device, enabled=False) if autocast else nullcontext()
        self._busy = True
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad(), precise:
                self._add(uses, given[0], deltas)
        finally:
            self._busy = False

    def _add(self, uses: Sequence[tuple[int, Use]], delta: Tensor, deltas: Sequence[Tensor | None]) -> None:
        self._scratch = {}
        operands = {use.slot: graphs.shape(use.source) for _, use in uses}
        for index, use in uses:
            names = use.free.parameters
            if names <= self.missing.keys():
                continue
            placement = Placement(
                self._n,
                self._places.guesses.get(index, 0),
                deltas=deltas,
                operands=operands,
                scratch=self._scratch,
                compares=self._proof is not None or index in self._places.unproved,
                budget=self._budget,
            )
            try:
                part = factors_of(use.node, use.slot, delta, operands[use.slot], placement)
            except NotImplementedError as error:
                self.missing |= {name: f"{use.node.name()}: {error}" for name in names}
                continue
            if placement.compares:
                shows_its_place = placement.told_apart and bool((delta != 0).any())
                if self._proof is None:
                    self.surprises |= shows_its_place
                elif not shows_its_place:
                    self._proof.unproved.add(index)
            self._keep(use, part)
        self._workspace.products = None  # a tensor that is written to afterwards would look the same

    def _keep(self, use: Use, part: GradientFactors) -> None:
        """Put what a use contributes to what its parameter has already; after the last use, complete the parameter."""
        if graphs.is_multiple(use):
            self._keep_multiples(use, materialize(part))
            return
        if use.free.parameters & self._by_pull:
            edge, gradients = use.source, materialize(part)
            self._pulled[edge] = self._pulled[edge] + gradients if edge in self._pulled else gradients
            return
        (name,) = use.free.parameters
        if use.free.layout == "moved":
            self._moved[name] = use
        parts, part = self._parts[name], _upright(part, use)
        if unit_of(use.node) is not None and parts and isinstance(parts[-1], Dense):  # there is a use for each unit
            parts[-1] = Dense(parts[-1].gradients + materialize(part))
        else:
            parts.append(part)
        self._waiting[name] -= 1
        if not self._waiting[name]:
            self._complete(name)

    def _keep_multiples(self, use: Use, coefficients: Tensor) -> None:
        """Add the multiples of a scalar's gradient, such as that of a weight penalty, to the parameters behind it."""
        leaves = [(name, leaf) for name in use.free.parameters for leaf in self._leaves[name]]
        # The real and the imaginary part of a complex number are two numbers.
        seeds = _as_seed(torch.eye(coefficients.shape[1], device=coefficients.device), use.source)
        kind = dtypes(use.source.node)[use.source.output_nr]
        for seed, of_units in zip(seeds.to(kind), coefficients.unbind(1), strict=True):
            gradients = torch.autograd.grad(
                [use.source], [leaf for _, leaf in leaves], [seed], retain_graph=True, allow_unused=True
            )
            for (name, _), gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    direction = as_rows(gradient, 1)[0]
                    multiples = Multiples(of_units.to(direction.dtype), direction)
                    # Other groups or ranks may have another direction.
                    self._parts[name].append(Dense(materialize(multiples)) if self._keeps else multiples)
        for name in use.free.parameters:
            self._waiting[name] -= 1
            if not self._waiting[name] and name in self._parts:
                self._complete(name)

    def _complete(self, name: str) -> None:
        parts = self._parts.pop(name)
        if self._proof is not None:
            source = self._moved[name].source if name in self._moved else None
            self._proof.compare(name, self._leaves[name], parts, source)
        if self._keeps:
            self.factors[name] = parts
        else:
            self.grams[name] = gram_of_sum(parts, self._workspace)
            if self._proof is not None:
                self._proof.compare_gram(name, self.grams[name])

    def _pull(self) -> None:
        """Take the unit gradients of free tensors back to the parameters that they are made of."""
        names = [name for name in self._by_pull if name not in self.missing]
        leaves = [(name, leaf) for name in names for leaf in self._leaves[name]]
        if not leaves:
            return
        seeds = [_as_seed(gradients, edge) for edge, gradients in self._pulled.items()]
        # Some of PyTorch's operations have no batching rule, are right all the same, and say so each time.
        with without_warnings("There is a performance drop because"):
            found = torch.autograd.grad(
                [*self._pulled], [leaf for _, leaf in leaves], seeds,
                is_grads_batched=True, allow_unused=True, retain_graph=True,
            )  # fmt: skip
        for (name, _), gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                self._parts[name].append(Dense(as_rows(gradient, self._n)))


def _as_seed(rows: Tensor, source: GradientEdge) -> Tensor:
    """Return gradients ``(n, numel)`` of a tensor of the graph in its own shape, complex if it is."""
    if not dtypes(source.node)[source.output_nr].is_complex:
        return rows.reshape(len(rows), *graphs.shape(source))
    return torch.view_as_complex(rows.reshape(len(rows), *graphs.shape(source), 2))


def _upright(part: GradientFactors, use: Use) -> GradientFactors:
    """Return the contribution to a transposed parameter as one to the parameter."""
    if use.free.layout != "transposed":
        return part
    if isinstance(part, OuterProducts):
        return OuterProducts(part.right, part.left)
    rows, shape = materialize(part), graphs.shape(use.source)
    real = rows.shape[1] // max(1, math.prod(shape))  # two real numbers for a complex one
    return Dense(torch.unflatten(rows, 1, (*shape, real)).transpose(1, 2).flatten(1))
