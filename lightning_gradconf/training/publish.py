"""The way of a measurement to the Trainer and its loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_gradconf.gram.select import in_words
from lightning_gradconf.reports.custom_scalars import add_page
from lightning_gradconf.reports.loggers import kind, log_numbers
from lightning_gradconf.reports.report import Reading, Report
from lightning_gradconf.training.compat import add_metrics, warn_here

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from lightning_gradconf.training.session import Session


def publish(session: Session, report: Report, reading: Reading) -> None:
    """Give ``callback_metrics``, the progress bar and every logger what a measurement says."""
    trainer, measurement, lowest = session.trainer, reading.measurement, f"{report.prefix}/min_cosine"
    metrics = reading.metrics
    in_bar = [lowest] if session.callback.prog_bar and lowest in metrics else []
    add_metrics(trainer, metrics, in_bar)
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        with session.logging():
            log_numbers(logger, metrics, measurement.step, trainer.current_epoch)
    if trainer.global_rank == 0:
        tables, figures = report.tables_of(reading), report.figures_of(reading)
        for logger in loggers:
            with session.logging():
                report.show(logger, measurement, tables, figures)


def conclude(session: Session) -> None:
    """Report the run as a whole at its end."""
    if session.active and session.trainer.global_rank == 0:
        for report in session.reports.values():
            with session.logging():
                report.show_layers(session.trainer.loggers)


def add_charts(trainer: Trainer, prefixes: Sequence[str]) -> None:
    """Lay out TensorBoard's page of charts for the callbacks with these prefixes."""
    loggers: list[Any] = trainer.loggers if trainer.global_rank == 0 else []
    for logger in loggers:
        if kind(logger) == "TensorBoardLogger":
            try:
                add_page(logger.experiment, prefixes)
            except Exception as error:
                warn_here(f"the page of charts could not be written: {in_words(error)}")
