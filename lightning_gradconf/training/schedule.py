"""At which steps a run is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradconf.training.compat import completes_step, logging_step

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class Schedule:
    """When one run is measured: at every n-th step or at the end of every n-th epoch, and first as soon as it can be.

    Args:
        every_n_train_steps: The interval in steps; not used with ``every_n_epochs``.
        every_n_epochs: The interval in epochs, None for an interval in steps.

    Attributes:
        owed: Whether the next batch that allows it is measured: for the first measurement, and for one that had to be
            postponed.
        last_step: The step of the last measurement.
    """

    def __init__(self, every_n_train_steps: int, every_n_epochs: int | None) -> None:
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.owed = True
        self.last_step: int | None = None

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to measure before the step of the batch in training.

        The phase is that of ``Trainer(log_every_n_steps)``, at the batch that completes the optimizer step.
        """
        step = logging_step(trainer)
        if step == self.last_step:  # it stays the same while gradients accumulate
            self.owed = False
        elif self.every_n_epochs is None and (step + 1) % self.every_n_train_steps == 0 and completes_step(trainer):
            self.owed = True
        return self.owed

    def is_due_after(self, trainer: Trainer) -> bool:
        """Return whether to measure after the step of the batch in training, as the last of its epoch."""
        if self.every_n_epochs is None:
            return False
        finished = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        return finished and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def done(self, step: int) -> None:
        """Note that a measurement was made at a step."""
        self.owed, self.last_step = False, step
