"""A loss that asks parameters for their kind and their attributes finds while measuring what it finds in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gram.oracle import error
from torch import Tensor, nn

from lightning_gradconf import gradient_gram


class Scaled(nn.Parameter):
    """A parameter with a method of its own, as of libraries for manifolds and quantization."""

    def doubled(self) -> Tensor:
        return 2 * self


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(4, 4), Scaled(torch.randn(4, 3))
        self.first.bias.no_decay = True
        self.first.weight.mask = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) * self.first.weight.mask) @ self.own.doubled()


def of_attributes(module: nn.Module, batch: Any) -> Tensor:
    decayed = [p for p in module.parameters() if not getattr(p, "no_decay", False)]
    return F.cross_entropy(module(batch[0]), batch[1]) + sum(p.square().sum() for p in decayed)


def of_kind(module: nn.Module, batch: Any) -> Tensor:
    weights = [part.weight for part in module.modules() if isinstance(getattr(part, "weight", None), nn.Parameter)]
    return F.cross_entropy(module(batch[0]), batch[1]) + sum(p.square().sum() for p in weights)


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize("loss_fn", [of_attributes, of_kind])
def test_the_loss_is_that_of_training(loss_fn, engine):
    torch.manual_seed(0)
    module = Net().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    gradients = []
    for i in range(6):
        module.zero_grad()
        loss_fn(module, (x[i : i + 1], y[i : i + 1])).backward()
        gradients.append({name: p.grad.flatten() for name, p in module.named_parameters()})
    module.zero_grad()
    rows = {name: torch.stack([gradient[name] for gradient in gradients]) for name in gradients[0]}
    want = {name: row @ row.T for name, row in rows.items()}
    attributes = {name: dict(vars(p)) for name, p in module.named_parameters()}
    for _ in range(2):
        assert error(gradient_gram(module, loss_fn, (x, y), engine=engine), want) < 1e-9
    assert {name: dict(vars(p)) for name, p in module.named_parameters()} == attributes
