"""A loss that asks parameters for their kind and their attributes finds while measuring what it finds in training."""

from __future__ import annotations

import copy
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


class Keyed(nn.Module):
    """Looks up a rate by the parameter itself, and writes to its weight and its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.rates = {p: 0.1 * (i + 1) for i, p in enumerate(self.parameters())}
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
            self.seen += 1
        return self.layer(x) * self.seen + self.calls + sum(self.rates[p] * p.square().sum() for p in self.parameters())


def mean_square(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().mean()


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_module_that_takes_no_copies_runs_on_its_own_tensors(engine):
    """Each unit starts from the same values, and the module has them back afterwards."""
    torch.manual_seed(0)
    module, x = Keyed().double(), torch.randn(6, 4, dtype=torch.float64)
    rows = []
    for sample in x.split(1):
        twin = copy.deepcopy(module)
        mean_square(twin, sample).backward()
        rows.append({name: p.grad.flatten() for name, p in twin.named_parameters()})
    want = {name: (stacked := torch.stack([row[name] for row in rows])) @ stacked.T for name in rows[0]}
    state = {name: t.clone() for name, t in module.state_dict().items()}
    module.layer.weight.grad = torch.ones(3, 4, dtype=torch.float64)
    for _ in range(2):
        assert error(gradient_gram(module, mean_square, x, engine=engine), want) < 1e-9
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
        assert module.calls == 0
        assert torch.equal(module.layer.weight.grad, torch.ones(3, 4, dtype=torch.float64))


def test_an_error_of_the_users_comes_up_as_it_is():
    """What is raised is the first error, not that of the second try."""
    calls = []

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        raise KeyError(f"error {len(calls)}")

    with pytest.raises(KeyError, match="error 1"):
        gradient_gram(nn.Linear(4, 3), loss, torch.randn(6, 4), engine="loop")
    assert len(calls) == 2


def test_only_some_parameters_of_a_loss_that_asks_whether_all_are_trained():
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        if not all(p.requires_grad for p in module.parameters()):
            raise ValueError("frozen")
        return module(x).square().mean()

    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    some = gradient_gram(module, loss, x, parameters="2.*")
    both = gradient_gram(module, loss, x)
    assert some.keys() == {"2.weight", "2.bias"}
    torch.testing.assert_close(some, {name: both[name] for name in some}, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, torch.randn(2, 4))])
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_scripted_and_traced_submodules(engine, compiled):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    module, x = nn.Sequential(nn.Linear(4, 4), compiled(inner)).double(), torch.randn(6, 4, dtype=torch.float64)
    rows = []
    for sample in x.split(1):
        gradients = torch.autograd.grad(mean_square(module, sample), module.parameters())
        rows.append([gradient.flatten() for gradient in gradients])
    names = [name for name, _ in module.named_parameters()]
    want = {
        name: torch.stack(own) @ torch.stack(own).T for name, own in zip(names, zip(*rows, strict=True), strict=True)
    }
    for _ in range(2):
        assert error(gradient_gram(module, mean_square, x, engine=engine), want) < 1e-9
