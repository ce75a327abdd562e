"""Other libraries on the same work: the Gram of the gradients of single samples, the way each documents it.

Each function returns what measures a workload, and raises where the library does not cover it. Nothing in the models is
replaced for their sake.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor, nn
from workloads import Workload

Measure = Callable[[], Tensor]


def losses(work: Workload, model: nn.Module) -> Tensor:
    """The loss of each sample."""
    x, y = work.batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none").view(len(x), -1).mean(1)


def torchjd(work: Workload) -> Measure:
    from torchjd.autogram import Engine

    try:
        autogram = Engine(work.model, batch_dim=0)
    except ValueError:  # as it recommends for recurrent layers
        autogram = Engine(work.model, batch_dim=None)
    return lambda: autogram.compute_gramian(losses(work, work.model))


def opacus(work: Workload) -> Measure:
    return _opacus(work, "hooks")


def opacus_ew(work: Workload) -> Measure:
    return _opacus(work, "ew")


def _opacus(work: Workload, mode: str) -> Measure:
    from opacus.grad_sample.utils import prepare_module

    strict = {} if mode == "ew" else {"strict": True}
    wrapped = prepare_module(work.model, mode, loss_reduction="sum", **strict)

    def measure() -> Tensor:
        losses(work, wrapped).sum().backward()
        return _contract(wrapped.named_parameters(), "grad_sample")

    return measure


def backpack(work: Workload) -> Measure:
    import backpack as library
    from backpack.extensions import BatchGrad

    model = library.extend(work.model)

    def measure() -> Tensor:
        with warnings.catch_warnings(), library.backpack(BatchGrad()):
            warnings.simplefilter("ignore")  # of layers that it does not cover: `_contract` finds them
            losses(work, model).sum().backward()
        return _contract(model.named_parameters(), "grad_batch")

    return measure


def _contract(parameters: Iterable[tuple[str, nn.Parameter]], attribute: str) -> Tensor:
    """The Gram of the gradients that a library left in an attribute of each parameter."""
    grams = []
    for name, p in parameters:
        if getattr(p, attribute, None) is None:
            raise NotImplementedError(f"{name} gets no {attribute}")
        rows = getattr(p, attribute).detach().flatten(1)
        grams.append(rows @ rows.T)
        setattr(p, attribute, None)
        p.grad = None
    return sum(grams[1:], grams[0])


PEERS = {
    function.__name__: function
    for function in (torchjd, opacus, opacus_ew, backpack)
    if find_spec(function.__name__.removesuffix("_ew"))
}
