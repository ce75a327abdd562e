"""Iterators that a loader keeps for its items: reading items would advance them, and they cannot be turned back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from torch.utils.data import Dataset, Sampler

from lightning_gradconf.batches.loaders import loaders_in
from lightning_gradconf.batches.samples import WHOLE

_OWNERS: Final = ("dataset", "sampler", "batch_sampler")
# What wrappers such as Subset, ConcatDataset and BatchSampler call that which they wrap.
_WRAPPED: Final = (*_OWNERS, "datasets", "data_source")
# At most this many objects are searched, and this many entries of a container.
_MOST: Final = 100


def iterator_in(loaders: Any) -> str | None:
    """Return where a dataset or a sampler of loaders keeps an iterator, in words; None if none does.

    Only attributes are looked at, of these objects and of those that they wrap.

    >>> from torch.utils.data import DataLoader
    >>> sampler = type("Forever", (), {"__iter__": lambda self: self.it})()
    >>> sampler.it = iter([3, 1, 2])
    >>> iterator_in(DataLoader(range(4), sampler=sampler))
    "the sampler of the train loader, attribute 'it', is an iterator (list_iterator)"
    """
    for path, loader in loaders_in(loaders).items():
        whose = "the train loader" if path == WHOLE else f"the train loader of {path}"
        for owner in _OWNERS:
            if (found := _search(getattr(loader, owner, None))) is not None:
                attribute, iterator = found
                name = owner.replace("_", " ")
                return f"the {name} of {whose}, attribute {attribute!r}, is an iterator ({type(iterator).__name__})"
    return None


def _search(owner: Any) -> tuple[str, Any] | None:
    """Return the first iterator among the attributes of an object and of what it wraps, with the way to it."""
    todo, seen = [("", owner)], set[int]()
    while todo and len(seen) < _MOST:
        path, part = todo.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        for name, value in getattr(part, "__dict__", {}).items():
            for key, entry in [("", value), *islice(_entries(value), _MOST)]:
                at = f"{path}{name}{key}"
                if _is_position(entry):
                    return at, entry
                if name in _WRAPPED or isinstance(entry, Dataset | Sampler | Iterator):
                    todo.append((f"{at}.", entry))
    return None


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a list or a dictionary, each with the suffix that leads to it."""
    if isinstance(value, list | tuple):
        yield from ((f"[{i}]", entry) for i, entry in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", entry) for key, entry in value.items())


def _is_position(value: Any) -> bool:
    """Return whether an object is a generator or another iterator of Python, whose position cannot be put back.

    Files and database cursors are iterators too. They do not count: most code moves them to a position before reading.
    """
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")
