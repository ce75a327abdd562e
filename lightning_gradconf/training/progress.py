"""How far a long measurement is, below the Trainer's own progress bar and in its style."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_gradconf.gram.blockwise import Progress

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

# Shorter measurements show nothing.
_SECONDS = 3.0
_TITLE = "Gradient confusion"


@contextmanager
def progress_bar(trainer: Trainer) -> Iterator[Progress | None]:
    """Yield what shows how many gradients were computed; None on other ranks than the first, and with bars off.

    Bars come up after a few seconds and are gone when the measurement is.
    """
    bar: Any = trainer.progress_bar_callback
    styles = {"TQDMProgressBar": _tqdm, "RichProgressBar": _rich}
    style = next((styles[base.__name__] for base in type(bar).__mro__ if base.__name__ in styles), None)
    if style is None or bar.is_disabled or trainer.global_rank != 0:
        yield None
        return
    start = time.monotonic()
    opened: list[tuple[Progress, Callable[[], None]]] = []

    def progress(done: int, total: int) -> None:
        if not opened and time.monotonic() - start > _SECONDS:
            opened.append(style(bar))
        for show, _ in opened:
            show(done, total)

    try:
        yield progress
    finally:
        for _, close in opened:
            close()


def _tqdm(bar: Any) -> tuple[Progress, Callable[[], None]]:
    """Return a bar of the class of the training's bar, on the line below it."""
    training = bar.train_progress_bar
    position = -training.pos + 1
    nested = type(training)(desc=_TITLE, position=position, leave=False, dynamic_ncols=True, file=training.fp)

    def show(done: int, total: int) -> None:
        nested.total, nested.n = total, done
        nested.refresh()

    return show, nested.close


def _rich(bar: Any) -> tuple[Progress, Callable[[], None]]:
    """Return a task beside that of the training."""
    task = bar.progress.add_task(_TITLE, total=1)

    def show(done: int, total: int) -> None:
        bar.progress.update(task, completed=done, total=total)
        bar.refresh()

    return show, lambda: bar.progress.remove_task(task)
