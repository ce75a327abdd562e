"""A LightningModule's own ``training_step`` as the loss of a batch, called without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradconf.gram.module_state import random_states, restore_mapping, untouched, without_warnings
from lightning_gradconf.gram.ranks import sharded
from lightning_gradconf.training.compat import lightning_modules, namespace

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    StepLoss: TypeAlias = Callable[[LightningModule, Any], Tensor | None]


# Hooks of the module that a measurement calls, on the module itself and not on copies of its tensors.
_HOOKS = ("on_train_batch_start", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule, *others: Any, data: Iterable[Any] = ()) -> Iterator[None]:
    """Within this context, nothing that a training step does reaches the run.

    Logging is mute, the loggers are dummies, compiled code runs eagerly, and everything that a step changes in
    Python, from the random state to the learning rate, is put back in the end.

    Args:
        trainer: The running Trainer.
        module: Its LightningModule.
        others: More containers whose contents are put back.
        data: What data are read from, of which attributes and random generators are put back.
    """
    with ExitStack() as stack:
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        schedulers = [vars(config.scheduler) for config in trainer.lr_scheduler_configs]
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        data = [*data] if datamodule is None else [*data, datamodule]
        hooks = any(_is_overridden(module, name) for name in _HOOKS)
        stack.enter_context(untouched(module, *groups, *schedulers, *others, data=data, tensors=hooks))
        # Among its attributes are should_stop and the loggers, and what the user's code keeps there.
        stack.callback(restore_mapping, vars(trainer), list(vars(trainer).items()))
        dummy = import_module(f"{namespace(trainer).__name__}.loggers.logger").DummyLogger
        trainer.loggers = [dummy() for _ in trainer.loggers]
        for part in lightning_modules(module):
            vars(part)["log"] = vars(part)["print"] = _ignore  # `untouched` removes them again; log_dict calls log
        # What the user's code says about single samples is no news, and must not use up what is said only once.
        stack.enter_context(without_warnings())
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


def step_loss(
    trainer: Trainer, module: LightningModule, loss_fn: StepLoss | None, batch_idx: int, given: list[bool]
) -> Callable[[LightningModule, Any], Tensor]:
    """Return ``loss_fn``, or else the loss of ``training_step``, under the precision of the Trainer.

    A step that returns None, which tells Lightning to skip the batch, has a constant loss. Each call appends to
    ``given`` whether it gave a loss.
    """

    def training_step(module: LightningModule, batch: Any) -> Tensor | None:
        signature = import_module(f"{namespace(trainer).__name__}.utilities.signature_utils")
        takes_index = signature.is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        output = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
        if not isinstance(output, Mapping):
            return output
        if "loss" not in output:
            raise ValueError(f"training_step returned a mapping without 'loss', with the keys {sorted(output)}")
        return output["loss"]  # type: ignore[no-any-return]

    def loss(module: LightningModule, batch: Any) -> Tensor:
        with trainer.precision_plugin.train_step_context():
            value = (loss_fn or training_step)(module, batch)
        given.append(value is not None)
        return torch.zeros((), device=module.device, requires_grad=True) if value is None else value

    return loss


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


def reason_not_to_measure(trainer: Trainer, module: LightningModule, loss_fn: StepLoss | None) -> str | None:
    """Return why this run cannot be measured and what to do about it, None if it can."""
    if trainer.barebones:
        return "Trainer(barebones=True) switches logging off; measure in a run without it"
    strategies = {base.__name__ for base in type(trainer.strategy).__mro__}
    if "ModelParallelStrategy" in strategies:
        if (reason := sharded.reason_not_to_measure(module)) is not None:
            return f"{reason}; measure in a run with strategy='ddp', or shard all of the module with fully_shard"
    elif not strategies & {"SingleDeviceStrategy", "DDPStrategy"} or "SingleDeviceXLAStrategy" in strategies:
        return (
            f"{type(trainer.strategy).__name__} is not supported yet; measure in a run with strategy='ddp' or on one "
            "device (devices=1)"
        )
    if loss_fn is None:
        signature = import_module(f"{namespace(trainer).__name__}.utilities.signature_utils")
        if not module.automatic_optimization:
            return (
                "with manual optimization training_step takes optimizer steps, so it cannot be called to measure; "
                "pass loss_fn=, a function (module, batch) -> loss of the batch"
            )
        if signature.is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            return "training_step takes a dataloader_iter, which cannot be shared; let it take (batch, batch_idx)"
    return None


def _is_overridden(module: LightningModule, hook: str) -> bool:
    origin = getattr(getattr(module, hook), "__module__", "")
    return not origin.startswith(("lightning.", "pytorch_lightning."))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``log`` and ``print``."""
