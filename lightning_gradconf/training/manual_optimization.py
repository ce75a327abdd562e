"""Manual optimization: the losses are what `training_step` passes to `manual_backward`, and its optimizers do nothing.

A manually optimised step computes a loss, takes a backward pass and an optimizer step, and perhaps does so again for
another optimizer. While measuring, backward passes and all that optimizers and schedulers do are left out, so that the
step can be run as often as it takes, and every loss is computed at the weights before the step.

A step that reads gradients after its backward pass finds none then, and may raise. The losses it has named by then do
not depend on them, and are measured. No gradients are made up, such as zeros: later losses would be wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode

from lightning_gradconf.gram.restoring import restore_mapping
from lightning_gradconf.gram.select import in_words
from lightning_gradconf.training.compat import lightning_modules
from lightning_gradconf.training.isolation import do_nothing

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# What an optimizer may still be asked for; its `toggle_model` calls the module's `toggle_optimizer`.
_READ_ONLY = frozenset({"state_dict", "toggle_model"})


class ManualOptimization:
    """Runs manually optimised steps for their losses alone.

    Attributes:
        stopped: The error, in words, that ended the last step that was run for all its losses, after it had named at
            least one; empty if it came to its end.
        without_losses: Whether that step came to its end and had none.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        wrapped = module.optimizers()
        both = (wrapped if isinstance(wrapped, list) else [wrapped], trainer.optimizers)
        self._optimizers = [(i, optimizer) for part in both for i, optimizer in enumerate(part)]
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.stopped, self.without_losses = "", False
        self._run = _Run()
        self._seen: dict[int, set[int]] = {}

    @contextmanager
    def inert(self) -> Iterator[None]:
        """Within this context, backward passes, optimizers and schedulers do nothing.

        The attributes that stand in for methods of the module stay: `untouched` removes them.
        """
        with ExitStack() as stack:
            for part in lightning_modules(self._module):
                attributes = vars(part)
                attributes["manual_backward"] = lambda loss, *args, **kwargs: self._run.backward(loss)
                attributes["toggle_optimizer"] = self._toggle
                attributes["untoggle_optimizer"] = lambda optimizer: self._toggle(None)
                attributes["clip_gradients"] = do_nothing
            kept = [value for part in lightning_modules(self._module) for value in vars(part).values()]
            known = {id(optimizer) for _, optimizer in self._optimizers}
            own = [(None, value) for value in kept if isinstance(value, Optimizer) and id(value) not in known]
            for i, optimizer in (*self._optimizers, *own):
                stack.callback(restore_mapping, vars(optimizer), dict(vars(optimizer)))
                for name in dir(type(optimizer)):
                    if name[:1] != "_" and name not in _READ_ONLY and callable(getattr(type(optimizer), name)):
                        vars(optimizer)[name] = do_nothing
                vars(optimizer)["step"] = partial(self._step, i)
            for scaler in (value for value in kept if isinstance(value, GradScaler)):
                stack.callback(restore_mapping, vars(scaler), dict(vars(scaler)))
                vars(scaler).update(scale=lambda loss: loss, step=lambda optimizer: optimizer.step())
                vars(scaler).update(unscale_=do_nothing, update=do_nothing)
            for scheduler in (*self._schedulers, *(value for value in kept if isinstance(value, LRScheduler))):
                stack.callback(restore_mapping, vars(scheduler), dict(vars(scheduler)))
                vars(scheduler)["step"] = do_nothing
            yield

    def losses(self, step: Callable[[], Any]) -> tuple[dict[str, set[int]], list[Tensor]]:
        """Run a step to its end, or until it raises after a loss, and return its losses.

        Returns:
            The indices of the optimizers that each loss is for, by its name, and the losses, both in the order of
            their backward passes. A loss is for the optimizer that is toggled in its backward pass, or else for those
            that take a step before the next one. No optimizer step may follow, as while gradients accumulate. Then the
            loss is for the optimizers that followed it in an earlier step. If there were none and there are as many
            losses as optimizers, the k-th loss is for the k-th optimizer, and otherwise for all. The name of a loss is
            the index of its optimizer if it has one of its own, or else the number of its backward pass; it is empty if
            there is one loss for all optimizers.

        Raises:
            Exception: What the step raised before its first loss.
        """
        run, self.stopped = _Run(), ""
        try:
            self._running(run, step)
        except Exception as error:
            if not run.losses:
                raise
            self.stopped = in_words(error)
        self.without_losses = not run.losses
        number = len(self._trainer.optimizers)
        sets = []
        for call, found in enumerate(run.optimizers):
            in_order = {call} if len(run.losses) == number else set(range(number))
            self._seen[call] = found or self._seen.get(call, set())
            sets.append(self._seen[call] or in_order)
        if len(sets) == 1 and len(sets[0]) == number:
            return {"": sets[0]}, run.losses
        one_each = all(len(indices) == 1 for indices in sets) and len(set().union(*sets)) == len(sets)
        names = [str(*indices) if one_each else str(call) for call, indices in enumerate(sets)]
        return dict(zip(names, sets, strict=True)), run.losses

    def parameters(self, optimizers: set[int]) -> set[int]:
        """Return the identities of the parameters that these optimizers train: all, if the Trainer has none."""
        groups = [group for i in optimizers for group in self._trainer.optimizers[i].param_groups]
        trained = {id(p) for group in groups for p in group["params"]}
        every = {id(p) for p in self._module.parameters()}
        return trained & every or every

    def loss(self, step: Callable[[], Any], call: int) -> Tensor | None:
        """Run a step up to a backward pass, and return the loss that it is taken for; None if it has fewer.

        An error before that loss is raised, not taken for a missing loss: the gradient is unknown then, not zero.

        Raises:
            Exception: What the step raised before that loss.
        """
        run = self._running(_Run(last=call), step)
        return run.losses[call] if len(run.losses) > call else None

    def _running(self, run: _Run, step: Callable[[], Any]) -> _Run:
        self._run = run
        try:
            with _Backward(run):
                step()
        except _Reached:
            pass
        return run

    def _toggle(self, optimizer: Any) -> None:
        self._run.toggled = next((i for i, known in self._optimizers if known is optimizer), None)

    def _step(self, index: int | None, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return self._run.step(index, closure)


class _Reached(BaseException):
    """Ends a step at the loss that is wanted, also through an ``except Exception`` of the user's."""


@dataclass
class _Run:
    """One run of a step: its losses so far, and the optimizers of each."""

    last: int | None = None
    toggled: int | None = None
    losses: list[Tensor] = field(default_factory=list)
    optimizers: list[set[int]] = field(default_factory=list)
    waiting: list[set[int]] = field(default_factory=list)
    stepped: bool = False

    def backward(self, loss: Tensor) -> None:
        """Stand in for a backward pass."""
        self.losses.append(loss)
        self.optimizers.append(set() if self.toggled is None else {self.toggled})
        if self.stepped:
            self.waiting, self.stepped = [], False
        if self.toggled is None:
            self.waiting.append(self.optimizers[-1])
        if len(self.losses) - 1 == self.last:
            raise _Reached

    def step(self, optimizer: int | None, closure: Callable[[], Any] | None) -> Any:
        """Stand in for an optimizer step, which may call a closure that takes the backward pass."""
        result = None if closure is None else closure()
        self.stepped = True
        for optimizers in self.waiting:
            optimizers |= set() if optimizer is None else {optimizer}
        return result


class _Backward(TorchFunctionMode):
    """Within this context, ``loss.backward()`` is what `manual_backward` is."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            return self.run.backward(args[0])
        return func(*args, **(kwargs or {}))
