"""Everything a forward pass may leave behind in a module, remembered first and put back afterwards.

Parameters and buffers are not handled here: engines run on copies of them. The rest is Python state: counters, lists
of outputs, the states of metrics, tensors that are no buffers, random generators, ``training`` flags.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size})
_LIBRARIES = frozenset({"builtins", "torch", "lightning", "pytorch_lightning", "torchmetrics"})
# The way to the Trainer, which holds the data, the loggers and this measurement itself.
_NOT_FOLLOWED = frozenset({"_trainer", "_fabric"})


@contextmanager
def untouched(module: nn.Module, *others: Any) -> Iterator[None]:
    """Put random states, ``module`` and ``others`` back when the context ends, however it ends.

    Args:
        module: Its Python state, also that of its submodules, its gradients and its ``requires_grad`` flags.
        others: More containers (dictionaries, lists) to put back, with everything in them.

    Raises:
        RuntimeError: The module holds an iterator, which cannot be turned back.
    """
    with ExitStack() as stack:  # last in, first out, and all of it whatever fails
        _remember_random_state(stack)
        for p in module.parameters():
            stack.callback(_restore_parameter, p, p.grad, p.requires_grad)
        memory = _Memory(stack, module)
        memory.remember(module, type(module).__name__)
        for other in others:
            memory.remember(other, "")
        yield


def _remember_random_state(stack: ExitStack) -> None:
    stack.callback(random.setstate, random.getstate())
    if (numpy := sys.modules.get("numpy")) is not None:
        stack.callback(numpy.random.set_state, numpy.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    for backend in (torch.cuda, getattr(torch, "xpu", None)):
        if backend is not None and backend.is_available() and backend.is_initialized():
            stack.callback(backend.set_rng_state_all, backend.get_rng_state_all())
    if torch.backends.mps.is_available():
        stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())


def _restore_parameter(p: nn.Parameter, grad: Tensor | None, requires_grad: bool) -> None:
    if p.requires_grad != requires_grad:
        p.requires_grad_(requires_grad)
    if p.grad is not grad:
        p.grad = grad


class _Memory:
    """Walks Python state once, object by object, and schedules how each one is put back."""

    def __init__(self, stack: ExitStack, module: nn.Module) -> None:
        self.stack = stack
        # Copied by the engines; kept here, so that no new object can take over an address seen before.
        self.seen: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        # Objects of the user's own classes are followed: a meter, a state. Those of libraries are their own business.
        self.home = {type(module).__module__.partition(".")[0]} - _LIBRARIES

    def remember(self, value: Any, path: str) -> None:
        """Schedule the restoration of ``value`` and of what it holds."""
        if type(value) in _ATOMS or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, nn.Parameter | Dataset | DataLoader):  # data are read, and large
            return
        if isinstance(value, Tensor):
            self.stack.callback(_restore_tensor, value, value.detach().clone())
        elif isinstance(value, nn.Module):
            self.remember(vars(value), path)
        elif isinstance(value, MutableMapping):
            self.stack.callback(_restore_mapping, value, list(value.items()))
            for key, entry in value.items():
                if key not in _NOT_FOLLOWED:
                    self.remember(entry, f"{path}.{key}")
        elif isinstance(value, list | deque):
            self.stack.callback(_restore_sequence, value, list(value))
            self._remember_all(value, path)
        elif isinstance(value, set):
            self.stack.callback(_restore_set, value, set(value))
        elif isinstance(value, tuple):
            self._remember_all(value, path)
        elif isinstance(value, torch.Generator):
            self.stack.callback(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            self.stack.callback(value.setstate, value.getstate())
        elif (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
            self.stack.callback(_restore_array, value, value.copy())
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            self.stack.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif numpy is not None and isinstance(value, numpy.random.RandomState):
            self.stack.callback(value.set_state, value.get_state())
        elif isinstance(value, Iterator):
            raise RuntimeError(
                f"{path} is an iterator ({type(value).__name__}); a measurement would advance it and cannot turn it "
                "back. Keep what it iterates over on the module instead, or pass a `loss_fn` to a module without it"
            )
        elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] in self.home:
            self.remember(vars(value), path)

    def _remember_all(self, values: Any, path: str) -> None:
        for i, entry in enumerate(values):
            if type(entry) not in _ATOMS:
                self.remember(entry, f"{path}[{i}]")


def _restore_tensor(tensor: Tensor, saved: Tensor) -> None:
    if tensor.shape != saved.shape:
        tensor.data = saved
    elif tensor.layout is not torch.strided or not torch.equal(tensor.detach(), saved):
        tensor.data.copy_(saved)  # `.data`: no graph, and no new version of the tensor


def _restore_array(array: Any, saved: Any) -> None:
    array[...] = saved


def _restore_mapping(mapping: MutableMapping[Any, Any], saved: list[tuple[Any, Any]]) -> None:
    if not _same(mapping.items(), saved, lambda a, b: a[0] is b[0] and a[1] is b[1]):
        mapping.clear()
        mapping.update(saved)


def _restore_sequence(sequence: Any, saved: list[Any]) -> None:
    if not _same(sequence, saved, lambda a, b: a is b):
        sequence.clear()
        sequence.extend(saved)


def _restore_set(values: set[Any], saved: set[Any]) -> None:
    values.clear()
    values.update(saved)


def _same(now: Any, saved: list[Any], equal: Callable[[Any, Any], bool]) -> bool:
    """Whether nothing changed, so that what was not touched is not written to either."""
    return len(now) == len(saved) and all(map(equal, now, saved))
