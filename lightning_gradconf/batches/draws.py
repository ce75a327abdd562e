"""Units that are drawn from a dataset, or read from the beginning of a loader, and collated alone.

Nothing here touches the training loader (`loaders` says why). Draws and collations run within ``Feed.isolated``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_gradconf.batches.loaders import (
    Feed,
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
        seed: Whatever the draw shall depend on, and nothing else does it depend on.
        indices: Those of an earlier draw from the only loader, for each unit; None draws them.

    Raises:
        ValueError: A loader has no dataset that can be indexed.
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
    sizes = dict.fromkeys(loaders, None) if unit_size == "batch" else shares(loaders, int(unit_size))
    groups: dict[str, Sequence[Sequence[Any]]] = {}
    for path, loader in loaders.items():
        population = None
        if feed.overfitted is not None:  # these batches are all that is trained on
            population = [index for batch in first_indices(loader, None, feed.overfitted) for index in batch]
        groups[path] = draw_indices(loader, sizes[path], num_units, population)
    if indices is not None and len(loaders) == 1:
        groups = dict.fromkeys(loaders, indices)
    return collated(feed.loaders, groups, feed.prepare)


def first_of(feed: Feed, loader: Any, num_units: int, unit_size: int | str, seed: Sequence[int]) -> list[Unit]:
    """Return units of the first items of a loader of the user's, each collated alone."""
    seed_everything(seed)
    size = None if unit_size == "batch" else int(unit_size)
    return collated(loader, {WHOLE: first_indices(loader, size, num_units)}, feed.prepare)


def collated(
    structure: Any, indices: Mapping[str, Sequence[Sequence[Any]]], prepare: Callable[[Any], Any]
) -> list[Unit]:
    """Return one unit for each group of indices, made as the loaders make a batch.

    Args:
        structure: The loader, or several in the structure of their batches.
        indices: Groups of indices for each loader, as of `loaders_in`; the loader with the fewest ends it.
        prepare: As of `Feed`.
    """
    loaders = loaders_in(structure)
    found = []
    for groups in zip(*(indices[path] for path in loaders), strict=False):
        parts = [
            collate(loader, read_items(loader, group)) for loader, group in zip(loaders.values(), groups, strict=True)
        ]
        batch = copy_of(prepare(combined(structure, iter(parts))))
        found.append(Unit(batch, Origin(tuple(groups[0])), min(map(len, groups))))
    return found
