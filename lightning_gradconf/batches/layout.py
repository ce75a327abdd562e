"""How the batches of a loader, or of several together, are cut into units: learned once, and used on every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Number
from typing import Any

from torch import Tensor

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.loaders import (
    batch_size,
    collate,
    combined,
    examples,
    loaders_in,
    samples_at,
    seed_everything,
    shares,
)
from lightning_gradconf.batches.samples import ENTRIES, WHOLE, SamplePlaces, assume, count, cut, part
from lightning_gradconf.batches.structure import children, is_array, same
from lightning_gradconf.batches.units import Origin, Unit, copy_of

_ITEMS = 3


class Layout:
    """Where the samples lie in the batches of loaders; reads items, so it is made within ``Feed.isolated``.

    Args:
        feed: What the run trains on.
        loaders: The loader, or loaders in the structure of their batches.
        earlier: The layout of the loaders that these have taken the place of, with whose batches theirs are compared.

    Attributes:
        loaders: These loaders.
        reason: Why the samples of a batch do not lie side by side; None if they do.
    """

    def __init__(self, feed: Feed, loaders: Any, earlier: Layout | None = None) -> None:
        self.loaders, self._by_path = loaders, loaders_in(loaders)
        self._learned: SamplePlaces | None = None
        self._largest: dict[str, int] = {} if earlier is None else earlier._largest
        self.reason: str | None = None
        if loaders is feed.loaders and feed.iterator is not None:
            return  # nothing may be read, so samples are taken to lie on dimension 0, as in a stream
        try:
            self._learned = learn_places(loaders, feed.prepare)
        except Exception as error:  # in what the user's code makes of three items, or of what is learned from them
            self.reason = str(error).partition("\n")[0]

    def placed(self, batch: Any) -> tuple[SamplePlaces, dict[str, int]]:
        """Return where the samples of a batch lie, and how many each part has.

        The loader may replace what ``collate_fn`` returns, so that a batch has another structure than was learned. Then
        the samples are taken to lie on dimension 0, provided that this gives the batch size of the loader.

        Raises:
            ValueError: The samples cannot be told.
        """
        if self.reason is not None:
            raise ValueError(self.reason)
        if self._learned is None:
            return self._assumed(batch)
        try:
            return self._learned, count(batch, self._learned, tuple(self._by_path))
        except ValueError:
            with suppress(ValueError):
                places, counts = self._assumed(batch)
                if all(batch_size(self._by_path[path]) == size for path, size in counts.items()):
                    return places, counts
            raise

    def units(self, batch: Any, batch_idx: int, unit_size: int, num_units: int | None = None) -> list[Unit]:
        """Return the units that a batch is cut into, of ``unit_size`` samples of the loader with the smallest batches.

        Args:
            batch: The batch.
            batch_idx: Its index.
            unit_size: Samples in a unit.
            num_units: Take only the first so many units; None takes all that are full.

        Raises:
            ValueError: The samples cannot be told.
        """
        places, counts = self.placed(batch)
        sizes = shares(self._by_path, unit_size, counts)
        first, least = next(iter(sizes.values())), min(sizes.values())
        return [
            Unit(own, Origin(tuple(range(i * first, (i + 1) * first)), batch_idx), least)
            for i, own in enumerate(cut(batch, places, sizes, num_units))
        ]

    def compare(self, batch: Any, batch_idx: int) -> int:
        """Return -1 if a batch is shorter than an earlier one, 1 if it is larger than all of them, and 0 otherwise."""
        sizes = self._counts(batch, batch_idx)
        if any(size < self._largest.get(path, 0) for path, size in sizes.items()):
            return -1
        is_larger = any(size > self._largest.get(path, size) for path, size in sizes.items())
        self._largest |= sizes
        return int(is_larger)

    def whole(self, batch: Any, batch_idx: int) -> Unit:
        """Return a batch as one unit: a copy, whose samples need not be told."""
        sizes = self._counts(batch, batch_idx)
        first = next(iter(sizes.values()), 0)
        return Unit(copy_of(batch), Origin(tuple(range(first)), batch_idx), min(sizes.values(), default=None))

    def _counts(self, batch: Any, batch_idx: int) -> dict[str, int]:
        """Return how many samples each part of a batch has, without those that cannot be told."""
        try:
            return self.placed(batch)[1]
        except ValueError:
            sizes = {path: samples_at(loader, batch_idx) for path, loader in self._by_path.items()}
            return {path: size for path, size in sizes.items() if size is not None}

    def _assumed(self, batch: Any) -> tuple[SamplePlaces, dict[str, int]]:
        """Return what `placed` does, for loaders that nothing is known about."""
        found: SamplePlaces = {}
        for path, loader in self._by_path.items():
            own = part(batch, path)
            if own is not None:
                found |= assume(own, batch_size(loader), path)
        return found, count(batch, found, tuple(self._by_path))


def learn_places(loaders: Any, prepare: Callable[[Any], Any]) -> SamplePlaces | None:
    """Return where samples lie in the batches of loaders, None if their items cannot be read or are too few.

    Raises:
        Exception: Samples do not lie side by side.
    """
    flat = list(loaders_in(loaders).values())
    try:
        items = [examples(loader) for loader in flat]

        def collated(some: Sequence[int], seed: int) -> Any:
            seed_everything([seed])
            parts = [collate(loader, [own[i] for i in some]) for loader, own in zip(flat, items, strict=True)]
            return prepare(combined(loaders, iter(parts)))

        collated([2], 0)
    except Exception:  # of the user's dataset, which may work in its workers alone
        return None
    return learn(collated)


def learn(collated: Callable[[Sequence[int], int], Any]) -> SamplePlaces:
    """Return where samples lie in a batch, from batches of one, two and three items.

    A leaf that does not grow with the number of items is shared if it is the same for each number, and so is one that
    ``collate_fn`` draws at random. A unit that is cut out of three items must be what ``collate_fn`` makes of one of
    them alone, but for padding and random numbers. So neither a row of nodes nor the index of an image in its batch
    can pass for samples, whatever the sizes happen to be.

    Args:
        collated: ``collated(items, seed)`` is the batch of some of three items, their numbers given, collated from a
            random state that depends on the seed alone.

    Raises:
        ValueError: Samples do not lie side by side.

    >>> import torch
    >>> items = [(torch.randn(5), "a"), (torch.randn(5), "b"), (torch.randn(5), "c")]
    >>> learn(lambda some, seed: {"x": torch.stack([items[i][0] for i in some], 1), "id": [items[i][1] for i in some]})
    {"batch['x']": 1, "batch['id']": 'entries'}
    """
    alone = [collated([i], 0) for i in range(_ITEMS)]
    three = collated(range(_ITEMS), 0)
    places: SamplePlaces = {}
    drawn: set[str] = set()
    _grow(WHOLE, (alone[0], collated(range(2), 0), three), collated(range(_ITEMS), 1), places, drawn)
    if all(where is None for where in places.values()):
        raise ValueError("nothing in the batch grows with the number of items")
    for unit in cut(three, places, {WHOLE: 1}):
        if not any(_agree(unit, other, drawn) for other in alone):
            raise ValueError("a sample cut out of a batch is another one than collate_fn makes of its item alone")
    return places


def _grow(path: str, nodes: tuple[Any, Any, Any], again: Any, places: SamplePlaces, drawn: set[str]) -> None:
    """Compare what one, two and three items make of a part of the batch, and note where it grows.

    ``again`` is what the three make of it from another random state.
    """
    first = nodes[0]
    if len({type(node) for node in nodes}) > 1:
        raise ValueError(f"{path} has another type for one item than for several")
    if isinstance(first, Tensor) or is_array(first):
        shapes = [tuple(node.shape) for node in nodes]
        growing = []
        if len({len(shape) for shape in shapes}) == 1:
            growing = [d for d in range(len(shapes[0])) if [shape[d] for shape in shapes] == [1, 2, 3]]
        if len(growing) == 1:
            places[path] = growing[0]
            if not same(nodes[2], again):
                drawn.add(path)
            return
        if growing or len(set(shapes)) > 1:
            words = ", ".join(map(str, shapes))
            raise ValueError(f"{path} has the shapes {words} for one, two and three items")
    elif isinstance(first, list | tuple) and [len(node) for node in nodes] == [1, 2, 3]:
        places[path] = ENTRIES
        if not same(nodes[2], again):
            drawn.add(path)
        return
    elif entries := children(first):
        keys = [[key for key, _ in children(node)] for node in (*nodes, again)]
        if any(other != keys[0] for other in keys):
            raise ValueError(f"{path} has other entries for one item than for several")
        columns = zip(*([child for _, child in children(node)] for node in (*nodes, again)), strict=True)
        for (key, _), (*column, other) in zip(entries, columns, strict=True):
            _grow(path + key, (column[0], column[1], column[2]), other, places, drawn)
        return
    places[path] = None
    if (isinstance(first, Tensor | Number) or is_array(first)) and not same(nodes[2], again):
        drawn.add(path)
        return
    if not (same(nodes[0], nodes[1]) and same(nodes[1], nodes[2])):
        if first is None or isinstance(first, Tensor | Number | str | list | tuple | Mapping) or is_array(first):
            raise ValueError(f"{path} differs between batches of one, two and three items")
        raise ValueError(f"samples cannot be told apart in {path}, an object of type {type(first).__name__}")


def _agree(a: Any, b: Any, drawn: set[str], path: str = WHOLE) -> bool:
    """Return whether a unit cut out of a batch is one collated alone, but for padding and random numbers."""
    if path in drawn:
        return True
    if isinstance(a, Tensor) or is_array(a):
        return a.shape != b.shape or same(a, b)
    entries, others = children(a), children(b)
    if entries and len(entries) == len(others):
        pairs = zip(entries, others, strict=True)
        return all(_agree(x, y, drawn, path + key) for (key, x), (_, y) in pairs)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):  # padded, or empty
        return True
    return same(a, b)
