"""torchmetrics objects while units are measured: they see nothing, and return what one real call returned.

A metric that a loss function calls for its logs would count each unit, would be computed for each, and fails under
torch.func where it looks at values. What it returns matters to nobody then, except in a loss that is computed with it.
So the loss of one unit is computed once with the real metrics, and what they return is recorded; it is computed again
with other answers, and if the loss is another one too, the real metrics are used.

Calls are intercepted where Python looks up the method of a metric, in the thread that measures and only while it
does: registered metrics, those in lists, globals, and those that the loss function makes for itself.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torchmetrics import Metric, MetricCollection

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.module_state import reachable, untouched
from lightning_gradconf.gram.objective import LossFn, Objective

METRICS: tuple[type, ...] = (Metric, MetricCollection)
# Added to recorded answers to see whether the loss depends on them. Large changes get past thresholds and clamps.
_CHANGES = (1, 10**6, -(10**6))
_METHODS = frozenset({"forward", "update", "compute", "reset", "sync"})
# Handles a call of a metric's method: takes the metric, the name of the method, and a function that makes the call.
_Handler = Callable[[Any, str, Callable[[], Any]], Any]
_Key = tuple[int | type, str]


@contextmanager
def answered(objective: Objective, unit: Any) -> Iterator[Objective]:
    """Within this context, metrics answer as they did on ``unit``, and are neither updated nor computed.

    Yields the objective that the engines take in place of ``objective``, also under torch.func; its module and its
    parameters are the same. A metric without a recorded answer is called as it is, and so are all if the loss depends
    on one; none of them talks to other ranks. For a loss without metrics it is ``objective`` itself.

    Answers are recorded where a metric can be reached from the module, or was called in an earlier measurement. They
    are kept weakly, by module and loss function, and recorded anew in every call whose number is a power of two. To be
    entered within `untouched` and `MeasurementMode`.
    """
    found = _found(objective)
    found.calls += 1
    if found.calls & (found.calls - 1) == 0:
        found.recording = None
    if found.recording is None and (
        found.noticed or any(isinstance(value, METRICS) for value in reachable(objective.module))
    ):
        try:
            found.recording = _recorded(objective, unit)
        except Exception:  # the user's own, which an engine meets again and reports
            found.recording = _Recording()
    if found.recording is None:
        with _handled(found.notice):
            yield objective
        found.recording = None if found.noticed else _Recording()
    elif not found.recording.metrics:
        yield objective
    else:
        playing = _Playing(found.recording.answers)

        def loss_fn(module: Any, batch: Any) -> Tensor:
            playing.asked.clear()
            return objective.loss_fn(module, batch)

        with _handled(playing):
            yield replace(objective, loss_fn=loss_fn)


def _found(objective: Objective) -> _Found:
    try:
        return _known.setdefault(objective.module, WeakKeyDictionary()).setdefault(objective.loss_fn, _Found())
    except TypeError:  # a callable without a hash
        return _Found()


def _recorded(objective: Objective, unit: Any) -> _Recording:
    """Return the metrics that the loss of a unit calls and their answers; nothing if the loss depends on it."""
    recording = _Recording()
    loss = _loss(objective, unit, recording)
    if not recording.metrics:
        return recording
    for change in _CHANGES:
        others = {
            key: [tree_map(partial(_another, change), answer) for answer in answers]
            for key, answers in recording.answers.items()
        }
        try:
            same = torch.allclose(loss, _loss(objective, unit, _Playing(others)), rtol=1e-5, atol=0.0, equal_nan=True)
        except Exception:  # such as a loss that is a metric, and has no graph now
            same = False
        if not same:
            recording.answers.clear()
            break
    return recording


def _loss(objective: Objective, unit: Any, handler: _Handler) -> Tensor:
    with untouched(objective.module), _handled(handler):
        return objective.at(objective.copies(), copy_of(unit), Tensor.detach)


def _another(change: int, answer: Any) -> Any:
    """Return some other answer of the same kind."""
    if isinstance(answer, Tensor):
        return ~answer if answer.dtype == torch.bool else answer + change
    if isinstance(answer, bool):
        return not answer
    return answer + change if isinstance(answer, int | float) else answer


@dataclass
class _Recording:
    """Calls real metrics and keeps them, and what they return."""

    metrics: list[Any] = field(default_factory=list)
    answers: dict[_Key, list[Any]] = field(default_factory=lambda: defaultdict(list))
    inside: bool = False

    def __call__(self, metric: Any, method: str, call: Callable[[], Any]) -> Any:
        """Call ``method``, and keep what it returns unless another metric called it."""
        if self.inside:
            return call()
        self.inside = True
        try:
            answer = call()
        except Exception:  # a score that takes two samples, say
            nan = torch.tensor(float("nan"))
            answer = {name: nan for name in metric} if isinstance(metric, nn.ModuleDict) else nan
        finally:
            self.inside = False
        kept = tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), answer)
        self.answers[id(metric), method].append(kept)
        self.answers[type(metric), method].append(kept)  # for one that is made anew in each call of the loss
        self.metrics.append(metric)  # so that its address is not that of another some day
        return answer


@dataclass
class _Playing:
    """Answers the k-th call of a metric's method with the k-th recorded answer."""

    answers: dict[_Key, list[Any]]
    asked: Counter[_Key] = field(default_factory=Counter)

    def __call__(self, metric: Any, method: str, call: Callable[[], Any]) -> Any:
        """Answer a call of ``method``, or call it if it was not called when answers were recorded."""
        key: _Key = (id(metric), method)
        if key not in self.answers:
            key = (type(metric), method)
        if key not in self.answers:
            return call()
        answers = self.answers[key]
        answer = answers[min(self.asked[key], len(answers) - 1)]
        self.asked[key] += 1
        return tree_map_only(Tensor, Tensor.clone, answer)


