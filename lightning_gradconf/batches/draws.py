"""Units that are drawn from a dataset, or read from the beginning of a loader, and collated alone.

Nothing here touches the training loader (`loaders` says why). Draws and collations run within ``Feed.isolated``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.loaders import (
    MORE,
    collate,
    combined,
    draw_indices,
    first_indices,
    has_items,
    loaders_in,
    read_items,
    seed_everything,
    shares,
)
from lightning_gradconf.batches.samples import WHOLE
from lightning_gradconf.batches.units import Origin, Unit, copy_of


def draw(
    feed: Feed,
    num_units: int,
    unit_size: int | str,
    seed: Sequence[int],
    indices: Sequence[Sequence[Any]] | None = None,
) -> list[Unit]:
    """Return units of samples drawn from the training dataset without replacement, each collated alone.

    Args:
        feed: What the run trains on.
        num_units: How many units; fewer if the dataset is smaller.
        unit_size: Samples in a unit; ``"batch"`` is as many as in a batch of the loader.
        seed: Numbers that determine the draw; it depends on nothing else.
        indices: Those of an earlier draw from the only loader, for each unit; None draws them.

    Raises:
        ValueError: A loader has no dataset that can be indexed, or keeps an iterator that this would advance.
    """
    seed_everything(seed)
    loaders = loaders_in(feed.loaders)
    for loader in loaders.values():
        if not has_items(loader):
            raise ValueError(
                f"source='fresh' and 'fixed' draw from the dataset of a DataLoader, one item at a time, found "
                f"{type(loader).__name__} over {type(getattr(loader, 'dataset', None)).__name__}; use "
                "source='current', or pass a DataLoader as source"
            )
    if feed.iterator is not None:
        raise ValueError(
            f"{feed.iterator}; source='fresh' and 'fixed' read items out of turn, which would advance it, and it "
            "cannot be turned back; use source='current'"
        )
    sizes = dict.fromkeys(loaders, None) if unit_size == "batch" else shares(loaders, int(unit_size))
    groups: dict[str, Iterable[Sequence[Any]]] = {}
    for path, loader in loaders.items():
        population = None
        if feed.overfitted is not None:  # these batches are all that is trained on
            population = [index for batch in first_indices(loader, None, feed.overfitted) for index in batch]
        drawn = draw_indices(loader, sizes[path], num_units, population)
        groups[path] = chain(list(islice(drawn, num_units)), drawn)  # drawn before any item is read
    if indices is not None and len(loaders) == 1:
        groups = dict.fromkeys(loaders, indices)
    return collated(feed, feed.loaders, groups, num_units, whole=unit_size == "batch")


def first_of(feed: Feed, loader: Any, num_units: int, unit_size: int | str, seed: Sequence[int]) -> list[Unit]:
    """Return units of the first items of a loader of the user's, each collated alone."""
    seed_everything(seed)
    size = None if unit_size == "batch" else int(unit_size)
    groups = first_indices(loader, size, num_units + MORE)
    return collated(feed, loader, {WHOLE: groups}, num_units, whole=size is None)


def collated(
    feed: Feed, structure: Any, groups: Mapping[str, Iterable[Sequence[Any]]], num_units: int, whole: bool
) -> list[Unit]:
    """Return one unit for each group of indices, made as the loaders make a batch.

    Args:
        feed: What the run trains on.
        structure: The loader, or several in the structure of their batches.
        groups: Groups of indices for each loader, as of `loaders_in`; the loader with the fewest ends it.
        num_units: How many units at most.
        whole: Whether a group is a batch of the loader, which may lack some of its items.
    """
    loaders = loaders_in(structure)
    readings = [_read(loader, groups[path], whole) for path, loader in loaders.items()]
    found = []
    for of_unit in islice(zip(*readings, strict=False), num_units):
        parts = [collate(loader, items) for loader, (_, items) in zip(loaders.values(), of_unit, strict=True)]
        batch = copy_of(feed.prepare(combined(structure, iter(parts))))
        indices = [group for group, _ in of_unit]
        found.append(Unit(batch, Origin(tuple(indices[0])), min(map(len, indices))))
    return found


def _read(loader: Any, groups: Iterable[Sequence[Any]], whole: bool) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
    """Yield groups of indices with their items, and those that lack items only when there are no others.

    A dataset may return None for an item that it cannot read, which ``collate_fn`` leaves out: a unit of it would have
    too few samples or none. A whole batch may lack some, as in training.
    """
    lacking, any_item = [], False
    for group in groups:
        items = read_items(loader, group)
        missing = [item is None for item in items]
        any_item = any_item or not all(missing)
        if all(missing) or (any(missing) and not whole):
            lacking.append((group, items))
        else:
            yield group, items
    for group, items in lacking:
        if not any_item or any(item is not None for item in items):  # where all are None, they are no errors
            yield group, items
