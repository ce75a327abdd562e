"""The share of a run's time that measuring takes."""

from __future__ import annotations

from time import perf_counter

import torch

# Shorten a stretched interval only if measuring then takes less than this part of the limit.
_MARGIN = 0.8
# Trust the times after this many measurements, or after this many seconds of measuring.
_ENOUGH, _ENOUGH_SECONDS = 4, 0.25


class Overhead:
    """The time that the measurements and the steps of a run take.

    The first measurement does not count: it loads libraries and checks the engine.

    Args:
        device: Where the training runs.

    Attributes:
        measurements: How many there were in this run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0
        # When the first and the last measurement had been reported, and at which step.
        self._first = self._finished = (0.0, 0)
        self.measurements = 0
        self._measuring = 0.0
        self._preparing = 0.0  # since the last measurement

    def start(self) -> None:
        """Begin to take the time of a measurement, should there be one."""
        self._started = perf_counter()

    def wait_for_steps(self) -> None:
        """Wait for steps that an accelerator still has to compute; that time is not the measurement's."""
        if self._device.type != "cpu":
            began = perf_counter()
            torch.accelerator.synchronize(self._device)
            self._started += perf_counter() - began

    def elapsed(self) -> float:
        """Return the seconds since the measurement began."""
        return perf_counter() - self._started

    def prepare(self) -> None:
        """Count the time since `start` as part of the next measurement, which needs what was kept in it."""
        self._preparing += self.elapsed()

    def finish(self, step: int) -> None:
        """Count the measurement that began last and has been reported now."""
        self._finished = perf_counter(), step
        self.measurements += 1
        if self.measurements == 1:
            self._first = self._finished
        else:
            self._measuring += self._finished[0] - self._started + self._preparing
        self._preparing = 0.0

    @property
    def seconds_of_measurement(self) -> float:
        """Mean time of a measurement and the report on it; 0 before there were two."""
        return self._measuring / max(1, self.measurements - 1)

    @property
    def seconds_of_step(self) -> float:
        """Mean time of a step of the run, with all that belongs to it, such as loading data and validation."""
        (_, first), (_, step) = self._first, self._finished
        return (self._time_of_run - self._measuring) / max(1, step - first)

    def share(self, interval: int) -> float:
        """Return the part of the run's time that measuring takes, if the next one comes after so many steps.

        It is the larger of two parts: of the time from now on, and of all time, with what was measured before.
        """
        measuring, steps = self.seconds_of_measurement, interval * self.seconds_of_step
        if measuring == 0:
            return 0.0
        in_all = (self._measuring + measuring) / (self._time_of_run + steps + measuring)
        return max(measuring / (steps + measuring), in_all)

    @property
    def _time_of_run(self) -> float:
        """Seconds from the first measurement to the last."""
        return self._finished[0] - self._first[0]

    def stretch(self, interval: int, present: int, limit: float) -> int:
        """Return the power of two to multiply an interval by, so that measuring takes at most ``limit`` of the time.

        Args:
            interval: The interval in steps.
            present: What it is multiplied by now.
            limit: A part of the run's time.
        """
        if self.measurements <= _ENOUGH and self._measuring < _ENOUGH_SECONDS:
            return present
        while present > 1 and self.share(interval * present // 2) < _MARGIN * limit:
            present //= 2
        while self.share(interval * present) > limit:
            present *= 2
        return present
