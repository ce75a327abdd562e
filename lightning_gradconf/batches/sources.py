"""The units that a run compares: of the batches in training, drawn, or of a loader of the user's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lightning_gradconf.batches.draws import Unit, draw, read, size_of, state_of, units_of

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Source:
    """Where one run takes its units from; the arguments are those of the callback.

    Args:
        kind: ``source=`` of the callback.
        unit_size: Samples in a unit, or "batch".
        num_units: How many units a measurement compares at most.
        seed: Of the draws.
        over_batches: Whether units of the current batches are gathered over several of them.
        fixed_indices: The indices of an earlier fixed draw, for each unit; None draws them.
    """

    def __init__(
        self,
        kind: str | DataLoader[Any],
        unit_size: int | str,
        num_units: int,
        seed: int,
        over_batches: bool,
        fixed_indices: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._kind, self._unit_size, self._num_units, self._seed = kind, unit_size, num_units, seed
        self._over_batches = over_batches or unit_size == "batch"
        self._recent: deque[Unit] = deque()
        self._batch_size: int | None = None
        self._error: Exception | None = None
        self._fixed: list[Unit] | None = None
        self._fixed_indices = fixed_indices

    @property
    def seen(self) -> int:
        """How many units of the batches in training are at hand."""
        return len(self._recent)

    def see(self, trainer: Trainer, batch: Any, batch_idx: int, due: bool) -> None:
        """Keep copies of the units in a batch that is about to be trained on, which training_step may write to."""
        if self._kind != "current" or not (due or self._over_batches):
            return
        try:
            found = units_of(batch, batch_idx, self._unit_size, None if self._over_batches else self._num_units)
        except Exception as error:  # of this rank alone, to be raised where all ranks hear of it
            self._error = error
            return
        if self._unit_size == "batch":
            size = size_of(batch)
            self._batch_size = self._batch_size or size
            found = found if size == self._batch_size else []  # a short last batch is no unit like the others
        if not self._over_batches:
            self._recent.clear()
        elif self._recent.maxlen is None and found:
            per_epoch = len(found) * trainer.num_training_batches
            self._recent = deque(maxlen=int(min(self._num_units, per_epoch)))
        self._recent.extend(found)

    def ready(self, n: int | None) -> bool:
        """Whether there are n units; before n is known, as many as there can be, which then decides on n."""
        if self._kind != "current" or self._error is not None:
            return True
        if n is not None:
            return len(self._recent) >= n
        return not self._over_batches or len(self._recent) == self._recent.maxlen

    def units(self, trainer: Trainer, module: LightningModule, wanted: int, step: int) -> list[Unit]:
        """Return the units of this rank to be measured at a step: ``wanted``, or all that there are."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._kind == "current":
            return list(self._recent)[-wanted:]
        seed, rank = self._seed, trainer.global_rank
        if isinstance(self._kind, DataLoader):
            return read(trainer, module, self._kind, wanted, self._unit_size, (seed, step, rank))
        if self._kind == "fresh":
            return draw(trainer, module, wanted, self._unit_size, (seed, step, rank))
        if self._fixed is None:
            self._fixed = draw(trainer, module, wanted, self._unit_size, (seed, rank), self._fixed_indices)
        return self._fixed

    @property
    def fixed_indices(self) -> Sequence[Sequence[int]] | None:
        """The indices of the fixed draw, for each unit; None if there is none, or they are not known."""
        if self._fixed is None:
            return self._fixed_indices
        indices = [unit.origin.samples for unit in self._fixed]
        return indices if all(indices) else None

    def drawn_from(self, trainer: Trainer) -> Sequence[Any]:
        """Return what `units` changes, to be put back."""
        if self._kind == "current":
            return []
        return state_of(self._kind if isinstance(self._kind, DataLoader) else trainer.train_dataloader)

    def forget(self) -> None:
        """Release the batches kept."""
        self._recent.clear()
        self._fixed_indices = self.fixed_indices
        self._fixed = None
