"""One measurement: units, and the Gram of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradconf.batches.loaders import Feed
from lightning_gradconf.batches.units import Unit, class_of, copy_of
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.ranks import sharded
from lightning_gradconf.gram.select import gram_of_units
from lightning_gradconf.reports.report import Measurement
from lightning_gradconf.training.feed import feed_of
from lightning_gradconf.training.progress import shown
from lightning_gradconf.training.training_step import StepObjective, digests, objectives, prepare_step

if TYPE_CHECKING:
    from lightning_gradconf.training.session import Session


def measured_now(session: Session, batch: Any, batch_idx: int, step: int) -> list[Measurement]:
    """Return what is measured at the present weights, one measurement for each loss of the step.

    There is none if the module skips this batch, all of it is frozen, or units are too few.

    Args:
        session: The run.
        batch: The batch in training, or the last one.
        batch_idx: Its index.
        step: The step that it is logged at.
    """
    trainer, module, ranks = session.trainer, session.module, session.ranks
    session.schedule.owed = True  # until there is a measurement
    if not any(p.requires_grad for p in module.parameters()):  # all of it is frozen, for now
        return []
    if session.sharded:
        sharded.reshard(module)
    session.loss.batch_idx, session.loss.skipped = batch_idx, True
    before = digests(trainer, module) if session.settings.verify and session.n is None else {}
    feed = feed_of(trainer, module)
    with _isolated(session, feed):
        units = _units(session, feed, batch, batch_idx, step)
        if enough := units is not None and len(units) >= _fewest_units(session):
            classes = _classes(session, units)
            unit_size, train_batch_size = units[0].size, session.source.samples_of(feed, batch, batch_idx)
            parts = _objectives(session, units[0], unit_size)
            grams = [_grams(session, part, units, unit_size, train_batch_size) for part in parts]
    if before and not _left_no_trace(session, before):
        return []
    if units is None:
        return []
    if not enough:
        session.say_too_few(len(units))
        return []
    if session.sharded and unit_size is not None:  # a unit has such a part on each rank
        unit_size *= ranks.size
    measured = []
    for part, (gram, engine) in zip(parts, grams, strict=True):
        if ranks.minimum(part.loss.skipped):  # training_step skips this batch
            continue
        measurement = Measurement(gram, unit_size, step, engine=engine, name=part.name)
        measured.append(_described(session, measurement, units, classes))
    if measured:
        session.fix_n(len(units))
    return measured


@contextmanager
def _isolated(session: Session, feed: Feed) -> Iterator[None]:
    """Let nothing in this context reach the run; a rank that cannot set it up takes the others with it."""
    with ExitStack() as stack:
        isolation = feed.isolated(session.source.reads(feed))
        session.ranks.run_on_all_ranks(lambda: stack.enter_context(isolation))
        if session.loss.manual is not None:
            stack.enter_context(session.loss.manual.inert())
        yield


def _units(session: Session, feed: Feed, batch: Any, batch_idx: int, step: int) -> list[Unit] | None:
    """Return the units of this rank, as many as on each other rank; None where the module skips this batch."""

    def prepare() -> list[Unit] | None:
        if not prepare_step(session.module, copy_of(batch), batch_idx):
            return None
        return session.source.units(feed, session.n or session.settings.num_units, step)

    units = session.ranks.run_on_all_ranks(prepare)
    n = session.ranks.minimum(-1 if units is None else len(units))
    return None if units is None or n < 0 else units[len(units) - n :]


def _fewest_units(session: Session) -> int:
    """Return how many units of this rank make a measurement: two gradients to compare, and later n."""
    return session.n or (1 if session.ranks.size > 1 and not session.sharded else 2)


def _classes(session: Session, units: Sequence[Unit]) -> list[int]:
    """Return the class of each unit; none without ``labels``."""
    labels = session.settings.labels
    if labels is None:
        return []
    return session.ranks.run_on_all_ranks(lambda: [class_of(unit.batch, labels) for unit in units])


def _objectives(session: Session, unit: Unit, unit_size: int | None) -> list[StepObjective]:
    """Return the losses of this step, as many as on each other rank, with the parameters each is measured for."""
    settings, ranks = session.settings, session.ranks
    mode = MeasurementMode(running_statistics=unit_size == 1, dropout=settings.dropout)
    found = ranks.run_on_all_ranks(
        lambda: objectives(session.loss, session.module, settings.parameters, unit.batch, mode)
    )
    return found if session.loss.manual is None else found[: ranks.minimum(len(found))]


def _grams(
    session: Session, part: StepObjective, units: Sequence[Unit], unit_size: int | None, train_batch_size: int | None
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram of each parameter for one loss of the step, and the engine that computed them.

    ``train_batch_size`` is the number of samples in a batch of the training, None if they cannot be told.
    """
    batches, target, engine = [unit.batch for unit in units], part.target, session.settings.engine
    with shown(session.trainer) as progress:
        options: dict[str, Any] = {
            "dropout": session.settings.dropout,
            "memory_budget": session.settings.memory_budget,
            "progress": progress,
        }
        if session.sharded:
            return sharded.gram_of_units(session.ranks, target, batches, unit_size, **options), "loop"
        return gram_of_units(
            session.ranks, target, batches, unit_size, engine, train_batch_size=train_batch_size, **options
        )


def _left_no_trace(session: Session, before: dict[str, bytes]) -> bool:
    """Return whether the state of the run is what it was, on all ranks."""
    after = digests(session.trainer, session.module)
    changed = [name for name in before if before[name] != after.get(name)]
    if session.ranks.minimum(not changed):
        return True
    session.say_traces(changed)
    return False


def _described(session: Session, measurement: Measurement, units: Sequence[Unit], classes: list[int]) -> Measurement:
    """Return the measurement with the origins, classes and samples of all ranks' units, if they are wanted."""
    if session.sharded:
        return measurement
    if session.settings.labels is not None:
        measurement = replace(measurement, labels=torch.tensor(session.ranks.gather(classes)))
    if session.settings.top_pairs > 0:
        alone = session.ranks.size == 1
        rank = None if alone else session.trainer.global_rank
        origins = session.ranks.gather([unit.origin._replace(rank=rank) for unit in units])
        # Images of other ranks would have to travel.
        samples = [unit.batch for unit in units] if alone else ()
        measurement = replace(measurement, origins=origins, units=samples)
    return measurement
