"""How the batches of a loader, or of several together, are cut into units: learned once, and asked of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_gradconf.batches.loaders import Feed, batch_size, learn_placement, loaders_in, samples_at
from lightning_gradconf.batches.placement import WHOLE, Placement, assume, count, part


class Layout:
    """Where the samples lie in the batches of loaders; reads items, so it is made within ``Feed.isolated``.

    Args:
        feed: What the run trains on.
        loaders: The loader, or loaders in the structure of their batches.

    Attributes:
        reason: Why the samples of a batch do not lie side by side; None if they do.
    """

    def __init__(self, feed: Feed, loaders: Any) -> None:
        every = loaders_in(loaders)
        # A batch comes from all loaders together, or from any one of them.
        apart = feed.one_by_one and loaders is feed.loaders and len(every) > 1
        self._structures = list(every.values()) if apart else [loaders]
        self._placements: list[Placement | None] = []
        self.reason: str | None = None
        for structure in self._structures:
            try:
                self._placements.append(learn_placement(structure, feed.prepare))
            except Exception as error:  # in what the user's code makes of three items, or of what is learned from them
                self._placements.append(None)
                self.reason = str(error).partition("\n")[0]

    def placed(self, batch: Any) -> tuple[dict[str, Any], Placement, dict[str, int]]:
        """Return the loaders of a batch, where its samples lie, and how many each part has.

        A batch that is not of the structure that was learned, because its loader changes what ``collate_fn`` returns,
        is one of an unknown loader if that gives it the loader's batch size.

        Raises:
            ValueError: The samples cannot be told.
        """
        if self.reason is not None:
            raise ValueError(self.reason)
        errors = []
        for learned in (True, False):
            for structure, placement in zip(self._structures, self._placements, strict=True):
                loaders = loaders_in(structure)
                try:
                    if learned and placement is not None:
                        return loaders, placement, count(batch, placement, tuple(loaders))
                    assumed = _assumed(batch, loaders)
                    counts = count(batch, assumed, tuple(loaders))
                    if placement is None or all(batch_size(loaders[path]) == size for path, size in counts.items()):
                        return loaders, assumed, counts
                except ValueError as error:
                    errors.append(error)
        raise errors[0]

    def counts(self, batch: Any, batch_idx: int) -> dict[str, int]:
        """Return how many samples each part of a batch has, without those that cannot be told."""
        try:
            return self.placed(batch)[2]
        except ValueError:
            if len(self._structures) > 1:
                return {}
            sizes = {path: samples_at(loader, batch_idx) for path, loader in loaders_in(self._structures[0]).items()}
            return {path: size for path, size in sizes.items() if size is not None}


def _assumed(batch: Any, loaders: Mapping[str, Any]) -> Placement:
    found: Placement = {}
    for path, loader in loaders.items():
        own = batch if path == WHOLE else part(batch, path)
        if own is not None:
            found |= assume(own, batch_size(loader), path)
    return found
