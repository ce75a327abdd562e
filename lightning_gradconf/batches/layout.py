"""How the batches of a loader, or of several together, are cut into units: learned once, and asked of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lightning_gradconf.batches.loaders import Feed, batch_size, learn_places, loaders_in, samples_at, shares
from lightning_gradconf.batches.samples import WHOLE, SamplePlaces, assume, count, part


class Layout:
    """Where the samples lie in the batches of loaders; reads items, so it is made within ``Feed.isolated``.

    Args:
        feed: What the run trains on.
        loaders: The loader, or loaders in the structure of their batches.

    Attributes:
        reason: Why the samples of a batch do not lie side by side; None if they do.
    """

    def __init__(self, feed: Feed, loaders: Any) -> None:
        self._loaders = loaders_in(loaders)
        self._learned: SamplePlaces | None = None
        self.reason: str | None = None
        try:
            self._learned = learn_places(loaders, feed.prepare)
        except Exception as error:  # in what the user's code makes of three items, or of what is learned from them
            self.reason = str(error).partition("\n")[0]

    def placed(self, batch: Any) -> tuple[SamplePlaces, dict[str, int]]:
        """Return where the samples of a batch lie, and how many each part has.

        A batch that is not of the structure that was learned, because its loader changes what ``collate_fn`` returns,
        is one of an unknown loader if that gives it the loader's batch size.

        Raises:
            ValueError: The samples cannot be told.
        """
        if self.reason is not None:
            raise ValueError(self.reason)
        if self._learned is None:
            places = self._assumed(batch)
            return places, count(batch, places, tuple(self._loaders))
        try:
            return self._learned, count(batch, self._learned, tuple(self._loaders))
        except ValueError as error:
            with suppress(ValueError):
                places = self._assumed(batch)
                counts = count(batch, places, tuple(self._loaders))
                if all(batch_size(self._loaders[path]) == size for path, size in counts.items()):
                    return places, counts
            raise error

    def shares(self, unit_size: int, counts: Mapping[str, int]) -> dict[str, int]:
        """Return how many samples of each part a unit has, if a batch has as many as counted."""
        return shares(self._loaders, unit_size, counts)

    def counts(self, batch: Any, batch_idx: int) -> dict[str, int]:
        """Return how many samples each part of a batch has, without those that cannot be told."""
        try:
            return self.placed(batch)[1]
        except ValueError:
            sizes = {path: samples_at(loader, batch_idx) for path, loader in self._loaders.items()}
            return {path: size for path, size in sizes.items() if size is not None}

    def _assumed(self, batch: Any) -> SamplePlaces:
        found: SamplePlaces = {}
        for path, loader in self._loaders.items():
            own = batch if path == WHOLE else part(batch, path)
            if own is not None:
                found |= assume(own, batch_size(loader), path)
        return found
