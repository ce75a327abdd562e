"""Plain autograd in a loop of its own, and how the engines are called and compared with it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from gram.zoo.registry import SAMPLES, Case, unit_of
from torch import Tensor, nn

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import gram_of_units

Grams = dict[str, Tensor]


def oracle(module: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, unit_size: int) -> Grams:
    """Return every inner product by hand: a fresh copy of the module for each unit, and ``backward()``."""
    gradients = []
    for i in range(SAMPLES // unit_size):
        twin = copy.deepcopy(module, computed(module))
        twin.zero_grad()
        for part in twin.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
            if isinstance(part, nn.RNNBase | nn.MultiheadAttention):
                part.dropout = 0.0
        loss = loss_fn(twin, unit_of(batch, slice(i * unit_size, (i + 1) * unit_size)))
        loss.sum().backward()
        zero = torch.zeros((), dtype=torch.float64)
        gradients.append({n: zero if p.grad is None else p.grad.to_dense() for n, p in twin.named_parameters()})
    return {
        name: torch.stack([torch.stack([product(g[name], h[name]) for h in gradients]) for g in gradients])
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def computed(module: nn.Module) -> dict[int, Any]:
    """Return copies of attributes that are results of others, such as a weight that a hook computes."""
    attributes = [value for part in module.modules() for value in vars(part).values()]
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two gradients in float64."""
    kind = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    return (a.to(kind).conj() * b.to(kind)).real.sum()


@contextmanager
def as_measured(unit_size: int) -> Iterator[None]:
    """Switch off what functions draw, and give BatchNorm its running statistics for units of one sample."""
    dropout, attention, batch_norm = F.dropout, F.scaled_dot_product_attention, F.batch_norm
    of_torch = torch.batch_norm

    def running(x: Any, mean: Any, var: Any, w: Any = None, b: Any = None, training: bool = False, *rest: Any) -> Any:
        return batch_norm(x, mean, var, w, b, training and (unit_size > 1 or mean is None), *rest)

    def running_of_torch(x: Any, w: Any, b: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
        return of_torch(x, w, b, mean, var, training and (unit_size > 1 or mean is None), *rest)

    def without_dropout(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, *a: Any, **kw: Any
    ) -> Any:
        return attention(q, k, v, attn_mask, 0.0, *a, **kw)

    F.dropout = lambda x, *_, **__: dropout(x, 0.0)
    F.scaled_dot_product_attention = without_dropout
    F.batch_norm, torch.batch_norm = running, running_of_torch
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention, F.batch_norm = dropout, attention, batch_norm
        torch.batch_norm = of_torch


def expected(case: Case, unit_size: int, measured: Callable[[int, Any, Grams], None]) -> None:
    """Call ``measured(measurement, batch, grams of the oracle)`` four times, with the module as it is then."""
    for measurement, batch in enumerate(case.batches):
        case.before(case.module, measurement)
        with as_measured(unit_size):
            want = oracle(case.module, case.loss_fn, batch, unit_size)
        measured(measurement, batch, want)


def measure(
    module: nn.Module, loss_fn: Any, batch: Any, unit_size: int = 1, engine: str = "auto", **options: Any
) -> tuple[Grams, str]:
    """Return the Gram of each parameter, and the engine that made them; the module is left as it was."""
    target = objective(module, loss_fn)
    options = {"dropout": False, "memory_budget": None, "progress": None, "train_batch_size": None} | options
    with untouched(module):
        return gram_of_units(Ranks(torch.device("cpu")), target, split(batch, unit_size), unit_size, engine, **options)


def error(got: Grams, want: Grams) -> float:
    """Return the largest error of a parameter's Gram, in units of the norms of the two whole gradients."""
    assert got.keys() == want.keys()
    total = sum(gram.double() for gram in want.values())
    # A gradient below 1e-13 is the rounding of a zero: activations and losses here are of order one.
    norms = total.diagonal().clamp_min(1e-26).sqrt()
    worst = 0.0
    for name, gram in got.items():
        assert gram.shape == want[name].shape
        assert torch.isfinite(gram).all(), f"the Gram of {name} is not finite"
        worst = max(worst, float(((gram.double() - want[name]).abs() / norms.outer(norms)).max()))
    return worst


class Messages(logging.Handler):
    """What the package says."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.said.append(record.getMessage())
