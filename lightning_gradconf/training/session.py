"""What lives for one call of ``fit``, and how a measurement goes in it: units, their Gram, the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradconf.batches import draws
from lightning_gradconf.batches.draws import Unit
from lightning_gradconf.batches.sources import Source
from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.ghost.engine import Memory
from lightning_gradconf.gram.measurement_mode import MeasuredLayers
from lightning_gradconf.gram.ranks import data_parallel, sharded
from lightning_gradconf.gram.ranks.process_group import Ranks, joined
from lightning_gradconf.gram.select import gram_of_units, in_words
from lightning_gradconf.reports.report import Measurement, Report
from lightning_gradconf.training.compat import (
    collective_timeout,
    logging_step,
    only_refreshes_statistics,
    warn,
    warn_here,
)
from lightning_gradconf.training.manual_optimization import ManualOptimization
from lightning_gradconf.training.progress import shown
from lightning_gradconf.training.schedule import Schedule
from lightning_gradconf.training.training_step import (
    StepLoss,
    StepObjective,
    digests,
    no_trace,
    objectives,
    prepare_step,
    reason_not_to_measure,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_gradconf.callback import GradientConfusionCallback

_MAX_FAILURES = 3


def reason_not_to_start(settings: GradientConfusionCallback, trainer: Trainer, module: LightningModule) -> str | None:
    """Return why a run cannot be measured and what to do about it, None if it can."""
    if (reason := reason_not_to_measure(trainer, module, settings.loss_fn)) is not None:
        return reason
    if any(settings.source is loader for loader in draws.training_loaders(trainer)):
        return "source= is the training loader itself, whose order would change; use source='fresh'"
    if settings.every_n_epochs is None and _interval(settings, trainer) == 0:
        return "Trainer(log_every_n_steps=0) means never; pass every_n_train_steps= to measure"
    return None


def _interval(settings: GradientConfusionCallback, trainer: Trainer) -> int:
    given, logged = settings.every_n_train_steps, int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
    return logged if given is None else given


class Session:
    """The state of one run that is measured.

    Args:
        settings: The callback, whose arguments say what to measure.
        trainer: The running Trainer.
        module: Its LightningModule.

    Attributes:
        active: Whether there is anything left to be measured.
        n: How many units of this rank are compared, the same at all measurements; None before the first.
        schedule: When to measure.
        source: Where the units come from.
        ranks: The processes that measure together.
        charted: The keys that TensorBoard's page of charts was laid out for.
    """

    def __init__(self, settings: GradientConfusionCallback, trainer: Trainer, module: LightningModule) -> None:
        self.settings, self.trainer, self.module = settings, trainer, module
        self.active = True
        self.n: int | None = None
        self.schedule = Schedule(_interval(settings, trainer), settings.every_n_epochs)
        over_batches = settings.every_n_epochs is not None
        self.source = Source(settings.source, settings.unit_size, settings.num_units, settings.seed, over_batches)
        several = trainer.world_size > 1
        self.ranks = joined(module.device, collective_timeout(trainer)) if several else Ranks(module.device)
        self._reports: dict[str, Report] = {}
        self.charted: set[str] | None = None
        self._sharded = sharded.is_sharded(module)
        manual = None if module.automatic_optimization or settings.loss_fn else ManualOptimization(trainer, module)
        self._manual = manual
        self._loss = StepLoss(trainer, settings.loss_fn, manual)
        # Of each loss of the step, by its name.
        self._engines: defaultdict[str, str] = defaultdict(lambda: settings.engine)
        self._memories: defaultdict[str, Memory] = defaultdict(Memory)
        self._failures = 0
        self._said: set[str] = set()
        if self._sharded and (settings.labels is not None or settings.top_pairs):
            self.warn_once("labels= and top_pairs= say nothing in this run: with FSDP a unit spans all ranks.")

    # ---- when -------------------------------------------------------------------------------------------------------

    def is_due(self, batch: Any, batch_idx: int) -> bool:
        """Return whether to measure before the step of a batch, of which copies are kept where they are needed."""
        if not self.active or only_refreshes_statistics(self.trainer):
            return False
        due = self.schedule.is_due(self.trainer)
        self.source.see(self.trainer, batch, batch_idx, due)
        return due and (self.n is not None or bool(self.ranks.minimum(self.source.ready())))

    def is_due_after(self) -> bool:
        """Return whether to measure after the step of a batch."""
        if not self.active or only_refreshes_statistics(self.trainer):
            return False
        return self.schedule.is_due_after(self.trainer)

    # ---- units -> Gram ----------------------------------------------------------------------------------------------

    def measure(self, batch: Any, batch_idx: int) -> list[Measurement]:
        """Return what is measured now: one measurement for each loss of the step.

        There is none if the module skips this batch, units are too few, or something failed.
        """
        try:
            measurements = self._measure(batch, batch_idx)
        except Exception as error:
            self._count_failure(error)
            return []
        if measurements:
            self.schedule.done(measurements[0].step)
            self._failures = 0
        return measurements

    def _measure(self, batch: Any, batch_idx: int) -> list[Measurement]:
        self.schedule.owed = True  # until there is a measurement
        if self._sharded:
            sharded.rest(self.module)
        self._loss.batch_idx, self._loss.skipped = batch_idx, True
        verify = self.settings.verify and self.n is None
        before = digests(self.trainer, self.module) if verify else {}
        with self._isolated():
            units = self._units(batch, batch_idx)
            if enough := units is not None and len(units) >= self._fewest_units():
                classes = self._classes(units)
                unit_size = draws.size_of(units[0].batch)
                ordinary = draws.size_of(batch)
                parts = self.ranks.on_all(lambda: self._objectives(units[0].batch, unit_size))
                parts = parts[: self.ranks.minimum(len(parts))]
                grams = [self._grams(part, units, unit_size, ordinary) for part in parts]
        if before and not self._verified(before, digests(self.trainer, self.module)):
            return []
        if units is None:
            return []
        if not enough:
            self._say_too_few(len(units))
            return []
        skipped = [bool(self.ranks.minimum(part.loss.skipped)) for part in parts]
        if all(skipped):  # training_step skips this batch
            return []
        self.n = len(units)
        if self._sharded and unit_size is not None:  # a unit has such a part on each rank
            unit_size *= self.ranks.size
        step = logging_step(self.trainer)
        measured = [Measurement(gram, unit_size, step, part.name) for part, gram in zip(parts, grams, strict=True)]
        measured = [one for one, without in zip(measured, skipped, strict=True) if not without]
        return [self._described(one, units, classes) for one in measured]

    def _objectives(self, unit: Any, unit_size: int | None) -> list[StepObjective]:
        """Return the losses of this step, each with the parameters that it is measured for."""
        layers = MeasuredLayers(running_statistics=unit_size == 1, dropout=self.settings.dropout)
        return objectives(self._loss, self.module, self.settings.parameters, unit, layers)

    def report(self, name: str = "") -> Report:
        """Return what reports the measurements of a loss, by its name."""
        if name not in self._reports:
            settings, prefix = self.settings, "/".join(filter(None, (self.settings.prefix, name)))
            what = (settings.statistics, settings.per_layer, settings.histogram, settings.figures, settings.top_pairs)
            self._reports[name] = Report(*what, prefix)
        return self._reports[name]

    def reports(self) -> list[Report]:
        """Return all of them."""
        return list(self._reports.values())

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        """Within this context nothing reaches the run; a rank that cannot set it up takes the others with it."""
        with ExitStack() as stack:
            isolation = no_trace(self.trainer, self.module, *self.source.drawn_from(self.trainer))
            self.ranks.on_all(lambda: stack.enter_context(isolation))
            if self._manual is not None:
                stack.enter_context(self._manual.inert())
            yield

    def _units(self, batch: Any, batch_idx: int) -> list[Unit] | None:
        """Return the units of this rank, as many as on each other rank; None where the module skips this batch."""

        def prepare() -> list[Unit] | None:
            if not prepare_step(self.module, copy_of(batch), batch_idx):
                return None
            wanted = self.n or self.settings.num_units
            return self.source.units(self.trainer, self.module, wanted, logging_step(self.trainer))

        units = self.ranks.on_all(prepare)
        n = self.ranks.minimum(-1 if units is None else len(units))
        return None if units is None or n < 0 else units[-n:] if n else []

    def _fewest_units(self) -> int:
        """Return how many units of this rank make a measurement: two gradients to compare, and later n."""
        return self.n or (1 if self.ranks.size > 1 and not self._sharded else 2)

    def _classes(self, units: Sequence[Unit]) -> list[int]:
        """Return the class of each unit; none without ``labels``."""
        labels = self.settings.labels
        if labels is None:
            return []
        return self.ranks.on_all(lambda: [draws.class_of(unit.batch, labels) for unit in units])

    def _grams(
        self, part: StepObjective, units: Sequence[Unit], unit_size: int | None, ordinary: int | None
    ) -> dict[str, Tensor]:
        """Return the Gram of each parameter that a loss is measured for.

        ``ordinary`` is the number of samples in a batch of the training, None if they cannot be told.
        """
        batches, target, engine = [unit.batch for unit in units], part.target, self._engines[part.name]
        with shown(self.trainer) as progress:
            options: dict[str, Any] = {
                "dropout": self.settings.dropout,
                "memory_budget": self.settings.memory_budget,
                "progress": progress,
            }
            if self._sharded:
                return sharded.gram_of_units(self.ranks, target, batches, unit_size, **options)
            options |= {"usual": ordinary, "memory": self._memories[part.name]}
            if self.ranks.size > 1:
                grams, used = data_parallel.gram_of_units(self.ranks, target, batches, unit_size, engine, **options)
            else:
                grams, used = gram_of_units(target, batches, unit_size, engine, **options)
        if used == "loop":  # do not try again what failed
            self._engines[part.name] = used
        return grams

    def _described(self, measurement: Measurement, units: Sequence[Unit], classes: list[int]) -> Measurement:
        """Return the measurement with the origins, classes and samples of all ranks' units, if they are wanted."""
        if self._sharded:
            return measurement
        if self.settings.labels is not None:
            measurement = replace(measurement, labels=torch.tensor(self.ranks.gather(classes)))
        if self.settings.top_pairs > 0:
            alone = self.ranks.size == 1
            rank = None if alone else self.trainer.global_rank
            origins = self.ranks.gather([unit.origin._replace(rank=rank) for unit in units])
            # Images of other ranks would have to travel.
            samples = [unit.batch for unit in units] if alone else ()
            measurement = replace(measurement, origins=origins, units=samples)
        return measurement

    # ---- the end, and what goes wrong -------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the batches kept, and leave the process group."""
        self.source.forget()
        self.ranks.leave()

    def say_if_nothing_was_measured(self) -> None:
        """Warn at the end of a run that should have been measured and was not, unless the reason has been said."""
        if self.active and self.n is None and not self._said:
            self.warn_once(
                f"no measurement took place: {self.source.seen} units of unit_size={self.settings.unit_size!r} were "
                "seen, too few. Lower num_units or unit_size, or train longer."
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
        if message not in self._said:
            self._said.add(message)
            warn(message + detail)

    def _warn_of_error(self, what: str, error: Exception, advice: str) -> None:
        message = f"{what} and training goes on as without it. {in_words(error)}. {advice}"
        if message not in self._said:
            self._said.add(message)
            warn_here(message)

    def _count_failure(self, error: Exception) -> None:
        """Say that a measurement failed, and switch off after a few in a row."""
        self._failures += 1
        self.schedule.owed = False
        self.active = self._failures < _MAX_FAILURES
        advice = (
            f"After {_MAX_FAILURES} failures in a row it stops trying; to see the whole error, run gradient_gram on "
            "this module and a batch."
        )
        self._warn_of_error("a measurement failed", error, advice)

    def _say_too_few(self, n: int) -> None:
        """Switch off if the first measurement finds no two units; later ones wait for a batch that is large enough."""
        if self.n is None:
            self.active = False
            self.warn_once(
                f"measures nothing in this run. source={self.settings.source!r} gives {n} unit(s) of unit_size="
                f"{self.settings.unit_size!r}, and it takes two to disagree; use a smaller unit_size, "
                "unit_size='batch', or source='fresh'."
            )

    def _verified(self, before: dict[str, bytes], after: dict[str, bytes]) -> bool:
        """Return whether the first measurement left no trace, and switch off if it did."""
        changed = [name for name in before if before[name] != after.get(name)]
        self.active = bool(self.ranks.minimum(not changed))
        if not self.active:
            self.warn_once(
                f"the first measurement changed {', '.join(changed) or 'something on another rank'}; it measures "
                "nothing more in this run, which is not the run without it. Pass a loss_fn that only computes the loss."
            )
        return self.active
