"""Everything a forward pass may leave behind in a module, remembered first and put back afterwards.

Engines run on copies of the parameters and buffers, so their values are remembered only where something else can reach
them. The rest is Python state: counters, lists of outputs, the states of metrics, tensors that are no buffers, random
generators, ``training`` flags. `untouched` puts it back after a measurement, `rewinder` between two of its units.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_gradconf.gram.process_state import random_states
from lightning_gradconf.gram.restoring import (
    is_same,
    restore_array,
    restore_leaf,
    restore_mapping,
    restore_sequence,
    restore_set,
    restore_slots,
    restore_tensor,
    restore_written,
)

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size})
# The way to the Trainer, which holds the data, the loggers and this measurement itself.
_NOT_FOLLOWED = frozenset({"_trainer", "_fabric"})
# Longer lists hold the data themselves: of transforms, and of what a dataset or a datamodule notes.
_MOST_TRANSFORMS = 100
_MOST_ENTRIES = 10_000
_MOST_ELEMENTS = 1 << 20  # of tensors and arrays beside the module, such as the weights of samples
_OURS = __name__.partition(".")[0]  # what measures is not put back
# What every module keeps for itself: its hooks, mostly empty.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def untouched(module: nn.Module, *others: Any, data: Iterable[Any] = (), tensors: bool = False) -> Iterator[None]:
    """Put random states, ``module`` and ``others`` back when the context ends, however it ends.

    Args:
        module: Its Python state, also that of its submodules, its gradients and its ``requires_grad`` flags.
        others: More containers (dictionaries, lists) to put back, with everything in them.
        data: What data are read from: only attributes and random generators are put back, since the rest is large.
        tensors: Put the values of parameters, buffers and gradients back too, for code that does not run on copies.

    Raises:
        RuntimeError: The module holds an iterator, which cannot be turned back.
    """
    with ExitStack() as stack:  # all of it is put back, whatever fails
        for restore, state in random_states():
            stack.callback(restore, state)
        for p in module.parameters():
            stack.callback(restore_leaf, p, p.grad, p.requires_grad)
        memory = _Memory(module)
        own = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        if tensors:
            for tensor in own.values():
                memory.remember(tensor)
        memory.seen |= own  # optimizers hold them all
        for part in data:  # before the others, as a sampler leads to its dataset too
            memory.remember_source(part)
        for other in others:
            memory.remember(other)
        for put_back in (*memory.values, *memory.containers, *memory.generators):
            stack.callback(put_back)
        yield


def rewinder(module: nn.Module) -> Callable[[], None]:
    """Return a function that puts the Python state of ``module`` back to what it is now.

    Call it after each unit, outside of `functional_call`, so that the next one starts from the same counters, lists and
    cache keys. Random generators go on: the random numbers of a unit are its own. The first call compares everything.
    Later calls compare containers by what is in them and tensors by their version; values that change without a version
    (arrays, what native BatchNorm writes) are put back where the first call found a change.

    Raises:
        RuntimeError: The module holds an iterator, which cannot be turned back.
    """
    memory = _Memory(module)
    changed: list[Callable[[], bool]] | None = None

    def rewind() -> None:
        nonlocal changed
        if changed is None:
            changed = [put_back for put_back in memory.values if put_back()]
        for put_back in (*changed, *memory.containers):
            put_back()

    return rewind


def reachable(module: nn.Module) -> Iterable[Any]:
    """Return the objects that Python state of ``module`` leads to: submodules, containers and what is in them."""
    return _Memory(module).seen.values()


def changes_in_libraries(module: nn.Module) -> Callable[[], list[str]]:
    """Return a function that names objects of libraries whose attributes have changed since; they are not put back."""
    saved = [(path, value, dict(vars(value))) for path, value in _Memory(module).left_alone.items()]
    return lambda: [
        f"{path} ({type(value).__name__})" for path, value, before in saved if not is_same(vars(value), before)
    ]


class _Memory:
    """Walks the Python state of a module once, object by object, and keeps how each one is put back.

    Attributes:
        containers: Put a container or a tensor back if it shows, at little cost, that it was written to.
        values: The same by comparing values, and for what hardly any forward pass writes to. Each returns whether it
            was written to.
        generators: Put random generators back.
        left_alone: Objects of libraries, which are not put back, by where the module keeps them.
        seen: All objects met, by their address. They are kept, so that no new object can take over an address.
    """

    def __init__(self, module: nn.Module) -> None:
        self.left_alone: dict[str, Any] = {}
        self.containers: list[Callable[[], Any]] = []
        self.values: list[Callable[[], bool]] = []
        self.generators: list[Callable[[], Any]] = []
        self.seen: dict[int, Any] = {}
        self._todo: list[tuple[Any, str]] = []
        # Engines put copies in the place of the tensors registered here, but not of those in a list of the user's.
        self._swapped = {id(part) for part in module.modules()}
        packages = [base.__module__.partition(".")[0] for base in type(module).__mro__]
        # fully_shard makes a class of its own; what it keeps is none of the user's.
        self._home = next((package for package in packages if package not in ("torch", "builtins")), "")
        self.remember(module, type(module).__name__)

    def remember(self, value: Any, path: str = "") -> None:
        """Keep how to put back ``value`` and what it leads to; ``path`` says where it was found."""
        self._follow(value, path)
        while self._todo:
            self._visit(*self._todo.pop())

    def _follow(self, value: Any, path: str) -> None:
        """Visit an object later: chains of objects may be longer than Python's calls can be deep."""
        self._todo.append((value, path))

    def _visit(self, value: Any, path: str) -> None:
        if type(value) in _ATOMS or id(value) in self.seen or isinstance(value, DataLoader):
            return
        if isinstance(value, Dataset):
            return self._remember_data(value)
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            self._remember_tensor(value, path)
        elif isinstance(value, nn.Module):
            self._remember_module(value, path)
        elif isinstance(value, MutableMapping | list | deque | set | tuple | frozenset):
            self._remember_container(value, path)
        elif isinstance(value, MethodType | partial):
            self._follow_all(_in_callable(value), path)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:  # or else, as a file mapped into memory, it may be large
                self.values.append(partial(restore_array, value, value.copy()))
        elif self._remember_generator(value):
            pass
        elif isinstance(value, Iterator):
            raise RuntimeError(
                f"{path} is an iterator ({type(value).__name__}); a measurement would advance it and cannot turn it "
                "back. Keep what it iterates over on the module instead, or pass a `loss_fn` to a module without it"
            )
        elif self._is_users(value):
            self._remember_attributes_of_object(value, path)
        elif hasattr(value, "__dict__") and not isinstance(value, type | FunctionType | ModuleType):
            self.left_alone[path] = value

    def _remember_container(self, value: Any, path: str) -> None:
        self._remember_entries(value)
        self._follow_all(value, path)  # of a mapping, its keys
        if isinstance(value, MutableMapping):
            for key, entry in value.items():
                if type(key) not in _ATOMS or key not in _NOT_FOLLOWED:
                    self._follow(entry, f"{path}.{key}")
        if self._is_users(value):
            self._remember_attributes_of_object(value, path)

    def _remember_attributes_of_object(self, value: Any, path: str) -> None:
        if hasattr(value, "__dict__"):
            self._follow(vars(value), path)
        given = [vars(cls).get("__slots__", ()) for cls in type(value).__mro__]
        slots = {name for names in given for name in ([names] if isinstance(names, str) else names)}
        if saved := {
            name: getattr(value, name) for name in slots - {"__dict__", "__weakref__"} if hasattr(value, name)
        }:
            self.containers.append(partial(restore_slots, value, saved))
            self._follow_all(saved.values(), path)

    def remember_source(self, value: Any) -> None:
        """Keep how to put back a dataset, of whatever class: a plain list is one too."""
        if hasattr(value, "__dict__") and id(value) not in self.seen:
            self._remember_attributes_of_data(value, are_items=isinstance(value, MutableMapping))
        else:
            self._remember_data(value, is_item=True)

    def _remember_data(self, value: Any, *, is_item: bool = False) -> None:
        """Keep how to put back what data are read from, without what is large, and without tensors in sequences."""
        if type(value) in _ATOMS or id(value) in self.seen or self._remember_generator(value):
            return
        if not isinstance(value, Tensor | np.ndarray | list | tuple | deque | set | MutableMapping):
            # What is passed over is not marked as seen: a callback that the Trainer leads to is a source itself.
            if not isinstance(value, type) and hasattr(value, "__dict__") and self._is_read(value):
                self._remember_attributes_of_data(value)
            return
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            if not is_item and value.numel() <= _MOST_ELEMENTS and not value.is_inference():
                self.containers.append(partial(restore_written, value, value.detach().clone(), value._version))
        elif isinstance(value, np.ndarray):
            if not is_item and value.size <= _MOST_ELEMENTS and value.flags.writeable:
                self.values.append(partial(restore_array, value, value.copy()))
        else:
            if len(value) <= _MOST_ENTRIES:
                self._remember_entries(value)
            entries, are_items = (value.values(), is_item) if isinstance(value, MutableMapping) else (value, True)
            for entry in islice(entries, _MOST_TRANSFORMS):
                self._remember_data(entry, is_item=are_items)

    def _remember_entries(self, value: Any) -> None:
        """Keep how to put back which entries a container has."""
        if isinstance(value, MutableMapping):
            self.containers.append(partial(restore_mapping, value, dict(value)))
        elif isinstance(value, list | deque):
            self.containers.append(partial(restore_sequence, value, list(value)))
        elif isinstance(value, set):
            self.containers.append(partial(restore_set, value, set(value)))

    def _remember_attributes_of_data(self, value: Any, *, are_items: bool = False) -> None:
        """Keep how to put back the attributes of what data are read from."""
        self.seen[id(value)] = value
        self.containers.append(partial(restore_mapping, vars(value), dict(vars(value))))
        for name, entry in vars(value).items():
            if name not in _NOT_FOLLOWED:
                self._remember_data(entry, is_item=are_items)

    def _is_read(self, value: Any) -> bool:
        """Return whether reading data may change an object: transforms of a library draw, or hold the user's."""
        return isinstance(value, Dataset | Sampler) or callable(value) or self._is_users(value)

    def _is_users(self, value: Any) -> bool:
        """Return whether an object is followed: those of the user's own classes are, such as a meter or a state."""
        if isinstance(value, SimpleNamespace | Namespace):
            return True
        module = type(value).__module__
        package = module.partition(".")[0]
        return package != _OURS and (package == self._home or not _is_installed(module))

    def _remember_module(self, module: nn.Module, path: str) -> None:
        """Keep how to put a module back; layers of torch.nn write to nothing but their buffers."""
        if isinstance(module, torch.jit.ScriptModule):  # what it keeps is beyond the reach of Python
            return
        attributes = vars(module)
        self.seen[id(attributes)] = attributes
        watched = self.values if type(module).__module__.startswith("torch.nn.") else self.containers
        watched.append(partial(restore_mapping, attributes, dict(attributes)))
        tensors = ("_parameters", "_buffers") if id(module) in self._swapped else ()
        for name, entry in attributes.items():
            if name in _OF_EVERY_MODULE and "state_dict" in name:
                continue  # fully_shard registers such hooks in its first pass, and never again
            empty = name in _OF_EVERY_MODULE and not entry
            if name in tensors or (empty and isinstance(entry, dict)):
                self.seen[id(entry)] = entry
                (self.values if empty else watched).append(partial(restore_mapping, entry, dict(entry)))
            elif name not in _NOT_FOLLOWED:
                self._follow(entry, f"{path}.{name}")

    def _remember_tensor(self, tensor: Tensor, path: str) -> None:
        saved = tensor.detach().clone()
        self.values.append(partial(restore_tensor, tensor, saved))
        if not tensor.is_inference():
            self.containers.append(partial(restore_written, tensor, saved, tensor._version))
        if tensor.is_leaf:
            self.containers.append(partial(restore_leaf, tensor, tensor.grad, tensor.requires_grad))
            self._follow(tensor.grad, path)

    def _follow_all(self, values: Any, path: str) -> None:
        for i, entry in enumerate(values):
            if type(entry) not in _ATOMS:
                self._follow(entry, f"{path}[{i}]")

    def _remember_generator(self, value: Any) -> bool:
        """Keep how a random generator is put back; False if ``value`` is none."""
        if isinstance(value, torch.Generator):
            self.generators.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.generators.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            self.generators.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            self.generators.append(partial(value.set_state, value.get_state()))
        else:
            return False
        return True


def _in_callable(value: MethodType | partial[Any]) -> tuple[Any, ...]:
    """Return the objects that a bound method or a partial function leads to."""
    return (value.__self__,) if isinstance(value, MethodType) else (value.func, *value.args, *value.keywords.values())


@lru_cache(maxsize=1024)
def _is_installed(module: str) -> bool:
    """Return whether a module came with Python or from a package index; a script, a notebook or a checkout did not."""
    if module == "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.partition(".")[0] == _OURS:
        return True
    return file.startswith(sysconfig.get_path("stdlib")) or bool(
        {"site-packages", "dist-packages"} & {*Path(file).parts}
    )
