"""What keeps the user's code silent while it is called to measure: loggers that write nothing, and no log records."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

_PLAIN = (str, int, float, Path, type(None))


def silent(logger: Any) -> Any:
    """Return a logger of the same class that gives the plain values of ``logger`` and does nothing.

    Plain values are texts, numbers and paths, such as ``log_dir``, ``save_dir``, ``name`` and ``version``. All else,
    such as ``experiment`` and the methods, can be called, indexed and entered without an effect.
    """
    kind: Any = type(logger)
    stand_in: Any = object.__new__(_silent_class(kind))
    object.__setattr__(stand_in, "_silenced", logger)
    return stand_in


@contextmanager
def without_logging() -> Iterator[None]:
    """Drop what this thread logs by Python's ``logging``, but for what this package says itself."""
    call_handlers, thread = logging.Logger.callHandlers, threading.get_ident()

    def call_handlers_of_others(self: logging.Logger, record: logging.LogRecord) -> None:
        if record.thread != thread or self.name.startswith("lightning_gradconf"):
            call_handlers(self, record)

    logging.Logger.callHandlers = call_handlers_of_others  # type: ignore[method-assign]
    try:
        yield
    finally:
        logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign]


class _Nothing:
    """Stands in for whatever a logger has."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> _Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


_NOTHING = _Nothing()


@lru_cache(maxsize=64)
def _silent_class(kind: Any) -> Any:
    # A subclass, since user code and ``trainer.log_dir`` ask of which class a logger is.
    return type(f"Silent{kind.__name__}", (kind,), {"__getattribute__": _attribute})


def _attribute(self: Any, name: str) -> Any:
    if name.startswith("__"):
        return object.__getattribute__(self, name)
    if name == "experiment":  # asking a logger for it may start a run
        return _NOTHING
    value = getattr(object.__getattribute__(self, "__dict__")["_silenced"], name)
    return value if isinstance(value, _PLAIN) else _NOTHING
