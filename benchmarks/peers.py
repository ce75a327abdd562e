"""Other libraries on the same work: the Gram of the gradients of single samples, the way each documents it.

Each function takes a model, a batch and the losses of its samples, and returns what measures them. It raises where the
library does not cover the model. Nothing in the models is replaced for their sake.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

Measure = Callable[[], Tensor]
Losses = Callable[[Any, Any], Tensor]


def torchjd(model: nn.Module, batch: Any, losses: Losses) -> Measure:
    from torchjd.autogram import Engine

    try:
        autogram = Engine(model, batch_dim=0)
    except ValueError:  # as it recommends for recurrent layers
        autogram = Engine(model, batch_dim=None)
    return lambda: autogram.compute_gramian(losses(model, batch))


def opacus(model: nn.Module, batch: Any, losses: Losses) -> Measure:
    return _opacus(model, batch, losses, "hooks")


def opacus_ew(model: nn.Module, batch: Any, losses: Losses) -> Measure:
    return _opacus(model, batch, losses, "ew")


def _opacus(model: nn.Module, batch: Any, losses: Losses, mode: str) -> Measure:
    from opacus.grad_sample.utils import prepare_module

    strict = {} if mode == "ew" else {"strict": True}
    wrapped = prepare_module(model, mode, loss_reduction="sum", **strict)

    def measure() -> Tensor:
        losses(wrapped, batch).sum().backward()
        return _contract(wrapped.named_parameters(), "grad_sample")

    return measure


def backpack(model: nn.Module, batch: Any, losses: Losses) -> Measure:
    import backpack as library
    from backpack.extensions import BatchGrad

    extended = library.extend(model)

    def measure() -> Tensor:
        with warnings.catch_warnings(), library.backpack(BatchGrad()):
            warnings.simplefilter("ignore")  # of layers that it does not cover: `_contract` finds them
            losses(extended, batch).sum().backward()
        return _contract(extended.named_parameters(), "grad_batch")

    return measure


def nngeometry(model: nn.Module, batch: Any, losses: Losses) -> Measure:
    from nngeometry.gram import GramMatrix

    if not isinstance(batch, tuple):
        raise NotImplementedError("takes batches that are tuples of tensors")
    n = len(batch[0])

    def measure() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch deprecates
            gram = GramMatrix(model, batch, function=lambda *batch: losses(model, batch).unsqueeze(1))
        found: Tensor = gram.to_torch().detach().reshape(n, n)
        return found

    return measure


def _contract(parameters: Iterable[tuple[str, nn.Parameter]], attribute: str) -> Tensor:
    """Return the Gram of the gradients that a library left in an attribute of each parameter."""
    grams = []
    for name, p in parameters:
        if getattr(p, attribute, None) is None:
            raise NotImplementedError(f"{name} gets no {attribute}")
        rows = getattr(p, attribute).detach().flatten(1)
        grams.append(rows @ rows.T)
        setattr(p, attribute, None)
        p.grad = None
    return torch.stack(grams).sum(0)


PEERS = {
    function.__name__: function
    for function in (torchjd, opacus, opacus_ew, backpack, nngeometry)
    if find_spec(function.__name__.removesuffix("_ew"))
}
