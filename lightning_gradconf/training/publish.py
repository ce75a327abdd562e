"""The way of a measurement to the Trainer and its loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_gradconf.reports.custom_scalars import add_layout, charts
from lightning_gradconf.reports.loggers import kind, log_numbers
from lightning_gradconf.reports.report import Measurement, Pair
from lightning_gradconf.training.compat import add_callback_metrics, logged_keys

if TYPE_CHECKING:
    from lightning_gradconf.training.session import Session


def publish(session: Session, measurement: Measurement, statistics: dict[str, float], pairs: Sequence[Pair]) -> None:
    """Give ``callback_metrics``, the progress bar and every logger what a measurement says."""
    trainer, module, settings = session.trainer, session.module, session.settings
    report = session.report(measurement.name)
    prefix = report.prefix
    metrics = {f"{prefix}/{name}": value for name, value in statistics.items()}
    for layer, value in report.of_layers(measurement).items():
        metrics[f"{prefix}/min_cosine/{layer}"] = value
    if not bool(measurement.gram.isfinite().all()):
        session.warn_once(
            "a gradient is not finite; such measurements are logged as NaN.", f" First at step {measurement.step}."
        )
    add_callback_metrics(trainer, {key: torch.tensor(value, device=module.device) for key, value in metrics.items()})
    if settings.prog_bar and "min_cosine" in statistics:
        shown = {"prog_bar": True, "logger": False, "on_step": True, "on_epoch": False, "batch_size": 1}
        module.log(f"{prefix}/min_cosine", statistics["min_cosine"], **shown)  # type: ignore[arg-type]
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        with session.logging():
            log_numbers(logger, metrics, measurement.step)
    if trainer.global_rank == 0:
        figures = report.figures_of(measurement, pairs)
        for logger in loggers:
            with session.logging():
                report.show(logger, measurement, figures, pairs)
        arrange_charts(session)


def conclude(session: Session) -> None:
    """Report the run as a whole at its end."""
    if session.schedule.last_step is not None:
        arrange_charts(session)
        for report in session.reports():
            report.show_layers(session.trainer.loggers)


def arrange_charts(session: Session) -> None:
    """Lay out the page of charts anew when the module logs something that it did not before."""
    logged = logged_keys(session.trainer)
    if not session.settings.histogram or logged == session.charted:
        return
    session.charted = logged
    callbacks = session.trainer.callbacks  # type: ignore[attr-defined]
    prefixes = [c.prefix for c in callbacks if isinstance(c, type(session.settings)) and c.histogram]
    loggers: list[Any] = session.trainer.loggers
    for logger in loggers:
        if kind(logger) == "TensorBoardLogger":
            add_layout(logger.experiment, [charts(prefix, sorted(logged)) for prefix in prefixes])
