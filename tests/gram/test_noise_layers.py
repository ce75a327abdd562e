"""Layers of other libraries that add noise in training: still while gradients are measured."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gram.oracle import error
from torch import Tensor, nn

from lightning_gradconf import gradient_gram

N = 6


class Noise(nn.Module):
    """A layer of a kind of which each library has its own; it notes the modes in which it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.noise(x) if self.training else x


class NewEmpty(Noise):
    def noise(self, x: Tensor) -> Tensor:
        return x * x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.5).div_(0.5)


class Floor(Noise):
    def noise(self, x: Tensor) -> Tensor:
        return x.div(0.5) * (0.5 + torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype)).floor_()


class OfNumpy(Noise):
    def noise(self, x: Tensor) -> Tensor:
        return x if np.random.rand() < 0.5 else torch.zeros_like(x)


class Gaussian(Noise):
    def noise(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Net(nn.Module):
    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(3))
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.noise(self.first(x).tanh())
        return self.head(x + self.noise(self.second(x).tanh()))


def loss_fn(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y)


def measured(noise: nn.Module, engine: str = "auto", **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the Gram of a network with a layer of noise, and that of the same network without it."""
    torch.manual_seed(0)
    net = Net(noise).double()
    batch = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 4
    without = copy.deepcopy(net)
    without.noise = nn.Identity()
    return gradient_gram(net, loss_fn, batch, engine=engine, **options), gradient_gram(
        without, loss_fn, batch, engine="loop", **options
    )


@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize("kind", [NewEmpty, Floor, OfNumpy, Gaussian])
@pytest.mark.parametrize("unit_size", [1, 2])
def test_layers_of_noise_are_still(kind, engine, unit_size):
    noise = kind()
    got, want = measured(noise, engine, unit_size=unit_size)
    assert error(got, want) < 1e-9
    assert noise.training and noise.modes == [] and vars(noise).keys() == vars(kind()).keys()


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", [NewEmpty, Floor, Gaussian])
def test_with_dropout_they_are_not(kind, engine):
    got, want = measured(kind(), engine, dropout=True)
    assert error(got, want) > 1e-3


class Sample(nn.Module):
    """Draws in both modes, as data augmentation does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x - torch.randn_like(x)


class Doubles(nn.Module):
    """Does another thing in training, and draws nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x


class Learned(nn.Module):
    """Has a parameter, so its mode may mean more than noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (2 * x + 0 * torch.rand(()) if self.training else x)


class Fails(nn.Module):
    """Works in training mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no loss in evaluation mode")
        return 2 * x + 0 * torch.rand(())


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("kind", [Doubles, Learned, Fails])
def test_other_layers_are_as_in_training(kind, engine):
    torch.manual_seed(0)
    net = Net(kind()).double()
    batch = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 4
    doubled = copy.deepcopy(net)
    doubled.noise = Doubles()
    got = gradient_gram(net, loss_fn, batch, engine=engine, parameters=["first*", "second*", "head*"])
    assert error(got, gradient_gram(doubled, loss_fn, batch, engine="loop")) < 1e-9


def test_what_draws_in_both_modes_is_as_in_training():
    net = Net(Sample()).double()
    batch = torch.zeros(N, 4, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    seen: list[bool] = []
    hook = net.noise.register_forward_hook(lambda module, args, result: seen.append(module.training))
    gradient_gram(net, loss_fn, batch, engine="loop")
    hook.remove()
    assert seen == [True] * (2 * N)


def test_nothing_is_left_after_an_error():
    noise = NewEmpty()

    def fails(module: nn.Module, batch: Any) -> Tensor:
        loss_fn(module, batch)
        raise KeyError("mine")

    batch = torch.randn(N, 4), torch.arange(N) % 4
    with pytest.raises(KeyError, match="mine"):
        gradient_gram(Net(noise), fails, batch)
    assert noise.training and vars(noise).keys() == vars(NewEmpty()).keys()


class Hiding(nn.Module):
    """Hides entries in training and says which, as masked autoencoders do; in evaluation there are none."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = torch.rand(x.shape) < 0.0
        return (x.masked_fill(hidden, 0), hidden) if self.training else (x, None)


class Choosing(nn.Module):
    """Chooses softly in training, and in evaluation the largest, which has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return (x + 0 * torch.rand_like(x)).softmax(-1)
        return F.one_hot(x.argmax(-1), x.shape[-1]).to(x)


@pytest.mark.parametrize("layer", [Hiding, Choosing])
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_layers_that_give_something_else_in_evaluation_are_left_alone(layer, engine):
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module["layer"](module["first"](x))
        if isinstance(out, tuple):
            out = out[0] * (~out[1])
        return out.square().mean()

    torch.manual_seed(0)
    module, x = nn.ModuleDict({"first": nn.Linear(4, 3), "layer": layer()}).double(), torch.randn(N, 4).double()
    rows = []
    for sample in x.split(1):  # what is drawn changes nothing
        gradients = torch.autograd.grad(loss(module, sample), list(module.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    want = torch.stack(rows) @ torch.stack(rows).T
    assert want.abs().max() > 0
    grams = gradient_gram(module, loss, x, engine=engine)
    torch.testing.assert_close(sum(grams.values()), want, rtol=1e-9, atol=1e-12)
