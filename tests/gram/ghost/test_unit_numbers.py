"""Numbers that user code has kept beyond a measurement are ordinary ones."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from gram.oracle import measure
from torch import Tensor, nn

from lightning_gradconf.gram.ghost.unit_numbers import UnitNumber


@pytest.fixture
def kept() -> Any:
    """Return a number of each unit, from a pass that has ended, and the first unit's."""
    numbers: list[Any] = []

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        found = module(x).square().mean()
        numbers.append(found.item())
        return found

    torch.manual_seed(0)
    measure(nn.Linear(3, 1).double(), loss, torch.randn(4, 3, dtype=torch.float64), 1, "ghost")
    return next((number, number._values[0]) for number in numbers if type(number) is UnitNumber)


def test_a_number_is_ordinary_after_the_pass(kept: Any) -> None:
    number, first = kept
    assert type(first) is float
    for function in (
        float, int, bool, str, repr, round, hash, math.sqrt, abs, torch.tensor, copy.copy, copy.deepcopy,
        lambda v: v < 1, lambda v: min(v, 1e9), lambda v: f"{v:.3f}", lambda v: v + 1,
        lambda v: 1 / v, lambda v: sum([v, v]), lambda v: np.mean([v, v]), lambda v: {v: 1}[first],
        lambda v: torch.ones(2).mul(v), lambda v: torch.ones(2) * v,
        *([] if torch.__version__ < (2, 7) else [lambda v: torch.full((2,), v)]),  # there it takes Python's own alone
        lambda v: v.is_integer(), lambda v: pickle.loads(pickle.dumps(v)), lambda v: json.dumps(v + 0),
    ):  # fmt: skip
        got, want = function(number), function(first)
        assert isinstance(got, type(want))
        assert torch.equal(got, want) if isinstance(want, Tensor) else got == want
    assert np.exp(number) == np.exp(first)


def test_numbers_of_two_passes_meet(kept: Any) -> None:
    """One has ended, and is a constant for the other."""
    number, first = kept

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        found = module(x).square().mean()
        return found * (number + found.item()) * (found.item() - number)

    def plain(module: nn.Module, x: Tensor) -> Tensor:
        found = module(x).square().mean()
        return found * (first + found.item()) * (found.item() - first)

    module, x = nn.Linear(3, 1).double(), torch.randn(6, 3, dtype=torch.float64)
    got, engine = measure(module, loss, x, 1)
    assert engine == "ghost"
    torch.testing.assert_close(got, measure(module, plain, x, 1, "loop")[0])


def test_a_number_is_none_of_one_unit_during_the_pass() -> None:
    """Nothing may take the first unit's for all."""
    met: list[type] = []

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        found = module(x).square().mean()
        if type(found.item()) is not UnitNumber:  # a unit by itself
            return found
        for function in (float, math.sqrt, pickle.dumps, lambda v: v.hex(), np.float64):
            with pytest.raises(Exception, match="units have different values") as error:
                function(found.item())
            met.append(error.type)
        return found

    with pytest.raises(Exception, match="more than 4 different ways"):
        measure(nn.Linear(3, 1).double(), loss, torch.randn(6, 3, dtype=torch.float64), 1, "ghost")
    assert len(met) >= 5
