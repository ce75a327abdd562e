"""What a loader makes of items of its dataset, one by one and in groups of our choice, and which items it takes.

Nothing here iterates over a loader: an iterator of its own would draw from the random state, or restart its workers.
Items are read from the dataset in the main process and go through the loader's own ``collate_fn``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_gradconf.batches.samples import WHOLE
from lightning_gradconf.batches.structure import children, deep_copy_of, rebuild

# At most this many indices are taken of a sampler where neither it nor its dataset says how long it is.
_ENDLESS: Final = 10_000
# At most this many more items, or groups of them, are read in the place of items that are missing.
MORE: Final = 100


def loaders_in(structure: Any, path: str = WHOLE) -> dict[str, Any]:
    """Return the loaders of a structure, each with the expression that leads to its part of a batch.

    >>> loaders_in({"a": "loader", "b": ["other", "third"]})
    {"batch['a']": 'loader', "batch['b'][0]": 'other', "batch['b'][1]": 'third'}
    """
    if not isinstance(structure, list | tuple | dict):
        return {path: structure}
    found: dict[str, Any] = {}
    for key, child in children(structure):
        found |= loaders_in(child, path + key)
    return found


def combined(structure: Any, batches: Iterator[Any]) -> Any:
    """Return a batch of several loaders from the next batch of each."""
    if not isinstance(structure, list | tuple | dict):
        return next(batches)
    return rebuild(structure, [combined(child, batches) for _, child in children(structure)])


def has_items(loader: Any) -> bool:
    """Return whether items of a loader can be read and collated."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return False
    return callable(getattr(loader, "collate_fn", None)) and not _of_batches(loader)


def read_items(loader: Any, indices: Sequence[Any]) -> list[Any]:
    """Return items of the dataset, for `collate`."""
    if _dataset_collates(loader):
        return list(indices)
    dataset = loader.dataset
    if callable(at_once := getattr(dataset, "__getitems__", None)):
        return list(at_once(list(indices)))
    return [dataset[i] for i in indices]


def collate(loader: Any, items: Sequence[Any]) -> Any:
    """Return the batch that the loader makes of some items."""
    if _dataset_collates(loader):
        return loader.collate_fn(loader.dataset[list(items)])
    return loader.collate_fn([deep_copy_of(item) for item in items])  # some take entries out of the items


def batch_size(loader: Any) -> int | None:
    """Return how many samples the loader puts in a batch; None if that is not fixed, or the loader does not say."""
    if isinstance(loader, DataLoader) and not _reads_its_dataset(loader):
        return None
    for owner in (getattr(loader, "batch_sampler", None), loader, getattr(loader, "sampler", None)):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def samples_at(loader: Any, batch_idx: int) -> int | None:
    """Return how many samples the loader's batch at an index has, fewer in the last one; None if that is not fixed."""
    size, groups = batch_size(loader), _groups(loader)
    if size is None or type(groups) is not BatchSampler:
        return size
    batches, samples = _length(groups), _length(groups.sampler)
    if batches is None or samples is None:  # of a stream
        return size
    return min(size, samples - size * (batch_idx % batches)) if batches else size


