"""What a run trains on, as units are made of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_gradconf.batches.iterators import iterator_in
from lightning_gradconf.batches.loaders import loaders_in, samples_at
from lightning_gradconf.batches.units import num_samples


@dataclass(frozen=True)
class Feed:
    """What a run trains on.

    Attributes:
        loaders: The training loader, or loaders nested in the lists and dictionaries that their batches come in.
        prepare: What makes of a collated batch the one that the training step gets: on the device, in the precision of
            the run, after the user's hooks.
        isolated: ``isolated(loaders)`` is a context that puts back what reading items changes.
        batches: How many there are in an epoch.
        rank: The number of this process.
        overfitted: How many batches, the first of the loader, are all that is trained on; None if it is all of them.
    """

    loaders: Any
    prepare: Callable[[Any], Any] = lambda batch: batch
    isolated: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    batches: float = float("inf")
    rank: int = 0
    overfitted: int | None = None

    @cached_property
    def iterator(self) -> str | None:
        """Where a loader keeps an iterator that reading its items would advance, in words; None if none does."""
        return iterator_in(self.loaders)

    def samples_of(self, batch: Any, batch_idx: int) -> int | None:
        """Return how many samples a batch in training has, None if that cannot be told."""
        sizes = [samples_at(loader, batch_idx) for loader in loaders_in(self.loaders).values()]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes):
            return min(known)
        try:
            return num_samples(batch)
        except ValueError:
            return None
