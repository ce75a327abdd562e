"""A context in which nothing that a training step does reaches the run, and digests that show whether it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradconf.batches.loaders import changes, loaders_in
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.process_state import random_states, without_warnings
from lightning_gradconf.training.compat import is_overridden, lightning_modules
from lightning_gradconf.training.silence import silent, without_logging

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# Hooks of the module that a measurement calls, on the module itself and not on copies of its tensors.
_HOOKS = ("on_train_batch_start", "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule, loaders: Any) -> Iterator[None]:
    """Within this context, nothing that a training step does reaches the run.

    Logging is mute, the loggers write nothing, compiled code runs eagerly, and everything that a step changes in
    Python, from the random state to the learning rate, is put back in the end.

    Args:
        trainer: The running Trainer.
        module: Its LightningModule.
        loaders: Those whose items are read in this context, nested as of `loaders_in`.
    """
    with ExitStack() as stack:
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        schedulers = [vars(config.scheduler) for config in trainer.lr_scheduler_configs]
        containers, data = changes(loaders)
        # The training step can reach its datasets and samplers, whatever is read here.
        for loader in loaders_in(trainer.train_dataloader).values():
            data += [getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler")]
        # Of these too, attributes and random generators are put back: `should_stop` and the loggers of the Trainer,
        # `max_epochs` of its loop, the patience of an EarlyStopping, and what the user's code keeps there.
        loop: Any = trainer.fit_loop
        data += [trainer, loop, loop.epoch_loop, *trainer.callbacks, trainer.datamodule]  # type: ignore[attr-defined]
        # What a manually optimised step does to gradients by hand, it does to those of the module itself.
        tensors = not module.automatic_optimization or any(is_overridden(module, name) for name in _HOOKS)
        stack.enter_context(untouched(module, *groups, *schedulers, *containers, data=data, tensors=tensors))
        trainer.loggers = [silent(logger) for logger in trainer.loggers]
        for part in lightning_modules(module):
            vars(part)["log"] = vars(part)["print"] = do_nothing  # `untouched` removes them again; log_dict calls log
        # What the user's code says about single samples is no news, and must not use up what is said only once.
        stack.enter_context(without_warnings())
        stack.enter_context(without_logging())
        stack.callback(torch.set_warn_always, torch.is_warn_always_enabled())
        torch.set_warn_always(True)
        stack.enter_context(torch.enable_grad())
        # Units have other shapes than batches: compiling for them would use up the recompilations of training.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # A benchmark for a unit's shape would stay in the cache.
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = False
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


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for what must not happen while measuring, such as ``log``."""
