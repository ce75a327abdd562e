"""The Gram of the units' gradients from one forward pass over all units, without forming the gradients.

The losses of all units have one graph (`unit_losses`). A backward pass computes the gradient of the result of each node
that uses a parameter, and no gradient of a parameter. From both follow the factors of each unit's gradient (`rules`),
and from the factors the inner products (`contraction`), as the gradients come in (`accumulator`). At the first
measurement, and again at times, that is proved (`verify`).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf.batches.units import copy_of, shapes_of
from lightning_gradconf.gram import loop, python_draws
from lightning_gradconf.gram.findings import Findings, Places
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost.accumulator import Accumulator
from lightning_gradconf.gram.ghost.agreement import UnitsDiffer
from lightning_gradconf.gram.ghost.factor_tensors import joined, of_units
from lightning_gradconf.gram.ghost.factors import Dense, GradientFactors, gram_of_sum
from lightning_gradconf.gram.ghost.graph import Graph
from lightning_gradconf.gram.ghost.nodes import is_checkpointed
from lightning_gradconf.gram.ghost.search import search
from lightning_gradconf.gram.ghost.unit_losses import Forward, forward
from lightning_gradconf.gram.ghost.verify import SCALE, Proof, random_weights
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.module_state import rewinder
from lightning_gradconf.gram.objective import Objective, run_backward, take_attributes
from lightning_gradconf.gram.plain_autograd import disagreement, in_words
from lightning_gradconf.gram.process_state import full_float32, have_drawn, random_states, rounds_float32, torch_states

log = logging.getLogger("lightning_gradconf")
Factors = dict[str, list[GradientFactors]]
_MOST_GROUPS = 4  # more passes of fewer units are slower than the loop

_ATTEMPTS = 4  # at finding where the units lie
_REMEMBERED = 256  # graphs, and shapes of units


def unit_grams(
    objective: Objective, units: Sequence[Any], mode: MeasurementMode, findings: Findings, budget: int | None = None
) -> dict[str, Tensor]:
    """Return the inner products of the units' gradients, ``{parameter name: (n, n)}``.

    Args:
        objective: What to differentiate.
        units: Batches of any shapes; those of one shape share a pass.
        mode: How BatchNorm and dropout behave.
        findings: What earlier calls have found out; what this one does is added.
        budget: Bytes that gradients may fill, of parameters whose gradients have to be formed.

    Raises:
        NotImplementedError: The losses cannot be computed together, or a parameter's gradients cannot be read.
        RuntimeError: The proof failed.
    """
    groups = list(_measured(objective, units, mode, findings, budget, keep=False))
    if len(groups) == 1 and groups[0].grams:
        return groups[0].grams
    with torch.no_grad():
        factors, order = _joined(objective, groups)
        grams = {name: gram_of_sum(factors.pop(name), findings.workspace) for name in list(factors)}
        return {name: gram[order][:, order] for name, gram in grams.items()}


def unit_factors(
    objective: Objective, units: Sequence[Any], mode: MeasurementMode, findings: Findings, budget: int | None = None
) -> Factors:
    """Return what the units' gradients are made of, for units of other ranks to be added; the units in their order.

    The arguments and errors are those of `unit_grams`.
    """
    groups = list(_measured(objective, units, mode, findings, budget, keep=True))
    with torch.no_grad():
        factors, order = _joined(objective, groups)
        if len(groups) > 1:
            factors = {name: [of_units(part, order) for part in parts] for name, parts in factors.items()}
        return factors


@dataclass
class _Group:
    """What was measured of the units that share a pass: Grams, or factors where there are other groups."""

    indices: list[int]
    grams: dict[str, Tensor]
    factors: Factors


def _joined(objective: Objective, groups: Sequence[_Group]) -> tuple[Factors, Tensor]:
    """Return the factors of all units, group by group, and the order to put the units in."""
    factors = {name: joined([group.factors.pop(name) for group in groups]) for name in objective.parameters}
    return factors, torch.tensor([i for group in groups for i in group.indices]).argsort()


def _measured(
    objective: Objective,
    units: Sequence[Any],
    mode: MeasurementMode,
    findings: Findings,
    budget: int | None,
    keep: bool,
) -> Iterator[_Group]:
    """Measure units that have one shape, and about which Python reads the same, in a pass each."""
    if findings.refused is not None:
        raise RuntimeError(findings.refused)
    findings.measurements += 1
    proves = findings.measurements & (findings.measurements - 1) == 0  # 1, 2, 4, 8, ...
    findings.workspace.tries = not proves  # a proof takes long enough
    findings.workspace.rounding = objective.device if rounds_float32(objective.device) else None
    if proves:
        findings.generators = python_draws.generators_of(objective.module)
    leaves = {name: findings.copy(name, p).requires_grad_() for name, p in objective.parameters.items()}
    for name, leaf in leaves.items():
        take_attributes(leaf, objective.parameters[name])
    by_shape: dict[Hashable, list[int]] = defaultdict(list)
    for i, unit in enumerate(units):
        by_shape[shapes_of(unit)].append(i)
    waiting, passes = list(by_shape.values()), len(by_shape)
    rewind = rewinder(objective.module)  # each pass starts from the module's state before the first
    while waiting:
        if passes > _MOST_GROUPS:
            raise NotImplementedError(f"units go more than {_MOST_GROUPS} different ways, by their shapes and values")
        indices = waiting.pop()
        some = [units[i] for i in indices]
        if len(some) == 1:
            with mode:
                rows = loop.unit_gradients(objective, some)
            yield _Group(indices, {}, {name: [Dense(row)] for name, row in rows.items()})
            continue
        measurement = _Measurement(objective, leaves, some, mode, findings, budget, keep or passes > 1, rewind)
        if (shapes := shapes_of(some[0])) not in findings.shapes:
            if len(findings.shapes) >= _REMEMBERED:
                findings.shapes.clear()
            findings.shapes.add(shapes)
            before = torch_states()
            with mode:
                objective.fill_caches(leaves, copy_of(some[0]))
            findings.draws |= have_drawn(before)
            rewind()
        try:
            found = measurement.accumulated(measurement.forward(), proves)
            if found.surprises:  # a use that was never proved
                found = measurement.accumulated(measurement.forward(), proves=True)
        except UnitsDiffer as differ:
            ways: dict[Hashable, list[int]] = defaultdict(list)
            for i, value in zip(indices, differ.values, strict=True):
                ways[value].append(i)
            waiting += ways.values()
            passes += len(ways) - 1
            continue
        yield _Group(indices, found.grams, found.factors)
        del found  # and the graph with it


@dataclass
class _Measurement:
    """The measurement of units that share a pass."""

    objective: Objective
    leaves: Mapping[str, Tensor]
    units: Sequence[Any]
    mode: MeasurementMode
    findings: Findings
    budget: int | None
    keep: bool
    rewind: Callable[[], None]
    _drawn: list[tuple[Callable[[Any], Any], Any]] = field(default_factory=random_states)

    @property
    def compared(self) -> int:
        """The unit that is computed alone too."""
        return Random(self.findings.measurements).randrange(len(self.units))

    def forward(self) -> Forward:
        """Return the losses of the units, with the random numbers of one of them if they draw any.

        A pass that is recorded has other nodes, and takes longer. So only a loss that draws is.
        """
        found = self._forward(records=self.findings.draws)
        if found.draws and found.numbers is None:  # it has begun to
            del found  # with its graph
            found = self._forward(records=True)
        self.findings.draws = found.draws
        return found

    def _forward(self, *, records: bool) -> Forward:
        """Return the losses of the units, from the module's state and the random state before the first such pass."""
        for restore, state in self._drawn:
            restore(state)
        recorded = self.compared if records else None
        try:
            with python_draws.without_python_draws(self.findings.generators):
                return forward(self.objective, self.leaves, self.units, self.mode, self.findings.writes, recorded)
        finally:
            self.rewind()

    def accumulated(self, forward: Forward, proves: bool) -> Accumulator:
        """Return what a backward pass from the losses brings, proved if that is due."""
        n = len(self.units)
        graph = self._read(forward, ())
        signature = (n, forward.reads, graphs.signature(graph))
        places = self.findings.graphs.get(signature)
        if places is None or proves:
            if self.findings.workspace.rounding is None:
                return self._proved(forward, signature, places or Places())
            del forward, graph
            with full_float32(self.objective.device):  # in TF32 it would prove little
                return self._proved(self.forward(), signature, places or Places())
        if places.free:
            graph = self._read(forward, places.free)
        found = self._accumulator(graph, places, None)
        found.run(forward.losses, keep_graph=False)
        if found.missing:
            raise NotImplementedError(next(iter(found.missing.values())))
        return found

    def _read(self, forward: Forward, free: Collection[int]) -> Graph:
        names = {id(leaf): name for name, leaf in self.leaves.items()}
        names |= {id(p): name for name, p in self.objective.parameters.items()}  # reached in another way, as by a list
        return graphs.read(forward.losses.grad_fn, names, len(self.units), forward.nodes, free)

    def _accumulator(self, graph: Graph, places: Places, proof: Proof | None) -> Accumulator:
        parameters, workspace = self.objective.parameters, self.findings.workspace
        return Accumulator(
            graph, parameters, len(self.units), places, workspace, keep=self.keep, proof=proof, budget=self.budget
        )

    def _proved(self, forward: Forward, signature: Hashable, places: Places) -> Accumulator:
        """Return what was found and proved, and remember where the units lie, if the gradients are finite."""
        graph = self._read(forward, places.free)
        if any(map(is_checkpointed, graph.order)):  # it would run on the module itself, after the pass
            raise NotImplementedError(f"torch {torch.__version__} has other names for what runs around a checkpoint")
        if graphs.is_coarse(graph.order):  # entries of deltas say where the units lie, and a sum of gradients little
            search(forward.losses, graph, random_weights(forward.losses, self.findings.measurements), (), places)
        found, proof, failed = self._tried(forward, graph, places, keep_graph=False)
        if failed or found.missing:  # hardly ever, so the graph was not kept for it
            forward = self.forward()
            graph = self._read(forward, places.free)
            for attempt in range(_ATTEMPTS):
                lost = failed.keys() | found.missing.keys()
                if not lost or (not search(forward.losses, graph, proof.weights, lost, places) and attempt):
                    break
                graph = self._read(forward, places.free)
                found, proof, failed = self._tried(forward, graph, places, keep_graph=True)
        if found.missing:
            raise NotImplementedError(next(iter(found.missing.values())))
        self._refuse(failed, "the weighted sum of gradients is wrong")
        row = {name: proof.row.get(name, torch.zeros(())) for name in self.objective.parameters}
        with self.mode:
            unit, numbers = self.units[proof.unit], forward.numbers or ()
            errors = disagreement(self.objective, unit, row, proof.precision, numbers)
        if errors is None and forward.numbers is None:  # it draws and puts the state back, as in `fork_rng`
            forward = self._forward(records=True)
            self.findings.draws = forward.draws
            return self._proved(forward, signature, Places())
        self._refuse(errors or {}, "a unit by itself has another gradient")
        places.unproved = proof.unproved
        if all(size < float("inf") for _, size in proof.errors.values()):
            if len(self.findings.graphs) >= _REMEMBERED:
                self.findings.graphs.clear()
            self.findings.graphs[signature] = places
        return found

    def _tried(
        self, forward: Forward, graph: Graph, places: Places, *, keep_graph: bool
    ) -> tuple[Accumulator, Proof, dict[str, float]]:
        """Return what a pass with units in these places brings, its proof, and the parameters that failed it."""
        losses = forward.losses
        weights = random_weights(losses, self.findings.measurements)
        precision = graphs.coarsest(graph.order)
        wanted = _gradients(losses, graph, weights)
        proof = Proof(weights, wanted, self.compared, precision)
        found = self._accumulator(graph, places, proof)
        found.run(losses, keep_graph=keep_graph)
        failed = proof.failures()
        if failed and keep_graph:  # perhaps by no more than rounding
            failed = proof.failures([_gradients(losses, graph, scale * weights) for scale in (1.0, SCALE)])
        return found, proof, failed

    def _refuse(self, errors: Mapping[str, float], what: str) -> None:
        if not errors:
            return
        self.findings.refused = f"{what}, {in_words(errors)}"
        log.warning(
            f"torch.func is not used for {type(self.objective.module).__name__}, as {self.findings.refused}. "
            "The loop measures it: one autograd pass a unit."
        )
        raise RuntimeError(self.findings.refused)


def _gradients(losses: Tensor, graph: Graph, seed: Tensor) -> dict[int, Tensor | None]:
    """Return PyTorch's own gradients of the weighted losses, by the id of the leaf."""
    targets = [leaf for _, leaf in graph.leaves]
    gradients = run_backward(losses, targets, keep_graph=True, seed=seed) if targets else ()
    return dict(zip(map(id, targets), gradients, strict=True))
