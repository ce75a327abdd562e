"""Noise that is the same in every pass, since the loss sets its seed, so that all units get the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gram.zoo.registry import Model, case, cross_entropy, pairs
from torch import Tensor, nn


def with_noise(draw: Callable[[Tensor], Tensor]) -> Any:
    """Return a network with noise on its hidden layer."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.second(h * draw(h))

    return Model(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def seed_set_in_the_loss() -> Any:
    """As code does that wants one mask for a whole epoch."""

    def draw(h: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.randn_like(h)

    return with_noise(draw)


@case
def seed_set_between_two_draws() -> Any:
    """The first numbers are multiplied with zero, so that the loss is one that a test can know."""

    def draw(h: Tensor) -> Tensor:
        free = torch.randn_like(h)
        torch.manual_seed(3)
        return torch.randn_like(h) + 0 * free

    return with_noise(draw)


@case
def seed_set_in_a_fork() -> Any:
    """The state afterwards is what it was before."""

    def draw(h: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return torch.randn_like(h)

    return with_noise(draw)


@case
def state_of_the_generator_set_in_the_loss() -> Any:
    """One state for every pass."""
    state = torch.Generator().manual_seed(3).get_state()

    def draw(h: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return torch.randn_like(h)

    return with_noise(draw)


@case
def generator_made_in_the_loss() -> Any:
    """A generator that is new in every pass."""
    return with_noise(lambda h: torch.randn(h.shape, generator=torch.Generator().manual_seed(3), dtype=h.dtype))
