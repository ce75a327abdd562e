"""Losses with noise are compared with plain autograd too: a unit alone gets the numbers that it drew among others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gram.oracle import measure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.ghost import unit_losses
from lightning_gradconf.gram.loop import unit_gradients
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.plain_autograd import disagreement
from lightning_gradconf.gram.replayed_draws import Recorder, Replayer

N = 6
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


class Noisy(nn.Module):
    """A hidden layer that a function adds noise to."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noise, self.first, self.second = noise, nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.noise(self.first(x))).square().mean()


def diffused(h: Tensor) -> Tensor:
    step = torch.randint(1, 10, (len(h), 1))
    return h * (1 - step / 10) + torch.randn_like(h) * step / 10


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda h: h + torch.randn_like(h),
    "uniform": lambda h: h * torch.rand(h.shape, dtype=h.dtype),
    "one_row_for_all_samples": lambda h: h + torch.randn(5, dtype=h.dtype),
    "dropout": lambda h: F.dropout(h, 0.2),
    "dropout_of_features": lambda h: F.dropout1d(h[:, None], 0.2)[:, 0],
    "gumbel": F.gumbel_softmax,
    "bernoulli": lambda h: h * torch.bernoulli(h.detach().sigmoid()),
    "diffusion": diffused,
}


@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("noise", NOISE)
def test_a_unit_alone_has_the_gradient_that_it_has_among_the_others(noise: str, unit_size: int) -> None:
    torch.manual_seed(0)
    target = objective(Noisy(NOISE[noise]).double(), lambda module, x: module(x))
    x = torch.randn(N // unit_size, unit_size, 4, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return target.at(parameters, x, lambda loss: loss)

    with Recorder(1, len(x)) as recorder:
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(target.parameters, x)
    right, wrong = ({name: rows[i].detach().flatten() for name, rows in gradients.items()} for i in (1, 2))
    assert recorder.checked()
    assert not disagreement(target, x[1], right, torch.float64, recorder.checked())
    assert disagreement(target, x[1], wrong, torch.float64, recorder.checked())


def test_numbers_of_another_unit_are_not_taken() -> None:
    x = torch.zeros(N, 4)
    with Recorder(2, N) as recorder:
        drawn = torch.func.vmap(lambda x: x + torch.randn(4), randomness="different")(x)
    with Replayer(recorder.checked()) as replayer:
        again = torch.randn(4)
    assert replayer.has_fitted
    assert torch.equal(again, drawn[2])


@pytest.mark.parametrize("draws", [0, 2])
def test_other_draws_do_not_fit(draws: int) -> None:
    with Replayer([torch.ones(3)]) as replayer:
        for _ in range(draws):
            torch.randn(3)
    assert not replayer.has_fitted


def test_attention_that_drops_nothing_draws_nothing() -> None:
    q = torch.randn(1, 2, 3, 4)
    with Recorder(0, 1) as recorder:
        F.scaled_dot_product_attention(q, q, q)
        F.dropout(q, 0.0)
    assert recorder.checked() == []


class Wrong(torch.autograd.Function):
    """The identity, which doubles what it gets where units are computed together."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return 2 * x, dims[0]


def drawn_by_a_distribution(h: Tensor) -> Tensor:
    """Return what a variational autoencoder draws; torch.func alone refuses to."""
    return torch.distributions.Normal(h, h.exp()).rsample()


@pytest.mark.parametrize(
    ("engine", "noise"),
    [
        ("ghost", lambda h: h),
        ("vmap", lambda h: h),
        ("ghost", NOISE["normal"]),
        ("vmap", NOISE["normal"]),
        ("ghost", NOISE["dropout"]),
        ("vmap", NOISE["dropout"]),
        ("ghost", drawn_by_a_distribution),
    ],
)
def test_a_rule_for_batches_that_is_wrong_is_found(engine: str, noise: Callable[[Tensor], Tensor]) -> None:
    """Where a Function of the user's says something wrong of batches, noise in the loss must not hide it."""
    torch.manual_seed(0)
    module = Noisy(lambda h: Wrong.apply(noise(h)))
    with pytest.raises(RuntimeError, match="a unit by itself has another gradient"):
        measure(module, lambda module, x: module(x), torch.randn(N, 4), engine=engine, dropout=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_with_dropout_is_measured_by_ghost(reentrant: bool) -> None:
    """It draws its mask once more in the backward pass of the unit alone, where nothing was recorded."""
    torch.manual_seed(0)
    module = Noisy(lambda h: checkpoint(F.dropout, h, 0.5, use_reentrant=reentrant))
    for _ in range(2):
        _, engine = measure(module, lambda module, x: module(x), torch.randn(N, 4), dropout=True)
        assert engine == "ghost"


def test_a_loss_that_begins_to_set_its_seed_is_noticed_at_once() -> None:
    """The seed is set from the third measurement on, between two that are proved."""
    torch.manual_seed(0)
    seeds = False

    def noise(h: Tensor) -> Tensor:
        if seeds:
            torch.manual_seed(1)
        return h + torch.randn_like(h)

    module, x = Noisy(noise), torch.randn(N, 4)
    used = []
    for measurement in range(4):
        seeds = measurement >= 2
        used.append(measure(module, lambda module, x: module(x), x)[1])
    assert used == ["ghost", "ghost", "loop", "loop"]
    rows = unit_gradients(objective(module, lambda module, x: module(x)), split(x, 1))
    got, _ = measure(module, lambda module, x: module(x), x)
    for name, gram in got.items():
        torch.testing.assert_close(gram, rows[name] @ rows[name].T, rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """Attention has other nodes where each operation is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0]).square().mean()


@pytest.mark.parametrize(("noise", "passes"), [(False, [1] * 5), (True, [1, 1, 1, 2, 1])])
def test_a_loss_is_watched_only_where_it_draws(noise: bool, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So a measurement takes one forward pass, but for the one at which the loss begins to draw."""
    torch.manual_seed(0)
    module, x, begins = Attention(), torch.randn(N, 5, 8), False
    forward, found = unit_losses.forward, list[int]()

    def loss_fn(module: nn.Module, x: Tensor) -> Tensor:
        return module(x + torch.randn_like(x) if begins else x)

    def counted(*args: Any) -> Any:
        found[-1] += 1
        return forward(*args)

    monkeypatch.setattr("lightning_gradconf.gram.ghost.engine.forward", counted)
    for measurement in range(5):
        begins = noise and measurement > 2
        found.append(0)
        _, engine = measure(module, loss_fn, x)
        assert engine == "ghost"
    assert found == passes


def test_noise_of_a_state_that_is_put_back_is_noticed() -> None:
    """Each unit alone draws the numbers of the seed, and torch.func would give each unit others."""

    def seeded(h: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return h + torch.randn_like(h)

    torch.manual_seed(0)
    module, x = Noisy(seeded), torch.randn(N, 4)
    rows = unit_gradients(objective(module, lambda module, x: module(x)), split(x, 1))
    for _ in range(3):
        got, engine = measure(module, lambda module, x: module(x), x)
        assert engine == "loop"
        for name, gram in got.items():
            torch.testing.assert_close(gram, rows[name] @ rows[name].T, rtol=1e-5, atol=1e-6)


def test_noise_of_a_state_that_is_put_back_is_recorded() -> None:
    def forked(h: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return h + torch.randn_like(h)

    torch.manual_seed(0)
    module, x = Noisy(lambda h: Wrong.apply(forked(h))), torch.randn(N, 4)
    with pytest.raises(RuntimeError, match="a unit by itself has another gradient"):
        measure(module, lambda module, x: module(x), x, engine="ghost")
