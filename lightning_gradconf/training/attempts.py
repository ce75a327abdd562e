"""What is tried where the user's code fails on units: other units, and the advice that follows from what works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_gradconf.batches.sources import Source
from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import gram_of_units, in_words
from lightning_gradconf.reports.report import Measurement
from lightning_gradconf.training.feed import feed_of
from lightning_gradconf.training.measure import measured_now
from lightning_gradconf.training.training_step import StepLoss, prepare_step

if TYPE_CHECKING:
    from lightning_gradconf.training.session import Session


def measured_or_collated(session: Session, batch: Any, batch_idx: int, step: int) -> list[Measurement]:
    """Return what `measured_now` does; where it fails on samples that are padded, measure units collated alone.

    A sample that keeps the padding of its batch is no batch that every module accepts.
    """
    try:
        return measured_now(session, batch, batch_idx, step)
    except Exception as error:
        feed = feed_of(session.trainer, session.module)
        if session.ranks.minimum(not session.source.pads(feed, step)):
            raise
        session.source.collate_instead(feed, in_words(error))
        try:
            return measured_now(session, batch, batch_idx, step)
        except Exception:
            session.source.cut_again()
            raise error from None


def advice(session: Session, batch: Any, batch_idx: int, step: int) -> str:
    """Return what to do about a module that fails on a batch of one sample and not on one of two; else nothing."""
    settings, feed = session.settings, feed_of(session.trainer, session.module)
    if settings.unit_size != 1 or session.ranks.size > 1 or session.loss.manual is not None:
        return ""
    loss = StepLoss(session.trainer, settings.loss_fn)
    loss.batch_idx = batch_idx
    for size in (2, 1):
        source, works = Source(settings.source, size, 1, settings.seed, over_batches=False), True
        try:
            source.see(feed, batch, batch_idx, due=True)
            with feed.isolated(source.reads(feed)):
                prepare_step(session.module, copy_of(batch), batch_idx)
                target = objective(session.module, loss, settings.parameters)
                (unit,) = source.units(feed, 1, step)
                gram_of_units(Ranks(target.device), target, [unit.batch], size, "loop", dropout=settings.dropout)
        except Exception:
            works = False
        if works == (size == 1):
            return ""
    return "The module fails on a single sample and not on two: pass unit_size=2."
