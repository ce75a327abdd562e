"""That what a unit contributes to one pass is its gradient, up to one factor, is checked on a few units by the loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_gradconf.batches.units import traits
from lightning_gradconf.gram import loop
from lightning_gradconf.gram.ghost import trust
from lightning_gradconf.gram.ghost.accumulator import Grams, Pass, sum_of
from lightning_gradconf.gram.ghost.memory import Known, Memory, Route
from lightning_gradconf.gram.ghost.one_pass import Task, measure
from lightning_gradconf.gram.ghost.trust import Facts
from lightning_gradconf.gram.objective import Objective, contract

_GUESSES = 6
_SAMPLES = 4
_HELD = 1 << 20  # elements of the gradients of a unit that are held at once


@dataclass(frozen=True)
class Sample:
    """A few units and the true Grams of their gradients."""

    units: list[int]
    grams: Grams

    def fits(self, found: Pass, name: str, scale: float, strictly: bool) -> bool:
        """Whether the Gram of a parameter that a pass found is the true one on these units."""
        gram = found.grams[name][self.units][:, self.units] * scale**2
        return trust.fits(gram, self.grams[name], sum_of(self.grams), found.facts.epsilon, strictly)


def proven(known: Known, facts: Facts) -> bool:
    """Whether the graph leaves no room for the data to weigh units, so that what was calibrated holds for all."""
    return facts.proven and not known.mixes and facts.constants == known.constants


def told_nothing(known: Known, grams: Grams, facts: Facts) -> bool:
    """Whether the parameters whose gradients could not be checked still have none, or the same for all units."""
    if not known.untold:
        return True
    total = sum_of(grams)
    return all(trust.negligible(grams[name], total, facts.epsilon) for name in known.unseen) and all(
        trust.alike(grams[name]) for name in known.alike
    )


def still_right(task: Task, known: Known, found: Pass) -> bool:
    """Whether what was calibrated before holds for these units too."""
    if found.missing:
        return False
    if not told_nothing(known, found.grams, found.facts):
        return False
    if proven(known, found.facts):
        return True
    sample = _truth(task, trust.extremes(sum_of(found.grams), found.live, 2, traits(task.units)))
    return all(
        sample.fits(found, name, route.scale, strictly=name in found.top)
        for name, route in known.routes.items()
        if route.guess is not None
    )


def calibrate(task: Task, memory: Memory, found: Pass) -> tuple[Known, Grams]:
    """Return the route of each parameter on which a few units agree with the loop, and the Grams found there.

    Args:
        task: What is measured.
        memory: What contractions share.
        found: In a pass on the usual routes.

    Raises:
        RuntimeError: There is no such route for most parameters.
    """
    if not found.grams:
        raise RuntimeError(next(iter(found.missing.values())))
    first, samples = found, [_first_sample(task, found)]
    routes: dict[str, Route] = {}
    grams: Grams = {}
    alone: dict[str, tuple[Route, Tensor]] = {}
    trial = Route()
    while True:
        sought = found.grams.keys() - routes.keys()
        fitting = _fitting(task, found, sought, trial, samples)
        for name, route in fitting.items():
            # In one node, units lie in one place: a bias may fit by chance where the weight does not.
            if first.partners[name] & sought <= fitting.keys():
                routes[name], grams[name] = route, found.grams[name]
            else:
                alone.setdefault(name, (route, found.grams[name]))
        lost = [name for name in task.objective.parameters if name not in routes]
        guess = (trial.guess or 0) + 1
        if any(found.guesses.get(name, 1) > guess for name in lost) and guess < _GUESSES:
            trial = Route(guess, trial.free)
        elif lost and not trial.free:
            trial = Route(0, True)
        else:
            break
        found = measure(task, memory, {name: Route(None) for name in routes} | dict.fromkeys(lost, trial))
    for name in alone.keys() - routes.keys():
        routes[name], grams[name] = alone[name]
        lost.remove(name)
    if len(lost) > len(routes):
        raise RuntimeError(
            "one pass over all units does not give the gradients of single units: "
            + first.missing.get(lost[0], "the loss or a layer mixes units, or weighs them by the data")
        )
    total, epsilon = sum_of(grams), first.facts.epsilon
    unseen = {name for name in grams if name in first.guesses and trust.negligible(grams[name], total, epsilon)}
    alike = {name for name in grams if first.guesses.get(name, 1) > 1 and trust.alike(grams[name])}
    mixes = any(name in first.grams for name in lost)
    routes |= {name: Route(None) for name in lost}
    return Known(routes, unseen, alike, first.facts.constants, mixes), grams


def _fitting(task: Task, found: Pass, names: Collection[str], trial: Route, samples: list[Sample]) -> dict[str, Route]:
    """The routes of the parameters among these that agree with the loop on the route tried."""
    routes = {}
    for name in names:
        if trial.free and not samples[0].grams[name].any():
            continue  # a graph without any use of a parameter fits this too
        for scale in (float(len(task.units)), 1.0):
            if _agrees(task, found, name, scale, samples):
                routes[name] = Route(trial.guess, trial.free, scale, frozenset(found.places[name]))
                break
    return routes


def _first_sample(task: Task, found: Pass) -> Sample:
    """The units that differ most, and some on which parameters have a gradient that have none on those."""
    total = sum_of(found.grams)
    sample = _truth(task, trust.extremes(total, found.live, 3, traits(task.units)))
    for _ in range(3):  # such as an expert that none of them asked
        if (unit := _telling_unit(found, sample)) is None:
            break
        sample = _truth(task, [*sample.units, unit])
    return sample


def _telling_unit(found: Pass, sample: Sample) -> int | None:
    """A unit on which a parameter has a gradient, if it has none on those checked."""
    truth, total, epsilon = sum_of(sample.grams), sum_of(found.grams), found.facts.epsilon
    for name, gram in found.grams.items():
        silent = trust.negligible(sample.grams[name], truth, epsilon)
        if silent and not trust.negligible(gram, total, epsilon):
            unit = int(gram.diagonal().argmax())
            return None if unit in sample.units else unit
    return None


def _agrees(task: Task, found: Pass, name: str, scale: float, samples: list[Sample]) -> bool:
    """Whether the Gram of a parameter is the true one on all samples up to rounding, and on one of them closely.

    Rounding in the layers above may make a difference on some units, but not on all of them, as a mistake would. More
    samples are taken only while there is a doubt, and are kept in ``samples``.
    """
    for i in range(_SAMPLES):
        if i == len(samples):
            seen = {unit for sample in samples for unit in sample.units}
            fresh = [unit for unit in range(len(task.units)) if unit not in seen][:2]
            if not fresh:
                return False
            samples.append(_truth(task, fresh))
        if not samples[i].fits(found, name, scale, strictly=name in found.top):
            return False
        if samples[i].fits(found, name, scale, strictly=True):
            return True
    return False


def _truth(task: Task, checked: Sequence[int]) -> Sample:
    units = [task.units[i] for i in checked]
    grams: Grams = {}
    for names in _groups(task.objective):
        grams |= contract(loop.unit_gradients(only(task.objective, names), units))
    return Sample(list(checked), grams)


def _groups(objective: Objective) -> Iterator[list[str]]:
    """The parameters in groups, each with so few elements that the gradients of some units take little memory."""
    group: list[str] = []
    size = 0
    for name, p in objective.parameters.items():
        if group and size + p.numel() > _HELD:
            yield group
            group, size = [], 0
        group.append(name)
        size += p.numel()
    yield group


def only(objective: Objective, names: Sequence[str]) -> Objective:
    """Return the objective with the gradients of some parameters alone."""
    kept = {name: objective.parameters[name] for name in names}
    others = {name: p for name, p in objective.parameters.items() if name not in kept}
    return Objective(objective.module, objective.loss_fn, kept, objective.constants | others)
