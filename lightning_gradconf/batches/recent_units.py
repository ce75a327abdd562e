"""Units of the batches in training: copies of the most recent ones, but of no batch that no measurement can need."""

from __future__ import annotations

from collections import deque
from typing import Any

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.layout import Layout
from lightning_gradconf.batches.units import Unit


class RecentUnits:
    """The last units in the batches of one run.

    Args:
        unit_size: Samples in a unit, or "batch".
        num_units: How many units a measurement compares at most.
        over_batches: Whether units are gathered over several batches; otherwise all are of one.
    """

    def __init__(self, unit_size: int | str, num_units: int, over_batches: bool) -> None:
        self._unit_size, self._num_units, self._over_batches = unit_size, num_units, over_batches
        self._units: deque[Unit] = deque()
        self._layout: Layout | None = None
        self._regular = True  # whether no batch but the last of an epoch was shorter than those before

    def __len__(self) -> int:
        return len(self._units)

    def last(self, wanted: int) -> list[Unit]:
        """Return the last units, as many as wanted, or all that there are."""
        return list(self._units)[-wanted:]

    def are_enough(self, n: int | None) -> bool:
        """Return whether there are n units; before n is known, as many as there can be, which then decides on n."""
        if n is not None:
            return len(self) >= n
        return not self._over_batches or len(self) == self._units.maxlen

    def keep(self, feed: Feed, batch: Any, batch_idx: int, due: bool, left: int | None, last: bool) -> bool:
        """Keep copies of the units in a batch, and return whether a longer interval would save that.

        The arguments are those of `Source.see`.

        Raises:
            ValueError: The samples cannot be told.
        """
        if not due and not self._over_batches:
            return False
        if self._layout is None or self._layout.loaders is not feed.loaders:  # an epoch may have loaders of its own
            with feed.isolated([] if feed.iterator is not None else feed.loaders):
                self._layout = Layout(feed, feed.loaders, self._layout)
        if self._unit_size == "batch":
            compared = self._layout.compare(batch, batch_idx)
            if compared < 0 and not (last and batch_idx > 0):
                self._regular = False
            if compared > 0:  # all batches before were short
                self._units.clear()
            is_needed = compared >= 0 and (due or self._is_near(left))
            found = [self._layout.whole(batch, batch_idx)] if is_needed else []
        else:
            num_units = None if self._over_batches else self._num_units
            found = self._layout.units(batch, batch_idx, int(self._unit_size), num_units)
        if not self._over_batches:
            self._units.clear()
        elif self._units.maxlen is None and found:
            per_epoch = len(found) * feed.batches
            self._units = deque(maxlen=int(min(self._num_units, per_epoch)))
        self._units.extend(found)
        return bool(found) and not due and left is not None and self._regular

    def _is_near(self, left: int | None) -> bool:
        """Return whether a batch may become a unit of the next measurement, which is at least ``left`` steps away.

        Any 2n + 1 batches in a row hold n units if only the last batch of an epoch can be too short. Once another
        batch was too short, any batch may be needed, however far away the measurement is.
        """
        n = self._units.maxlen
        return left is None or n is None or not self._regular or left <= 2 * n
