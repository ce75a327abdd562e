"""Checks of the callback's arguments: each returns the value in its plain form, or says what to write instead."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

from torch import nn
from torch.utils.data import DataLoader

from lightning_gradconf.gram.memory_budget import bytes_of
from lightning_gradconf.gram.select import Engine
from lightning_gradconf.statistics import statistic_names

Init = TypeVar("Init", bound=Callable[..., None])

# What other callbacks, or an earlier version of this one, call it.
_OTHER_NAMES = {
    "log_every_n_steps": "every_n_train_steps",
    "every_n_steps": "every_n_train_steps",
    "logging_interval": "every_n_train_steps",
    "batch_size": "unit_size",
    "num_samples": "num_units",
    "log_key_prefix": "prefix",
    "dataloader": "source",
}
_BY_CLASS = ("within_class_cosine", "between_class_cosine")
_OF_THE_MEASUREMENT = ("num_units", "seconds")  # no functions of the Gram
LOSS_FN = "loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])"
_LOSS_FN = f"loss_fn takes the module and a batch, and returns the loss of the batch: {LOSS_FN}"


def keywords_only(init: Init) -> Init:
    """Explain positional and unknown arguments, and keep those that differ from the defaults in ``_given``."""
    defaults = {name: p.default for name, p in inspect.signature(init).parameters.items() if name != "self"}

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        kind = type(self).__name__
        if args:
            raise TypeError(
                f"{kind} takes arguments by name only, found {args[0]!r} without one; "
                f"write for example {kind}(every_n_train_steps=50)"
            )
        for name in kwargs.keys() - defaults.keys():
            close = _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, defaults)), None)
            remedy = f"use {close}=" if close else f"its arguments are {', '.join(defaults)}"
            raise TypeError(f"{kind} has no argument {name}={kwargs[name]!r}; {remedy}")
        init(self, **kwargs)
        self._given = {name: value for name, value in kwargs.items() if not _equal(value, defaults[name])}

    return checked  # type: ignore[return-value]


def shown(value: Any) -> str:
    """Return a value as it is written in a call; a function by its name."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, Sequence):
        return repr(list(value))
    name = getattr(value, "__qualname__", None)
    return name if name is not None else f"<{type(value).__name__}>"


def integer(least: int, **argument: Any) -> int:
    """Return an integer that is at least ``least``."""
    ((name, value),) = argument.items()
    number = _plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    return number


def interval(**argument: Any) -> int | None:
    """Return an interval in steps or epochs, or None."""
    ((_, value),) = argument.items()
    return None if value is None else integer(1, **argument)


def flag(**argument: Any) -> bool:
    """Return True or False."""
    ((name, value),) = argument.items()
    if isinstance(value, str) or value not in (True, False):
        raise ValueError(f"{name}={value!r} must be True or False")
    return bool(value)


def share(max_overhead: Any) -> float | None:
    """Return ``max_overhead``, a part of the run's time, or None for no bound."""
    if max_overhead is None:
        return None
    if isinstance(max_overhead, int | float) and not isinstance(max_overhead, bool) and 0 < max_overhead <= 1:
        return float(max_overhead)
    raise ValueError(
        f"max_overhead={max_overhead!r} must be a part of the run's time, above 0 and at most 1: 0.05 is 5 %. None "
        "keeps to the interval of the Trainer, whatever it costs"
    )


def size_of_unit(unit_size: Any) -> Any:
    """Return ``unit_size``, a number of samples or "batch"."""
    if isinstance(unit_size, str) and unit_size != "batch":
        raise ValueError(f"unit_size={unit_size!r} must be a number of samples, or 'batch' for a whole batch")
    return unit_size if unit_size == "batch" else integer(1, unit_size=unit_size)


def data_source(source: Any) -> Any:
    """Return ``source``, one of three words or a DataLoader."""
    if isinstance(source, DataLoader) or (isinstance(source, str) and source in ("current", "fresh", "fixed")):
        return source
    found = repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
    remedy = "" if isinstance(source, str) else "; wrap a dataset in a DataLoader"
    raise ValueError(f"source={found} is not 'current', 'fresh', 'fixed' or a DataLoader{remedy}")