def shares(loaders: Mapping[str, Any], unit_size: int, counts: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many samples a unit has of each loader: ``unit_size`` of the one with the smallest batches.

    Args:
        loaders: The loaders, as of `loaders_in`.
        unit_size: Samples in a unit.
        counts: The samples of each in a batch, for loaders without a fixed batch size.

    >>> from torch.utils.data import DataLoader
    >>> shares({"labelled": DataLoader(range(8), batch_size=2), "other": DataLoader(range(8), batch_size=6)}, 1)
    {'labelled': 1, 'other': 3}
    """
    if len(loaders) == 1:
        return dict.fromkeys(loaders, unit_size)
    sizes = {path: batch_size(loader) or (counts or {}).get(path, 1) for path, loader in loaders.items()}
    least = min(sizes.values())
    return {path: max(1, round(unit_size * size / least)) for path, size in sizes.items()}


def examples(loader: Any) -> list[Any]:
    """Return three items that tell where samples lie, of one batch if a sampler of the user's puts it together.

    An item that is None is one that the dataset could not read, and another one is taken, if there is one.

    Raises:
        ValueError: The items of the loader cannot be read, or there are fewer than three.
    """
    if not has_items(loader):
        raise ValueError("the loader has no dataset whose items can be read")
    flat = _flat(loader)
    if flat is None:
        flat = next((group for group in _batches(loader) if len(group) > 2), None)
    if flat is None:
        flat = [i for group in _batches(loader) for i in group]
    if len(flat) < 3:
        raise ValueError("the dataset is too small to tell where samples lie")
    positions = [0, len(flat) // 2, len(flat) - 1]
    found = read_items(loader, [flat[i] for i in positions])
    intact = [item for item in found if item is not None]
    others = (i for i in range(min(len(flat), MORE)) if i not in positions)
    while len(intact) < 3 and (i := next(others, None)) is not None:
        intact += [item for item in read_items(loader, [flat[i]]) if item is not None]
    return intact if len(intact) == 3 else found


def draw_indices(
    loader: Any, size: int | None, num: int, population: Sequence[Any] | None = None
) -> Iterator[list[Any]]:
    """Yield ``num`` groups of indices drawn without replacement, from those that the loader's sampler takes.

    After them come some more, in the place of groups whose items turn out to be missing. A batch sampler of the user's
    own may keep samples together for a reason, such as their length: then the indices of a group are of one of its
    batches.

    Args:
        loader: A loader of which `has_items` is true.
        size: Indices in a group; None is as many as in a batch.
        num: How many groups; fewer if there are not so many.
        population: Draw from these indices alone.
    """
    flat = _flat(loader) if population is None else population
    if flat is None:
        found = list(_groups_of(loader, size))
        yield from (found[i] for i in _positions(len(found), num))
        return
    size = size or batch_size(loader) or 1
    positions = _positions(len(flat), min(num, len(flat) // size) * size, size)
    while len(group := list(islice(positions, size))) == size:
        yield [flat[i] for i in group]


def first_indices(loader: Any, size: int | None, num: int) -> list[list[Any]]:
    """Return up to ``num`` groups of indices in the order of the loader; the arguments are those of `draw_indices`."""
    flat = _flat(loader)
    if flat is None:
        return list(islice(_groups_of(loader, size), num))
    size = size or batch_size(loader) or 1
    return [list(flat[i * size : (i + 1) * size]) for i in range(min(num, len(flat) // size))]


def changes(loaders: Any) -> tuple[list[Any], list[Any]]:
    """Return what reading items of loaders changes: containers, and what data are read from, large as they may be."""
    containers: list[Any] = []
    data: list[Any] = []
    for loader in loaders_in(loaders).values():
        data.append(getattr(loader, "dataset", None))
        containers += [getattr(loader, name, None) for name in ("generator", "collate_fn")]
        todo = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
        while todo:
            part = todo.pop()
            if hasattr(part, "__dict__") and not any(vars(part) is known for known in containers):
                containers.append(vars(part))
                todo += [entry for entry in vars(part).values() if isinstance(entry, Sampler)]
    return containers, data


def seed_everything(seed: Sequence[int]) -> None:
    """Make draws and augmentations depend on ``seed`` alone; the caller has remembered the random state."""
    number = random.Random(",".join(map(str, seed))).getrandbits(32)
    random.seed(number)
    torch.manual_seed(number)
    np.random.seed(number)


def _reads_its_dataset(loader: DataLoader[Any]) -> bool:
    """Return whether batches may come from the loader's ``dataset``: not from one that has neither items nor a stream.

    A loader of loaders, which gives a batch of each, has some object there, and attributes that say nothing.
    """
    return isinstance(loader.dataset, IterableDataset) or hasattr(loader.dataset, "__getitem__")


def _groups(loader: Any) -> Any:
    """Return what yields the indices of whole batches: the batch sampler, or one that is handed in as ``sampler``."""
    groups = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if groups is None else groups


def _flat(loader: Any) -> Sequence[Any] | None:
    """Return the indices that a loader takes, None where a batch sampler of the user's own puts them together."""
    groups = _groups(loader)
    if groups is None:  # a loader of the user's own
        return range(len(loader.dataset))
    if type(groups) is not BatchSampler:
        return None
    sampler: Any = groups.sampler
    if type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(sampler.data_source))
    return list(islice(sampler, _most(sampler, loader)))


def _positions(length: int, num: int, size: int = 1) -> Iterator[int]:
    """Yield up to ``num`` positions in a sequence, drawn without replacement, and then more: of `MORE` groups."""
    first = random.sample(range(length), min(num, length))
    yield from first
    taken = set(first)
    more = random.sample(range(length), min(length, len(first) + MORE * size))
    yield from (i for i in more if i not in taken)


def _groups_of(loader: Any, size: int | None) -> Iterator[list[Any]]:
    """Yield the indices of each batch, in groups of ``size``; whole, but for a short last one, if that is None."""
    if size is not None:
        for batch in _batches(loader):
            yield from (batch[i : i + size] for i in range(0, len(batch) - size + 1, size))
        return
    shortest, last = 0, None
    for batch in _batches(loader):
        if last is not None:
            yield last
            shortest = min(shortest or len(last), len(last))
        last = batch
    if last is not None and len(last) >= shortest:
        yield last


def _batches(loader: Any) -> Iterator[list[Any]]:
    """Yield the indices of each batch; of a batch sampler without an end, as many as the dataset has samples for."""
    groups = _groups(loader)
    endless, left = _length(groups) is None, _length(loader.dataset) or _ENDLESS
    for count, group in enumerate(islice(groups, _most(groups, loader))):
        batch = list(group)
        left -= len(batch)
        if endless and count > 0 and left < 0:
            return
        yield batch


def _most(sampler: Any, loader: Any) -> int:
    """Return how much to take of a sampler, which may be endless."""
    known = [length for owner in (sampler, loader.dataset) if (length := _length(owner)) is not None]
    return min(known, default=_ENDLESS)


def _length(owner: Any) -> int | None:
    """Return how long a sampler or a dataset is, None if it does not say."""
    try:
        return len(owner)
    except (TypeError, NotImplementedError):
        return None


def _dataset_collates(loader: Any) -> bool:
    """Return whether the dataset is asked for all indices of a batch at once, without a batch sampler."""
    return getattr(loader, "batch_sampler", loader) is None


def _of_batches(loader: Any) -> bool:
    """Return whether an item of the dataset is a whole batch already."""
    plain = (RandomSampler, SequentialSampler, DistributedSampler)
    return _dataset_collates(loader) and isinstance(getattr(loader, "sampler", None), plain)
