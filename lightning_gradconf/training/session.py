"""What lives for one call of ``fit``, and how a measurement goes in it: units, their Gram, the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_gradconf.batches.sources import Source
from lightning_gradconf.gram.module_state import changes_in_libraries
from lightning_gradconf.gram.ranks.process_group import Ranks, new_process_group
from lightning_gradconf.gram.ranks.sharded import is_sharded
from lightning_gradconf.gram.select import in_words
from lightning_gradconf.reports.report import Reading, Report
from lightning_gradconf.training.arguments import LOSS_FN
from lightning_gradconf.training.compat import (
    collective_timeout,
    inform,
    logging_step,
    only_refreshes_statistics,
    warn,
    warn_here,
)
from lightning_gradconf.training.manual_optimization import ManualOptimization
from lightning_gradconf.training.measure import advice, feed_of, measured
from lightning_gradconf.training.overhead import Overhead
from lightning_gradconf.training.publish import conclude, publish
from lightning_gradconf.training.schedule import Schedule
from lightning_gradconf.training.training_step import StepLoss
from lightning_gradconf.training.unsupported import NO_LOSS, reason_for_nothing

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_gradconf.callback import GradientConfusionCallback

_MAX_FAILURES = 3
# Warn after this many due steps in a row without enough samples; a short last batch explains a single one.
_MISSED = 2
# Give up after this many due steps without a backward pass; gradient accumulation explains a few.
_MAX_WITHOUT_LOSS = 50


class Session:
    """The state of one run that is measured.

    Args:
        callback: The callback, whose arguments say what to measure.
        trainer: The running Trainer.
        module: Its LightningModule.
        state: What `state_dict` returned in an earlier part of the run; empty for a run from the beginning.

    Attributes:
        active: Whether there is anything left to be measured.
        attempted: Whether there were units at a step that was to be measured.
        n: How many units of this rank are compared, the same at all measurements; None before the first.
        schedule: When to measure.
        overhead: What measuring costs.
        source: Where the units come from.
        ranks: The processes that measure together.
        sharded: Whether the module is sharded over the ranks, so that a unit spans all of them.
        loss: The loss of a batch.
        reports: What is reported of the measurements of each loss.
        fixed: The indices of a fixed draw, for each unit of each rank; empty before, and for other sources.
    """

    def __init__(
        self, callback: GradientConfusionCallback, trainer: Trainer, module: LightningModule, state: Mapping[str, Any]
    ) -> None:
        self.callback, self.trainer, self.module = callback, trainer, module
        self.active = True
        self.attempted = False
        self.n: int | None = None
        interval = callback.every_n_train_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.schedule = Schedule(interval, callback.every_n_epochs)
        self.overhead = Overhead(module.device)
        self.fixed: list[Any] = []
        self._load(state)
        over_batches = callback.every_n_epochs is not None
        fixed = self.fixed[trainer.global_rank] if len(self.fixed) == trainer.world_size else None
        self.source = Source(
            callback.source, callback.unit_size, callback.num_units, callback.seed, over_batches, fixed
        )
        self.ranks = Ranks(module.device)
        if trainer.world_size > 1:
            self.ranks = new_process_group(module.device, collective_timeout(trainer))
        manual = None if module.automatic_optimization or callback.loss_fn else ManualOptimization(trainer, module)
        self.loss = StepLoss(trainer, callback.loss_fn, manual)
        self.reports: dict[str, Report] = {}
        # The last batch of the epoch, its index and its step, until the end of the epoch.
        self._last_batch: tuple[Any, int, int] | None = None
        self.sharded = is_sharded(module)
        self._failures = self._without_loss = 0
        self._advice = ""
        self._said: set[str] = set()
        if self.sharded and (callback.labels is not None or callback.top_pairs):
            self.warn_once("labels= and top_pairs= say nothing in this run: with FSDP a unit spans all ranks.")

    # ---- what a resumed run needs -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what makes a resumed run go on at the steps, and with the n, of this one."""
        return {
            "n": self.n,
            "num_units": self.callback.num_units,
            "unit_size": self.callback.unit_size,
            "owed": self.schedule.owed,
            "stretch": self.schedule.stretch,
            "last_measured": self.schedule.last_step,
            "fixed": self.fixed,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        units = ("num_units", "unit_size")
        if any(state.get(name) != getattr(self.callback, name) for name in units):
            return  # there is no state, or other units are compared from now on
        self.n = state["n"]
        self.schedule.owed, self.schedule.last_step = state["owed"], state["last_measured"]
        if self._may_stretch:
            self.schedule.stretch = state["stretch"]
        self.fixed = state["fixed"]

    # ---- when -------------------------------------------------------------------------------------------------------

    def before_step(self, batch: Any, batch_idx: int) -> list[Reading]:
        """Measure before the step of a batch if it is time, and keep copies of its units where they are needed."""
        if not self.active or only_refreshes_statistics(self.trainer):
            return []
        due, left = self.schedule.is_due(self.trainer), self.schedule.steps_left(self.trainer)
        self.overhead.start()
        if self.source.see(feed_of(self), batch, batch_idx, due, left, self.trainer.is_last_batch):
            self.overhead.prepare()
        if not due:
            return []
        if not self.ranks.minimum(self.source.ready(self.n)):
            self._say_if_batches_became_smaller()
            return []
        return self._measure(batch, batch_idx, logging_step(self.trainer))

    def after_step(self, batch: Any, batch_idx: int) -> list[Reading]:
        """Measure after the step of a batch with which an epoch ends, if it is one that is measured at its end."""
        if not self.active or self.callback.every_n_epochs is None or only_refreshes_statistics(self.trainer):
            return []
        self._last_batch = batch, batch_idx, logging_step(self.trainer)
        return self.at_end_of_epoch() if self.schedule.is_due_after(self.trainer) else []

    def at_end_of_epoch(self) -> list[Reading]:
        """Measure the end of an epoch if it is to be measured, and has not been when its last batch was trained on."""
        last, self._last_batch = self._last_batch, None
        if not self.active or last is None or not self.schedule.is_due_at_end_of_epoch(self.trainer):
            return []
        batch, batch_idx, step = last
        self.overhead.start()
        return self._measure(batch, batch_idx, step) if step != self.schedule.last_step else []

    def _is_wanted(self) -> bool:
        """Return whether ``should_measure`` agrees on all ranks; if not, the next due step asks again."""
        try:
            wanted = self.ranks.run_on_all_ranks(lambda: bool(self.callback.should_measure(self.trainer)))
        except Exception as error:
            self._count_failure(error)
            return False
        self.schedule.owed = bool(self.ranks.minimum(wanted))  # until there is a measurement
        return self.schedule.owed

    # ---- a measurement: units, their Gram, the report ---------------------------------------------------------------

    def _measure(self, batch: Any, batch_idx: int, step: int) -> list[Reading]:
        """Measure now if that is wanted, and publish what each loss of the step says.

        Nothing is measured if the module skips this batch, units are too few, or something fails.
        """
        if not self._is_wanted():
            return []
        self.attempted = True
        self.overhead.wait_for_steps()
        try:
            with self._watching_libraries():
                measurements = measured(self, batch, batch_idx, step)
        except Exception as error:
            if self._failures == 0:
                self._advice = self._advice or advice(self, batch, batch_idx, step)
            self._count_failure(error)
            return []
        if not measurements:
            self._count_step_without_loss()
            return []
        measurements = [replace(measurement, seconds=self.overhead.elapsed()) for measurement in measurements]
        if self.source.remark is not None:
            self.warn_once(self.source.remark)
        self._say_if_step_stopped()
        self.schedule.done(step)
        self._failures = 0
        self._fix_units(len(measurements[0].gram) // (1 if self.sharded else self.ranks.size))
        readings: list[Reading] = []
        for measurement in measurements:
            with self.logging():
                if measurement.fault:
                    self.warn_once(measurement.fault, f" First at step {step}.")
                report = self._report_on(measurement.name)
                reading = report.read(measurement)
                readings.append(reading)
                publish(self, report, reading)
        self.overhead.finish(step)
        self._stretch_interval()
        return readings

    @contextmanager
    def _watching_libraries(self) -> Iterator[None]:
        """Warn of objects of libraries on the module that the second measurement changes; the first fills caches."""
        changes = changes_in_libraries(self.module) if self.overhead.measurements == 1 else list[str]
        yield
        if changed := changes():
            warn_here(
                f"measuring changed {' and '.join(changed)}. Objects of libraries are not put back, so this run is not "
                "the run without the callback. Pass a loss_fn that only computes the loss."
            )

    def _report_on(self, name: str) -> Report:
        """Return what reports the measurements of a loss, by its name."""
        given, prefix = self.callback, f"{self.callback.prefix}/{name}" if name else self.callback.prefix
        what = (given.statistics, given.per_layer, given.histogram, given.figures, given.top_pairs)
        return self.reports.setdefault(name, Report(*what, prefix))

    @property
    def _may_stretch(self) -> bool:
        """Whether the interval is ours to choose."""
        given = self.callback
        return given.max_overhead is not None and given.every_n_train_steps is None and given.every_n_epochs is None

    def _stretch_interval(self) -> None:
        """Stretch an interval that is ours to choose until measuring keeps to its share, as rank 0 sees it."""
        schedule, limit = self.schedule, self.callback.max_overhead
        if limit is None or not self._may_stretch:
            return
        stretch = self.overhead.stretch(schedule.every_n_train_steps, schedule.stretch, limit)
        (stretch, *_) = self.ranks.gather([stretch])
        if stretch > schedule.stretch and self._is_new("interval"):
            inform(
                self.trainer,
                f"a measurement takes {1000 * self.overhead.seconds_of_measurement:.1f} ms and a step "
                f"{1000 * self.overhead.seconds_of_step:.1f} ms. It measures every "
                f"{schedule.every_n_train_steps * stretch} steps instead of every {schedule.every_n_train_steps}, to "
                f"take at most {limit:.0%} of the run (max_overhead={limit}). An interval that is given as "
                "every_n_train_steps= is kept.",
            )
        schedule.stretch = stretch

    def _fix_units(self, n: int) -> None:
        """Compare n units of this rank from now on; say so if they are fewer than were asked for."""
        if self.callback.source == "fixed" and not self.fixed:
            self.fixed = self.ranks.gather([self.source.fixed_indices])
        if self.n is None and n < self.callback.num_units:
            inform(
                self.trainer,
                f"{n} units are compared at each measurement of this run, not num_units={self.callback.num_units}: "
                f"source={self.callback.source!r} gives no more of unit_size={self.callback.unit_size!r}.",
            )
        self.n = n

    # ---- the end, and what goes wrong -------------------------------------------------------------------------------

    def end(self) -> None:
        """Report the run as a whole, or say that nothing was ever measured, and leave the process group."""
        conclude(self)
        if self.active and self.n is None and not self._said and (reason := reason_for_nothing(self)) is not None:
            self.warn_once(reason)
        self.ranks.leave()

    def _say_if_batches_became_smaller(self) -> None:
        if self.n is not None and self.schedule.missed >= _MISSED:
            self.warn_once(
                f"batches have become too small for the n={self.n} units of unit_size={self.callback.unit_size!r} that "
                "this run compares, so its curves pause",
                f" since step {self.schedule.last_step}. Pass num_units= that the smallest batch can give, or "
                "source='fresh'.",
            )

    def _say_if_step_stopped(self) -> None:
        """Say once that losses may be missing, as a manually optimised step raised where gradients were missing."""
        stopped = self.loss.manual.stopped if self.loss.manual is not None else ""
        if stopped and self._is_new("stopped"):
            inform(
                self.trainer,
                f"while measuring, no backward pass takes place, and training_step raises after it: {stopped}. The "
                "losses that it has passed to manual_backward, or called backward() on, by then are measured; what "
                "comes after that point of the step is not. The run is as without it. Pass loss_fn= to measure "
                "another loss.",
            )

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Within this context an error of a logger is said once, and never reaches the training.

        The rank that logs is the only one to know of it, so it cannot switch anything off.
        """
        try:
            yield
        except Exception as error:
            self._warn_of_error("logging a measurement failed", error, "The values are in last_statistics.")

    def warn_once(self, message: str, detail: str = "") -> None:
        """Warn of something that all ranks know, once in this run; ``detail`` is what may differ between times."""
        if self._is_new(message):
            warn(message + detail)

    def _warn_of_error(self, what: str, error: Exception, advice: str) -> None:
        message = f"{what} and training goes on as without it. {in_words(error)}. {advice}"
        if self._is_new(message):
            warn_here(message)

    def _is_new(self, message: str) -> bool:
        """Return whether this run has not said something before, and note that it says it now."""
        is_new = message not in self._said
        self._said.add(message)
        return is_new

    def _count_failure(self, error: Exception) -> None:
        """Say that a measurement failed, and switch off after a few in a row."""
        self._failures += 1
        self.schedule.owed = False
        self.active = self._failures < _MAX_FAILURES
        if self.loss.manual is None:
            remedy = "; to see the whole error, run gradient_gram on this module and a batch."
        else:  # gradient_gram takes a loss, which such a step does not return
            remedy = f". With manual optimization it helps to pass the loss, such as {LOSS_FN}."
        remedy = self._advice or f"After {_MAX_FAILURES} failures in a row it stops trying{remedy}"
        self._warn_of_error("a measurement failed", error, remedy)

    def _count_step_without_loss(self) -> None:
        """Give up on a manually optimised step that takes no backward pass: each attempt costs a forward pass."""
        manual = self.loss.manual
        if manual is None or self.n is not None or not self.ranks.minimum(manual.without_losses):
            return
        self._without_loss += 1
        if self._without_loss == _MAX_WITHOUT_LOSS:
            self.switch_off(NO_LOSS)

    def switch_off(self, reason: str) -> None:
        """Measure nothing more in this run, and say why."""
        self.active = False
        self.warn_once(reason)