def engine_name(engine: Any) -> Any:
    """Return the name of an engine."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r} is not one of {', '.join(map(repr, get_args(Engine)))}")
    return engine


def budget(memory_budget: Any) -> Any:
    """Return ``memory_budget``, bytes or a text with a unit, or None."""
    if memory_budget is not None:
        bytes_of(_plain(memory_budget))
    return _plain(memory_budget)


def patterns(parameters: Any) -> Any:
    """Return ``parameters``, one or several glob patterns on names, or None."""
    if parameters is None or (isinstance(parameters, str) and parameters):
        return parameters
    names = isinstance(parameters, Sequence) and not isinstance(parameters, str)
    if names and parameters and all(isinstance(name, str) for name in parameters):
        return tuple(parameters)
    raise ValueError(
        f"parameters={parameters!r} must be a pattern on names of parameters, such as 'encoder.*', or a list of them; "
        "leave it out to measure all"
    )


def loss_function(loss_fn: Any) -> Any:
    """Return ``loss_fn``, a function of a module and a batch, or None."""
    if loss_fn is None:
        return None
    if not callable(loss_fn):
        raise ValueError(f"loss_fn={loss_fn!r} is not a function; {_LOSS_FN}")
    if isinstance(loss_fn, nn.Module) or str(getattr(loss_fn, "__module__", "")).startswith("torch."):
        raise ValueError(f"loss_fn={shown(loss_fn)} compares outputs with targets; {_LOSS_FN}")
    try:
        inspect.signature(loss_fn).bind("module", "batch")
    except TypeError:
        raise ValueError(f"loss_fn={shown(loss_fn)} cannot be called with two arguments; {_LOSS_FN}") from None
    except ValueError:  # written in C, without a signature
        pass
    return loss_fn


def names_of_statistics(statistics: Any, with_labels: bool) -> tuple[str, ...]:
    """Return the names that ``statistics`` stands for; with labels, those of classes are among the default ones."""
    if isinstance(statistics, str):
        more = {"default": _BY_CLASS if with_labels else (), "all": _OF_THE_MEASUREMENT}
        return statistic_names(statistics, with_labels=with_labels) + more.get(statistics, ())
    if not isinstance(statistics, Sequence) or not statistics:
        raise ValueError(
            f"statistics={statistics!r} names nothing to log; give names such as ['eta', 'min_cosine'], 'default' or "
            "'all'"
        )
    statistic_names([name for name in statistics if name not in _OF_THE_MEASUREMENT], with_labels=with_labels)
    return tuple(statistics)


def depth(per_layer: Any) -> bool | int:
    """Return ``per_layer``, True, False or a depth of names."""
    return per_layer if isinstance(per_layer, bool) else integer(0, per_layer=per_layer)


def with_matplotlib(figures: Any) -> bool:
    """Return ``figures``, which needs matplotlib."""
    if flag(figures=figures) and find_spec("matplotlib") is None:
        raise ValueError("figures=True needs matplotlib: pip install matplotlib scipy")
    return bool(figures)


def place_of_labels(labels: Any, unit_size: Any) -> Any:
    """Return ``labels``, a key, an index or a function, or None."""
    if labels is not None and unit_size != 1:
        raise ValueError(f"labels= gives each unit one class, so it needs unit_size=1, found {unit_size!r}")
    place = _plain(labels)
    if place is None or callable(place) or (isinstance(place, str | int) and not isinstance(place, bool)):
        return place
    raise ValueError(
        f"labels={labels!r} must say where a batch has its classes: a key, an index, or a function of the batch"
    )


def first_part_of_keys(prefix: Any) -> str:
    """Return ``prefix``, one or several words with slashes between them."""
    if not isinstance(prefix, str) or not prefix or "" in prefix.split("/"):
        example = prefix.strip("/") if isinstance(prefix, str) and prefix.strip("/") else "gradient_confusion"
        raise ValueError(
            f"prefix={prefix!r} must be a word that keys begin with, without a slash at either end; write prefix="
            f"{example!r}"
        )
    return prefix


def _plain(value: Any) -> Any:
    """Return an integer of NumPy or torch as one of Python, and all else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _equal(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
