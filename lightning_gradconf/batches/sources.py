"""The units that a run compares: of the batches in training, drawn from the dataset, or of the user's own loader."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_gradconf.batches.draws import draw, first_of
from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.layout import Layout
from lightning_gradconf.batches.loaders import has_items, loaders_in, seed_everything
from lightning_gradconf.batches.recent_units import RecentUnits
from lightning_gradconf.batches.units import Unit, shapes_of


class Source:
    """Where one run takes its units from; the arguments are those of the callback.

    Args:
        kind: ``source=`` of the callback.
        unit_size: Samples in a unit, or "batch".
        num_units: How many units a measurement compares at most.
        seed: Of the draws.
        over_batches: Whether units of the current batches are gathered over several of them.
        fixed_indices: The indices of an earlier fixed draw, for each unit; None draws them.

    Attributes:
        remark: What to tell the user about units that are drawn although those of the batch in training were asked
            for; None if there is nothing to tell.
    """

    def __init__(
        self,
        kind: str | DataLoader[Any],
        unit_size: int | str,
        num_units: int,
        seed: int,
        over_batches: bool,
        fixed_indices: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        self._kind = _with_own_workers(kind) if isinstance(kind, DataLoader) else kind
        self._unit_size, self._num_units, self._seed = unit_size, num_units, seed
        self._recent = RecentUnits(unit_size, num_units, over_batches or unit_size == "batch")
        self._layout: Layout | None = None  # of the user's own loader
        self._last_cut: Unit | None = None
        self._error: Exception | None = None
        self._fixed: list[Unit] | None = None
        self._fixed_indices = fixed_indices
        self._alone = False  # whether units are collated alone that were to be cut out of batches
        self.remark: str | None = None

    @property
    def seen(self) -> int:
        """How many units of the batches in training are at hand."""
        return len(self._recent)

    @property
    def _cuts_current(self) -> bool:
        return self._kind == "current" and not self._alone

    def see(
        self, feed: Feed, batch: Any, batch_idx: int, due: bool, left: int | None = None, last: bool = False
    ) -> bool:
        """Keep copies of the units in a batch that is about to be trained on, which training_step may write to.

        Args:
            feed: What the run trains on.
            batch: The batch.
            batch_idx: Its index.
            due: Whether it may be measured now.
            left: How many steps at least are left before the next one that is due, None if that cannot be told.
            last: Whether the batch is the last of its epoch.

        Returns:
            Whether a unit is kept for a later measurement that would not be kept in a longer interval.
        """
        if not self._cuts_current:
            return False
        is_first = not self.seen
        try:
            kept = self._recent.keep(feed, batch, batch_idx, due, left, last)
        except ValueError as error:
            if not self.collate_instead(feed, str(error)):
                self._error = error  # of this rank alone, to be raised where all ranks hear of it
            return False
        except Exception as error:
            self._error = error
            return False
        if is_first and self.seen == 1 and self._unit_size == 1:
            self.collate_instead(feed, "the first batch has one sample, and it takes two to disagree")
        return kept

    def ready(self, n: int | None) -> bool:
        """Return whether there are n units; before n is known, as many as there can be, which then decides on n."""
        return not self._cuts_current or self._error is not None or self._recent.are_enough(n)

    def units(self, feed: Feed, wanted: int, step: int) -> list[Unit]:
        """Return the units of this rank to be measured at a step: ``wanted``, or all that there are."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._cuts_current:
            found = self._recent.last(wanted)
            self._last_cut = found[-1] if found else None
            return found
        if isinstance(self._kind, DataLoader):
            return self._read(feed, self._kind, wanted, step)
        if self._kind != "fixed":
            return self._collated(feed, wanted, step)
        if self._fixed is None:
            seed = (self._seed, feed.rank)
            self._fixed = draw(feed, wanted, self._unit_size, seed, self._fixed_indices)
        return self._fixed

    @property
    def fixed_indices(self) -> Sequence[Sequence[Any]] | None:
        """The indices of the fixed draw, for each unit; None if there is none, or if no checkpoint could hold them."""
        if self._fixed is None:
            return self._fixed_indices
        indices = [[_plain(index) for index in unit.origin.samples] for unit in self._fixed]
        return indices if _can_be_loaded(indices) else None

    def reads(self, feed: Feed) -> Any:
        """Return the loaders whose items `units` reads, none where it has the batches in training."""
        return [] if self._cuts_current or self._must_not_read(feed) else self._loaders(feed)

    def pads(self, feed: Feed, step: int) -> bool:
        """Return whether the last units that were cut out of a batch have other shapes than units collated alone."""
        if self._last_cut is None or not self._can_collate(feed):
            return False
        shapes = shapes_of(self._last_cut.batch)
        try:
            with feed.isolated(self._loaders(feed)):
                return any(shapes_of(unit.batch) != shapes for unit in self._collated(feed, self._num_units, step))
        except Exception:  # of the user's dataset
            return False

    def collate_instead(self, feed: Feed, reason: str) -> bool:
        """Take units that are each collated from items of the dataset from now on.

        Args:
            feed: What the run trains on.
            reason: What is wrong with units that are cut out of batches.

        Returns:
            Whether that is possible.
        """
        if not self._can_collate(feed):
            return False
        self._alone, (reason, *_) = True, reason.splitlines() or [""]
        if self._kind == "current":  # a loader of the user's gives the same samples either way
            self.remark = (
                "units cannot be cut out of the batches of training, so they are drawn as with source='fresh' "
                f"({reason}). Pass source='fresh' to choose this."
            )
        return True

    def cut_again(self) -> None:
        """Take back `collate_instead`, which has not helped."""
        self._alone, self.remark = False, None

    def _loaders(self, feed: Feed) -> Any:
        """Return the user's own loader, or else those of the training."""
        return self._kind if isinstance(self._kind, DataLoader) else feed.loaders

    def _must_not_read(self, feed: Feed) -> bool:
        """Return whether reading items would advance an iterator of the training, for good."""
        return not isinstance(self._kind, DataLoader) and feed.iterator is not None

    def _can_collate(self, feed: Feed) -> bool:
        """Return whether units are cut out of batches now, and could be collated alone."""
        if self._unit_size == "batch" or self._alone or self._kind in ("fresh", "fixed") or self._must_not_read(feed):
            return False
        return all(map(has_items, loaders_in(self._loaders(feed)).values()))

    def _collated(self, feed: Feed, wanted: int, step: int) -> list[Unit]:
        seed = (self._seed, step, feed.rank)
        if isinstance(self._kind, DataLoader):
            return first_of(feed, self._kind, wanted, self._unit_size, seed)
        return draw(feed, wanted, self._unit_size, seed)

    def _read(self, feed: Feed, loader: DataLoader[Any], wanted: int, step: int) -> list[Unit]:
        """Return the first units of a loader of the user's, started anew."""
        if self._layout is None:
            self._layout = Layout(feed, loader)
        if self._layout.reason is not None:
            self.collate_instead(feed, self._layout.reason)
        if self._alone:
            return self._collated(feed, wanted, step)
        seed_everything((self._seed, step, feed.rank))
        found: list[Unit] = []
        for batch_idx, batch in enumerate(loader):
            batch = feed.prepare(batch)
            if self._unit_size != "batch":
                found += self._layout.units(batch, batch_idx, int(self._unit_size), wanted - len(found))
            elif self._layout.compare(batch, batch_idx) >= 0:
                found.append(self._layout.whole(batch, batch_idx))
            if len(found) == wanted:
                break
        self._last_cut = found[-1] if found else None
        return found


def _with_own_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader that reads as another does, but with other persistent workers.

    The Trainer may validate with the other one, and the random numbers of its workers cannot be put back.
    """
    if not loader.persistent_workers:  # every iterator has its own
        return loader
    own = copy(loader)
    own._iterator = None
    return own


def _plain(index: Any) -> Any:
    """Return an index with the scalars of NumPy in it, as samplers give them, as those of Python."""
    if type(index) in (list, tuple):
        return type(index)(map(_plain, index))
    return index.item() if isinstance(index, np.generic) else index


def _can_be_loaded(value: Any) -> bool:
    """Return whether a checkpoint with this value can be loaded as Lightning does, with ``weights_only=True``."""
    file = BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # an index may be any object
        return False
    return True
