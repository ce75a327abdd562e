"""A context in which nothing that a training step does reaches the run, and digests that show whether it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.process_state import random_states, without_warnings
from lightning_gradconf.training.compat import is_overridden, lightning_modules
from lightning_gradconf.training.silence import silent, without_logging

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

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
        tensors = not module.automatic_optimization or any(is_overridden(module, name) for name in _HOOKS)
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
        if torch.backends.cudnn.is_available():
            cudnn = torch.backends.cudnn
            # A benchmark for a unit's shape would stay in the cache.
            flags = {name: getattr(cudnn, name) for name in ("enabled", "deterministic", "allow_tf32")}
            stack.enter_context(cudnn.flags(benchmark=False, **flags))
        yield


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


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log`` and ``print``."""
