"""A LightningModule's own ``training_step`` as the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.metric_answers import answered
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import Objective, objective
from lightning_gradconf.training.compat import has_argument
from lightning_gradconf.training.manual_optimization import ManualOptimization

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    LossOfBatch: TypeAlias = Callable[[LightningModule, Any], Tensor | None]


class StepLoss:
    """The loss of a batch, by ``loss_fn`` or else ``training_step``, in the precision of the Trainer.

    A step that returns None, which tells Lightning to skip the batch, has a constant loss. The same object serves a
    whole run, so that the engines may keep what they know of it.

    Args:
        trainer: The running Trainer.
        loss_fn: ``(module, batch) -> loss``; None is ``training_step``.
        manual: What runs a manually optimised ``training_step`` for its losses, if it is one.
        call: The number of the backward pass whose loss this is, with ``manual``; None is the sum of all.

    Attributes:
        batch_idx: The index that ``training_step`` is given.
        skipped: Whether no call has given a loss since this was last set to True.
        losses: With ``manual`` and without ``call``, the indices of the optimizers of each loss that the last call
            found, by its name.
    """

    def __init__(
        self,
        trainer: Trainer,
        loss_fn: LossOfBatch | None,
        manual: ManualOptimization | None = None,
        call: int | None = None,
    ) -> None:
        self.trainer, self.loss_fn, self.manual, self.call = trainer, loss_fn, manual, call
        self.batch_idx = 0
        self.skipped = True
        self.losses: dict[str, set[int]] = {}
        self._of_calls: dict[int, StepLoss] = {}

    def of_call(self, call: int) -> StepLoss:
        """Return the loss of one backward pass of a manually optimised step."""
        found = self._of_calls.setdefault(call, StepLoss(self.trainer, None, self.manual, call))
        found.batch_idx, found.skipped = self.batch_idx, True
        return found

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:
        """Return the loss of ``batch``."""
        with self.trainer.precision_plugin.train_step_context():
            value = self._loss(module, batch)
        if value is None:
            return torch.zeros((), device=module.device, requires_grad=True)
        self.skipped = False
        return value

    def _loss(self, module: LightningModule, batch: Any) -> Tensor | None:
        if self.loss_fn is not None:
            return self.loss_fn(module, batch)
        step = partial(self._training_step, module, batch)
        if self.manual is None:
            return _loss_in(step())
        if self.call is not None:
            return self.manual.loss(step, self.call)
        self.losses, losses = self.manual.losses(step)
        return torch.stack([loss.reshape(()) for loss in losses]).sum() if losses else None

    def _training_step(self, module: LightningModule, batch: Any) -> Any:
        if has_argument(module.training_step, "batch_idx", min_args=2):
            return module.training_step(batch, self.batch_idx)
        return module.training_step(batch)


def _loss_in(output: Any) -> Tensor | None:
    """Return the loss in what an automatically optimised ``training_step`` returns."""
    if not isinstance(output, Mapping):
        return output  # type: ignore[no-any-return]
    if "loss" not in output:
        raise ValueError(f"training_step returned a mapping without 'loss', with the keys {sorted(output)}")
    return output["loss"]  # type: ignore[no-any-return]


class StepObjective(NamedTuple):
    """One of the losses of a step.

    Attributes:
        name: What tells it from the others; empty if there are none.
        loss: The loss of a batch.
        target: What the engines differentiate.
    """

    name: str
    loss: StepLoss
    target: Objective


def objectives(
    loss: StepLoss, module: LightningModule, parameters: str | Sequence[str] | None, unit: Any, layers: MeasurementMode
) -> list[StepObjective]:
    """Return what is measured of a step: its loss, or with manual optimization each of its losses.

    The losses are those that the step has for ``unit``. Each is measured for the parameters, among those that match
    ``parameters``, that its optimizers train; one without such parameters is left out.

    Raises:
        ValueError: No parameter matches.
    """
    target = objective(module, loss, parameters)
    if loss.manual is None:
        return [StepObjective("", loss, target)]
    with untouched(module), layers, answered(target, unit) as measured:
        measured.at(measured.copies(), copy_of(unit), lambda loss: None)
    found = []
    for call, (name, optimizers) in enumerate(loss.losses.items()):
        trained = loss.manual.parameters(optimizers)
        own = {name: p for name, p in target.parameters.items() if id(p) in trained}
        if own:
            constants = target.constants | {name: p for name, p in target.parameters.items() if name not in own}
            of_call = loss.of_call(call)
            found.append(StepObjective(name, of_call, Objective(module, of_call, own, constants)))
    return found
