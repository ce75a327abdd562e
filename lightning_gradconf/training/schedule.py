"""At which steps a run is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradconf.training.compat import completes_step, logging_step, stops_early

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class Schedule:
    """When one run is measured: at every n-th step or at the end of every n-th epoch, and first as soon as it can be.

    Args:
        every_n_train_steps: The interval in steps; not used with ``every_n_epochs``.
        every_n_epochs: The interval in epochs, None for an interval in steps.

    Attributes:
        stretch: What the interval in steps is multiplied by.
        owed: Whether the next batch that allows it is measured: for the first measurement, and for one that had to be
            postponed.
        missed: How many due steps in a row have passed without a measurement.
        last_step: The step of the last measurement.
    """

    def __init__(self, every_n_train_steps: int, every_n_epochs: int | None) -> None:
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self.stretch = 1
        self.owed = True
        self.missed = 0
        self.last_step: int | None = None

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether to measure before the step of the batch in training.

        The phase is that of ``Trainer(log_every_n_steps)``, at the batch that completes the optimizer step.
        """
        if logging_step(trainer) == self.last_step:  # it stays the same while gradients accumulate
            self.owed = False
        elif self.steps_left(trainer) == 0 and completes_step(trainer):
            self.missed += self.owed
            self.owed = True
        elif self.is_due_at_end_of_epoch(trainer) and (trainer.is_last_batch or _reaches_max_steps(trainer, 1)):
            return False  # of two measurements at one step, the one at the end of the epoch is wanted
        return self.owed

    def steps_left(self, trainer: Trainer) -> int | None:
        """Return in how many steps the next one is due by the interval, 0 for this one; None at ends of epochs.

        An epoch may end before its last batch, if something stops the run or a hook skips the rest.
        """
        if self.every_n_epochs is not None:
            return None
        return -(logging_step(trainer) + 1) % (self.every_n_train_steps * self.stretch)

    def is_due_after(self, trainer: Trainer) -> bool:
        """Return whether to measure after the step of the batch in training, as the last of its epoch."""
        ends = trainer.is_last_batch or _reaches_max_steps(trainer, 0) or stops_early(trainer)
        return ends and self.is_due_at_end_of_epoch(trainer)

    def is_due_at_end_of_epoch(self, trainer: Trainer) -> bool:
        """Return whether the epoch in training is one that is measured at its end."""
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def done(self, step: int) -> None:
        """Note that a measurement was made at a step."""
        self.owed, self.missed, self.last_step = False, 0, step


def _reaches_max_steps(trainer: Trainer, steps: int) -> bool:
    """Return whether ``max_steps`` is reached in so many steps; several optimizers may step over it."""
    return 0 < trainer.max_steps <= trainer.global_step + steps
