"""A LightningModule's own ``training_step`` as the loss of a batch, called without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.metric_answers import answered
from lightning_gradconf.gram.module_state import random_states, untouched, without_warnings
from lightning_gradconf.gram.objective import Objective, objective
from lightning_gradconf.training.compat import has_argument, lightning_modules
from lightning_gradconf.training.manual_optimization import ManualLoss, ManualOptimization
from lightning_gradconf.training.silence import silent, without_logging

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    LossOfBatch: TypeAlias = Callable[[LightningModule, Any], Tensor | None]


# Hooks of the module that a measurement calls, on the module itself and not on copies of its tensors.
_HOOKS = ("on_train_batch_start", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule, *others: Any, data: Iterable[Any] = ()) -> Iterator[None]:
    """Within this context, nothing that a training step does reaches the run.

    Logging is mute, the loggers write nothing, compiled code runs eagerly, and everything that a step changes in
    Python, from the random state to the learning rate, is put back in the end.

    Args:
        trainer: The running Trainer.
        module: Its LightningModule.
        others: More containers whose contents are put back.
        data: What data are read from, of which attributes and random generators are put back, as they are of the
            Trainer (``should_stop``, the loggers, what the user's code keeps there) and its callbacks.
    """
    with ExitStack() as stack:
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        schedulers = [vars(config.scheduler) for config in trainer.lr_scheduler_configs]
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        data = [*data, trainer, *callbacks, *([] if datamodule is None else [datamodule])]
        # What a manually optimised step does to gradients by hand, it does to those of the module itself.
        tensors = not module.automatic_optimization or any(_is_overridden(module, name) for name in _HOOKS)
        stack.enter_context(untouched(module, *groups, *schedulers, *others, data=data, tensors=tensors))
        trainer.loggers = [silent(logger) for logger in trainer.loggers]
        for part in lightning_modules(module):
            vars(part)["log"] = vars(part)["print"] = _ignore  # `untouched` removes them again; log_dict calls log
        # What the user's code says about single samples is no news, and must not use up what is said only once.
        stack.enter_context(without_warnings())
        stack.enter_context(without_logging())
        stack.callback(torch.set_warn_always, torch.is_warn_always_enabled())
        torch.set_warn_always(True)
        stack.enter_context(torch.enable_grad())
        # Units have other shapes than batches: compiling for them would use up the recompilations of training.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
            cudnn = torch.backends.cudnn
            # A benchmark for a unit's shape would stay in the cache.
            flags = {name: getattr(cudnn, name) for name in ("enabled", "deterministic", "allow_tf32")}
            stack.enter_context(cudnn.flags(benchmark=False, **flags))
        yield


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
        losses: With ``manual`` and without ``call``, which losses the last call found.
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
        self.losses: list[ManualLoss] = []
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
        if has_argument(self.trainer, module.training_step, "batch_idx", min_args=2):
            return module.training_step(batch, self.batch_idx)
        return module.training_step(batch)


def _loss_in(output: Any) -> Tensor | None:
    """The loss in what an automatically optimised ``training_step`` returns."""
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
    for one in loss.losses:
        trained = loss.manual.parameters(one)
        own = {name: p for name, p in target.parameters.items() if id(p) in trained}
        if own:
            constants = target.constants | {name: p for name, p in target.parameters.items() if name not in own}
            of_call = loss.of_call(one.call)
            found.append(StepObjective(one.name, of_call, Objective(module, of_call, own, constants)))
    return found


def prepare_step(module: LightningModule, batch: Any, batch_idx: int) -> bool:
    """Run the module's own ``on_train_batch_start``, where it has one; False if it skips the batch."""
    if not _is_overridden(module, "on_train_batch_start"):
        return True
    return module.on_train_batch_start(batch, batch_idx) != -1


def digests(trainer: Trainer, module: LightningModule) -> dict[str, bytes]:
    """Return a digest of each kind of state that decides how the training goes on."""
    state: dict[str, Any] = {
        "parameters": [p.detach() for p in module.parameters()],
        "buffers": list(module.buffers()),
        "gradients": [p.grad for p in module.parameters()],
        "optimizer state": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "random states": random_states(),
    }
    return {name: _digest(value) for name, value in state.items()}


def _digest(value: Any) -> bytes:
    digest = sha256()
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            leaf = leaf.to_local() if hasattr(leaf, "to_local") else leaf  # the shard of this rank
            dense = leaf.detach().to_dense() if leaf.is_sparse else leaf.detach()
            bits = dense.cpu().contiguous().view(-1).view(torch.uint8) if dense.numel() else torch.empty(0)
            digest.update(bits.numpy().tobytes())
        else:
            digest.update(leaf.tobytes() if hasattr(leaf, "tobytes") else repr(leaf).encode())
    return digest.digest()


def _is_overridden(module: LightningModule, hook: str) -> bool:
    origin = getattr(getattr(module, hook), "__module__", "")
    return not origin.startswith(("lightning.", "pytorch_lightning."))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``print``."""
