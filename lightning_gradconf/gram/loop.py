"""One autograd pass a unit: right for every model that trains, and the oracle of the other engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.module_state import rewinder
from lightning_gradconf.gram.objective import Objective, as_rows, empty_rows, run_backward
from lightning_gradconf.gram.restoring import restore_tensor


def unit_gradients(objective: Objective, units: Sequence[Any]) -> dict[str, Tensor]:
    """Return the gradient of each unit's loss as ``{parameter name: (n, numel)}``."""
    return Differentiator(objective)(units)


class Differentiator:
    """Compute gradients of units, call after call, on one set of copies of the module's tensors.

    Some modules fail on copies, such as one that looks up a learning rate by the parameter object. Such a module runs
    on its own tensors, whose values are put back after each unit.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._originals = {**objective.parameters, **objective.constants}
        self._copies = objective.copies()
        self._versions = {name: copy._version for name, copy in self._copies.items()}
        self._compared: set[str] | None = None
        self._takes_copies = True
        self._rewind = rewinder(objective.module)

    def __call__(self, units: Sequence[Any]) -> dict[str, Tensor]:
        """Return the gradients of some units, ``{parameter name: (n, numel)}``."""
        of_units = [self._row(unit) for unit in units]
        if len(of_units) == 1:  # it need not be copied
            return of_units[0]
        return {name: torch.cat([rows.pop(name) for rows in of_units]) for name in self._objective.parameters}

    def _row(self, unit: Any) -> dict[str, Tensor]:
        found = self._gradient(unit)
        return {
            name: empty_rows(p, 1) if (gradient := found.pop(name)) is None else as_rows(gradient, 1)
            for name, p in self._objective.parameters.items()
        }

    def _gradient(self, unit: Any) -> dict[str, Tensor | None]:
        if not self._takes_copies:
            return self._on_its_own(unit)
        try:
            return self._on_copies(unit)
        except Exception as error:
            try:
                found = self._on_its_own(unit)
            except Exception:
                raise error from None  # the user's own, which has nothing to do with copies
            self._takes_copies = False
            return found

    def _on_copies(self, unit: Any) -> dict[str, Tensor | None]:
        leaves = {name: self._copies[name] for name in self._objective.parameters}
        try:
            return self._objective.at(
                self._copies, copy_of(unit), lambda loss: _differentiate(self._objective, loss, leaves)
            )
        finally:
            self._rewind()
            self._renew_copies()

    def _on_its_own(self, unit: Any) -> dict[str, Tensor | None]:
        try:
            return self._objective.at({}, copy_of(unit), lambda loss: _differentiate(self._objective, loss, {}))
        finally:
            self._rewind()
            for name, tensor in self._originals.items():
                restore_tensor(tensor, self._copies[name].detach())

    def _renew_copies(self) -> None:
        """Undo what a unit's pass wrote into the copies, so that every unit meets the same module.

        A tensor may have changed although its version is the same. After the first unit all tensors are compared. That
        costs up to half of a pass, so later only two kinds are: buffers, which native BatchNorm updates without a new
        version, and the tensors that the first unit wrote to through `data`.
        """
        changed = {
            name
            for name, copy in self._copies.items()
            if (self._compared is None or name in self._compared or copy._version != self._versions[name])
            and restore_tensor(copy, self._originals[name].detach())
        }
        for name, copy in self._copies.items():
            self._versions[name] = copy._version
            if not copy.requires_grad and name in self._objective.parameters:
                copy.requires_grad_()  # user's code may have frozen it
        if self._compared is None:
            constants = self._objective.constants.items()
            self._compared = changed | {name for name, tensor in constants if not isinstance(tensor, nn.Parameter)}


def _differentiate(objective: Objective, loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradient of the loss for each leaf, None where it does not depend on it.

    A loss may also reach the module's own parameters, through a list in which it or the user keeps them.
    """
    if any(isinstance(node, BackwardCFunction) for node in graphs.nodes(loss.grad_fn)):
        # A custom Function may run a backward pass of its own, as reentrant checkpoints do. That pass writes to `grad`,
        # so asking for the gradients of some leaves would miss its part.
        return _differentiate_everything(objective, loss, leaves)
    # A forward pass may freeze some of either.
    own = {name: p for name, p in objective.parameters.items() if p.requires_grad}
    live = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = run_backward(loss, (*live.values(), *own.values()), keep_graph=True)
    found = dict(zip(live, gradients[: len(live)], strict=True))
    more = dict(zip(own, gradients[len(live) :], strict=True))
    return {name: _sum(found.get(name), more.get(name)) for name in objective.parameters}


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _differentiate_everything(
    objective: Objective, loss: Tensor, leaves: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    """Return the same without naming the leaves; put back the gradients that the module's own parameters hold."""
    own = [t for t in (*objective.parameters.values(), *objective.constants.values()) if isinstance(t, nn.Parameter)]
    held = [p.grad for p in own]
    for p in own:
        p.grad = None
    try:
        run_backward(loss, (), keep_graph=True)
        found = {name: leaf.grad for name, leaf in leaves.items()}
        return {name: _sum(found.get(name), p.grad) for name, p in objective.parameters.items()}
    finally:
        for p, gradient in zip(own, held, strict=True):
            p.grad = gradient
        for leaf in leaves.values():
            leaf.grad = None
