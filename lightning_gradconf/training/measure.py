"""One measurement: units, the Gram of their gradients, and what is tried where the user's code fails on the units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.sources import Source
from lightning_gradconf.batches.units import Unit, class_of, copy_of
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.objective import Objective, matching, objective
from lightning_gradconf.gram.ranks import sharded
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import gram_of_units, in_words
from lightning_gradconf.reports.report import Measurement
from lightning_gradconf.training.compat import is_overridden
from lightning_gradconf.training.isolation import digests, no_trace
from lightning_gradconf.training.manual_optimization import ManualOptimization
from lightning_gradconf.training.progress import progress_bar
from lightning_gradconf.training.training_step import StepLoss, StepObjective, objectives

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

    from lightning_gradconf.training.session import Session


def measured(session: Session, batch: Any, batch_idx: int, step: int) -> list[Measurement]:
    """Return what is measured at the present weights, one measurement for each loss of the step.

    There is none if the module skips this batch, if all parameters to be measured are frozen, or if there are too few
    units. Some modules fail on a sample that keeps the padding of its batch. Then units that are collated alone are
    measured.

    Args:
        session: The run.
        batch: The batch in training, or the last one.
        batch_idx: Its index.
        step: The step that it is logged at.
    """
    try:
        return _measured(session, batch, batch_idx, step)
    except Exception as error:
        feed = feed_of(session)
        if session.ranks.minimum(not session.source.pads(feed, step)):
            raise
        session.source.collate_instead(feed, in_words(error))
        try:
            return _measured(session, batch, batch_idx, step)
        except Exception:
            session.source.cut_again()
            raise error from None


def _measured(session: Session, batch: Any, batch_idx: int, step: int) -> list[Measurement]:
    """Return the measurements of the units that the source gives now, and see that they leave no trace."""
    trainer, module = session.trainer, session.module
    if _is_frozen(session) and not is_overridden(module, "on_train_batch_start"):  # which may thaw it
        return []
    if session.sharded:
        sharded.reshard(module)
    session.loss.batch_idx, session.loss.skipped = batch_idx, True
    before = digests(trainer, module) if session.callback.verify and session.n is None else {}
    feed = feed_of(session)
    found: list[Measurement] = []
    with _isolated(session, feed):
        units = _units(session, feed, batch, batch_idx, step)
        # Two gradients to compare, of this rank or of several, and later n.
        fewest = session.n or (1 if session.ranks.size > 1 and not session.sharded else 2)
        if units is not None and len(units) >= fewest and not _is_frozen(session):
            found = _measurements(session, units, feed.samples_of(batch, batch_idx), step)
    if before and not _left_no_trace(session, before):
        return []
    if units is not None and len(units) < fewest and session.n is None:  # later, a larger batch may come
        session.switch_off(
            f"measures nothing in this run. source={session.callback.source!r} gives {len(units)} unit(s) of unit_size="
            f"{session.callback.unit_size!r}, and it takes two to disagree; use a smaller unit_size, "
            "unit_size='batch', or source='fresh'."
        )
    return found


def _is_frozen(session: Session) -> bool:
    """Return whether all parameters to be measured are frozen, for now."""
    module = session.module
    chosen = matching(module, session.callback.parameters) or dict(module.named_parameters())
    return not any(p.requires_grad for p in chosen.values())


def feed_of(session: Session) -> Feed:
    """Return what the Trainer trains on now: a hook may have put other loaders in the place of the first."""
    trainer, module = session.trainer, session.module

    def prepare(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return Feed(
        loaders=trainer.train_dataloader,
        prepare=prepare,
        isolated=partial(no_trace, trainer, module),
        batches=trainer.num_training_batches,
        rank=trainer.global_rank,
        overfitted=int(trainer.num_training_batches) if trainer.overfit_batches else None,  # type: ignore[attr-defined]
    )


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

    def given() -> list[Unit] | None:
        if _skips(session.module, copy_of(batch), batch_idx):
            return None
        return session.source.units(feed, session.n or session.callback.num_units, step)

    units = session.ranks.run_on_all_ranks(given)
    n = session.ranks.minimum(-1 if units is None else len(units))
    return None if units is None or n < 0 else units[len(units) - n :]


def _skips(module: LightningModule, batch: Any, batch_idx: int) -> bool:
    """Run the module's own ``on_train_batch_start``, where it has one, and return whether it skips the batch."""
    if not is_overridden(module, "on_train_batch_start"):
        return False
    return module.on_train_batch_start(batch, batch_idx) == -1