@dataclass
class _Found:
    """What is known of the metrics of a loss function, and how often it was asked for."""

    calls: int = 0
    recording: _Recording | None = None
    noticed: bool = False

    def notice(self, metric: Any, method: str, call: Callable[[], Any]) -> Any:
        """Call ``method``, and know from then on that metrics are called."""
        self.noticed = True
        return call()


_known: WeakKeyDictionary[nn.Module, WeakKeyDictionary[LossFn, _Found]] = WeakKeyDictionary()


# ---- how calls are intercepted --------------------------------------------------------------------------------------

_here = threading.local()
_lock = threading.Lock()
_handling = 0  # contexts, in all threads


@contextmanager
def _handled(handler: _Handler) -> Iterator[None]:
    """Within this context, ``handler`` gets the calls that this thread makes to metrics; none of them syncs ranks."""
    global _handling  # noqa: PLW0603 - counts the contexts of all threads
    outer = getattr(_here, "handler", None)
    with _lock:
        _handling += 1
        if _handling == 1:
            for cls in METRICS:
                cls.__getattribute__ = _intercepting(cls.__getattribute__)  # type: ignore
    _here.handler = handler
    try:
        yield
    finally:
        _here.handler = outer
        with _lock:
            _handling -= 1
            if _handling == 0:
                for cls in METRICS:
                    del cls.__getattribute__


def _intercepting(usual: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def get(metric: Any, name: str) -> Any:
        value = usual(metric, name)
        if name not in _METHODS or getattr(_here, "handler", None) is None:
            return value
        return _method(metric, name, value) if name != "sync" else lambda *args, **kwargs: None

    return get


def _method(metric: Any, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)  # metrics look at the signature of their `update`
    def method(*args: Any, **kwargs: Any) -> Any:
        handler: _Handler | None = getattr(_here, "handler", None)
        if handler is None:  # a metric made in the meantime keeps the method
            return real(*args, **kwargs)
        return handler(metric, name, lambda: real(*args, **kwargs))

    return method
