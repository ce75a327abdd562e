"""One autograd pass a unit: right for every model that trains, and the oracle of the other engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.module_state import rewinder
from lightning_gradconf.gram.objective import Objective, as_rows, empty_rows, run_backward
from lightning_gradconf.gram.restoring import restore_tensor


def unit_gradients(objective: Objective, units: Sequence[Any]) -> dict[str, Tensor]:
    """Return the gradient of each unit's loss as ``{parameter name: (n, numel)}``."""
    return differentiator(objective)(units)


def differentiator(objective: Objective) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """Return `unit_gradients` as a function of the units alone, for calls that share the copies of the module.

    Some modules do not take copies of their tensors, such as one that looks up a rate by the parameter itself. They run
    on their own, which have their values back after each unit.
    """
    state = objective.copies()
    versions = {name: t._version for name, t in state.items()}
    leaves = {name: state[name] for name in objective.parameters}
    # Native BatchNorm updates its buffers without counting a version, so buffers are always renewed.
    renewed = {name for name, tensor in objective.constants.items() if not isinstance(tensor, nn.Parameter)}
    compared = False
    rewind = rewinder(objective.module)
    takes_copies = True

    def on_copies(unit: Any) -> dict[str, Tensor | None]:
        nonlocal compared
        try:
            return objective.at(state, copy_of(unit), lambda loss: _differentiate(objective, loss, leaves))
        finally:
            rewind()
            if not compared:  # writing through `data` counts no version either
                renewed.update(_changed(objective, state))
                compared = True
            _refresh(objective, state, versions, renewed)

    def on_its_own(unit: Any) -> dict[str, Tensor | None]:
        try:
            return objective.at({}, copy_of(unit), lambda loss: _differentiate(objective, loss, {}))
        finally:
            rewind()
            for name, tensor in (*objective.parameters.items(), *objective.constants.items()):
                restore_tensor(tensor, state[name].detach())

    def gradient(unit: Any) -> dict[str, Tensor | None]:
        nonlocal takes_copies
        if not takes_copies:
            return on_its_own(unit)
        try:
            return on_copies(unit)
        except Exception as error:
            try:
                found = on_its_own(unit)
            except Exception:
                raise error from None  # the user's own, which has nothing to do with copies
            takes_copies = False
            return found

    def gradients(units: Sequence[Any]) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        for i, unit in enumerate(units):
            found = gradient(unit)
            for name, p in objective.parameters.items():
                row = found.pop(name)
                if len(units) == 1 and row is not None:  # it is a row already
                    rows[name] = as_rows(row, 1)
                    continue
                if i == 0:
                    rows[name] = empty_rows(p, len(units))
                if row is not None:
                    rows[name][i] = as_rows(row, 1)[0]
        return rows

    return gradients


def _differentiate(objective: Objective, loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradient of the loss for each leaf, None where it does not depend on it.

    A loss may also reach the module's own parameters, through a list in which it or the user keeps them.
    """
    if _has_custom_node(loss):
        # A Function may run a backward pass of its own, as checkpoints with reentry do. What that finds is put into
        # `grad`, and is no gradient of the loss for who asks for the gradients of some leaves.
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


def _has_custom_node(loss: Tensor) -> bool:
    """Return whether a custom autograd.Function, such as a reentrant checkpoint, took part in the loss."""
    seen: set[Node] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction):
            return True
        seen.add(node)
        todo.extend(edge for edge, _ in node.next_functions)
    return False


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


def _originals(objective: Objective) -> dict[str, Tensor]:
    return {**objective.parameters, **objective.constants}


def _changed(objective: Objective, state: dict[str, Tensor]) -> list[str]:
    """Return which of the copies have other values than the module."""
    return [name for name, tensor in _originals(objective).items() if not _equal(state[name].detach(), tensor.detach())]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.layout is torch.strided and torch.equal(a, b)


def _refresh(objective: Objective, state: dict[str, Tensor], versions: dict[str, int], renewed: set[str]) -> None:
    """Undo what a unit's pass wrote into the copies, so that every unit meets the same module.

    Args:
        objective: What is differentiated.
        state: The copies.
        versions: Of each, before the pass.
        renewed: Which may have changed without another version.
    """
    originals = _originals(objective)
    for name, copy in state.items():
        if copy._version != versions[name] or name in renewed:
            copy.data.copy_(originals[name])
            versions[name] = copy._version
        if not copy.requires_grad and name in objective.parameters:
            copy.requires_grad_()  # user's code may have frozen it