def _measurements(
    session: Session, units: Sequence[Unit], train_batch_size: int | None, step: int
) -> list[Measurement]:
    """Return what is measured of these units, for each loss of the step but those that it skips.

    ``train_batch_size`` is the number of samples in a batch of the training, None if they cannot be told.
    """
    module, ranks, callback, unit_size = session.module, session.ranks, session.callback, units[0].size
    about = _about(session, units)
    mode = MeasurementMode(running_statistics=unit_size == 1, dropout=callback.dropout)
    parts = ranks.run_on_all_ranks(lambda: objectives(session.loss, module, callback.parameters, units[0].batch, mode))
    if session.loss.manual is not None:
        parts = _agreed(ranks, session.loss.manual, parts)
    # A unit that spans the ranks has such a part on each of them.
    whole_size = unit_size * ranks.size if session.sharded and unit_size is not None else unit_size
    found = []
    for part in parts:
        grams, engine = _grams(session, part.target, units, train_batch_size)
        if not ranks.minimum(part.loss.skipped):
            found.append(Measurement(grams, whole_size, step, engine=engine, name=part.name, **about))
    return found


def _agreed(ranks: Ranks, manual: ManualOptimization, parts: list[StepObjective]) -> list[StepObjective]:
    """Return the losses that all ranks have, by the first rank's names, and let all know of a step that stopped on one.

    Raises:
        RuntimeError: They are for other parameters on another rank, as where only one came to an optimizer step.
    """
    parts = parts[: ranks.minimum(len(parts))]
    names, parameters = [part.name for part in parts], [list(part.target.parameters) for part in parts]
    found = ranks.gather([(manual.stopped, names, parameters)])
    manual.stopped = next((stopped for stopped, *_ in found if stopped), "")
    _, names, of_first = found[0]
    if any(of_other != of_first for *_, of_other in found):
        raise RuntimeError("the losses of training_step are for other parameters on another rank")
    return [part._replace(name=name) for part, name in zip(parts, names, strict=True)]


def _about(session: Session, units: Sequence[Unit]) -> dict[str, Any]:
    """Return the origins, classes and samples of all ranks' units, those that are wanted, as of `Measurement`."""
    ranks, labels, about = session.ranks, session.callback.labels, dict[str, Any]()
    if session.sharded:
        return about
    if labels is not None:
        classes = ranks.run_on_all_ranks(lambda: [class_of(unit.batch, labels) for unit in units])
        about["labels"] = torch.tensor(ranks.gather(classes))
    if session.callback.top_pairs > 0:
        alone = ranks.size == 1
        rank = None if alone else session.trainer.global_rank
        about["origins"] = ranks.gather([unit.origin._replace(rank=rank) for unit in units])
        if alone:  # images of other ranks would have to travel
            about["units"] = [unit.batch for unit in units]
    return about


def _grams(
    session: Session, target: Objective, units: Sequence[Unit], train_batch_size: int | None
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram of each parameter for one loss of the step, and the engine that computed them."""
    callback, batches, unit_size = session.callback, [unit.batch for unit in units], units[0].size
    with progress_bar(session.trainer) as progress:
        options: dict[str, Any] = {
            "dropout": callback.dropout,
            "memory_budget": callback.memory_budget,
            "progress": progress,
        }
        if session.sharded:
            return sharded.gram_of_units(session.ranks, target, batches, unit_size, **options), "loop"
        return gram_of_units(
            session.ranks, target, batches, unit_size, callback.engine, train_batch_size=train_batch_size, **options
        )


def _left_no_trace(session: Session, before: dict[str, bytes]) -> bool:
    """Return whether the state of the run is what it was, on all ranks; if not, switch off and say so."""
    after = digests(session.trainer, session.module)
    changed = [name for name in before if before[name] != after[name]]
    if session.ranks.minimum(not changed):
        return True
    session.switch_off(
        f"the first measurement changed {', '.join(changed) or 'something on another rank'}; it measures nothing "
        "more in this run, which is not the run without it. Pass a loss_fn that only computes the loss."
    )
    return False


def advice(session: Session, batch: Any, batch_idx: int, step: int) -> str:
    """Return what to do about a module that fails on a batch of one sample and not on one of two; else nothing."""
    if session.callback.unit_size != 1 or session.ranks.size > 1 or session.loss.manual is not None:
        return ""

    def works(unit_size: int) -> bool:
        """Return whether the module's loss has a gradient on a unit of so many samples."""
        callback, module, feed = session.callback, session.module, feed_of(session)
        source = Source(callback.source, unit_size, 1, callback.seed, over_batches=False)
        loss = StepLoss(session.trainer, callback.loss_fn)
        loss.batch_idx = batch_idx
        try:
            source.see(feed, batch, batch_idx, due=True)
            with feed.isolated(source.reads(feed)):
                _skips(module, copy_of(batch), batch_idx)  # which may prepare the module for the batch
                target = objective(module, loss, callback.parameters)
                (unit,) = source.units(feed, 1, step)
                gram_of_units(Ranks(target.device), target, [unit.batch], unit_size, "loop", dropout=callback.dropout)
        except Exception:
            return False
        return True

    return "The module fails on a single sample and not on two: pass unit_size=2." if works(2) and not works(1) else ""
