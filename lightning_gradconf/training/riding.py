"""Riding on the backward pass of a training step: when it can be done, and what was measured so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_gradconf.batches.units import copy_of, num_samples, split
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.ghost.factors import Factors
from lightning_gradconf.gram.ghost.ride import Ride, board, root_of
from lightning_gradconf.gram.measurement_mode import MeasuredLayers
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import Objective, objective
from lightning_gradconf.gram.ranks.data_parallel import gram_of_factors
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import in_words

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_MAX_MISSED = 3
log = logging.getLogger("lightning_gradconf")


class Rider:
    """Decides at each step that is measured whether to ride or to take a pass of its own.

    A batch size is ridden on only after a batch of this size was measured in a pass of its own, all units at once, and
    the training step on that same batch was seen to have the graph of that pass. On several ranks all of them ride, or
    none.

    Args:
        ranks: That measure.
        memory: What measurements in passes of their own have found out.
        unit_size: Samples in a unit.
        parameters: Patterns of names.
        refused: Why this run cannot be ridden on, if that is known already.
    """

    def __init__(
        self, ranks: Ranks, memory: ghost.Memory, unit_size: int, parameters: Any, refused: str | None
    ) -> None:
        self.ranks, self.memory = ranks, memory
        self.unit_size, self.parameters = unit_size, parameters
        self._sizes: set[int] = set()  # of the batches that can be ridden on
        self._size: int | None = None  # of the batch at hand, while its backward pass is waited for
        self._first: int | None = None  # how many units to measure in it; None is only to see whether it could be done
        self._ride: Ride | None = None
        self._reason: str | None = None  # not the error, which would keep the graph
        self._missed = 0
        self._off = False
        if refused is not None:
            self._give_up(refused)

    def try_out(self, target: Objective, batch: Any, measured: int) -> None:
        """Measure all units of the batch in one pass, unless that was just done, and watch its training step.

        To be called where the user's code leaves no trace, with the number of units measured in one pass just now.
        """
        if self._off:
            return
        try:
            size = num_samples(batch)
            if size % self.unit_size:
                raise ValueError(f"a batch of {size} samples is no whole number of units")
            if measured * self.unit_size != size:
                with MeasuredLayers(running_statistics=self.unit_size == 1, dropout=False), untouched(target.module):
                    ghost.unit_grams(target, split(copy_of(batch), self.unit_size), self.unit_size, self.memory)
            self._size, self._first = size, None
        except Exception as error:
            self._give_up(in_words(error))

    def expect(self, batch: Any, n: int | None) -> bool:
        """Whether the coming backward pass can be ridden on to measure n units of the batch."""
        self.leave()
        if n is None:
            return False
        size = self._size_to_ride_on(batch, n)
        if not self.ranks.minimum(size is not None):
            return False
        self._size, self._first = size, n
        return True

    def _size_to_ride_on(self, batch: Any, n: int) -> int | None:
        """How many samples the batch has, None if it is not for this rank to ride on."""
        if self._off or not self._sizes:
            return None
        try:
            size = num_samples(batch)
        except ValueError:
            return None
        return size if size in self._sizes and size // self.unit_size >= n else None

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Get on, if this is the backward pass that is waited for."""
        automatic = module.automatic_optimization
        if self._size is None or self._ride is not None or (automatic and self._reason is not None):
            return  # of the calls of a closure only the first sees the weights before the step
        try:
            divided_by = trainer.accumulate_grad_batches if automatic else None
            root = root_of(loss, divided_by, getattr(trainer.precision_plugin, "scaler", None) is not None)
            parameters = objective(module, lambda *_: loss, self.parameters).parameters
            first = self._first or self._size // self.unit_size
            keep = self.ranks.size > 1
            self._ride = board(root, parameters, self._size, self.unit_size, first, self.memory, keep)
            if self._first is not None:
                self._ride.listen(root)
        except Exception as error:
            self._reason = in_words(error)

    def on_after_backward(self) -> None:
        """Get off, so that nothing of the graph is kept."""
        if self._ride is not None:
            self._ride.leave()

    def result(self) -> ghost.Grams | None:
        """Return what was measured in the step that has ended on all ranks, None if nothing was."""
        size, first, ride, reason = self._size, self._first, self._ride, self._reason
        self.leave()
        if size is None:
            return None
        grams = None
        if first is not None:
            try:
                grams = self._grams(ride, first, reason)
            except Exception as error:
                reason = in_words(error)
        if first is None:
            if ride is not None:
                self._sizes.add(size)
            elif reason is not None:
                self._give_up(reason)
        elif grams is not None:
            self._missed = 0
        elif reason is not None:
            self._sizes.discard(size)
            self._missed += 1
            if self._missed == _MAX_MISSED:
                self._give_up(reason)
        return grams

    def _grams(self, ride: Ride | None, n: int, reason: str | None) -> ghost.Grams | None:
        if self.ranks.size == 1:
            return None if ride is None else ride.grams()

        def factors() -> Factors:
            if ride is None:
                raise RuntimeError(reason or "the step had no backward pass")
            return ride.factors()

        found = self.ranks.on_all(factors)
        assert ride is not None
        return gram_of_factors(self.ranks, ride.parameters, found, n, self.memory.work)

    def leave(self) -> None:
        """Forget the step at hand."""
        self.on_after_backward()
        self._size = self._first = self._ride = self._reason = None

    def _give_up(self, reason: str) -> None:
        self._off = True
        log.info(
            f"reuse_backward=True cannot ride on the backward pass of this run, which takes passes of its own to be "
            f"measured: {reason}. Leave reuse_backward=False to do so without trying."
        )
