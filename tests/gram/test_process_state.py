"""Rounding of float32 to TF32 or bfloat16, which users allow for speed: measurements compare without it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram import process_state
from lightning_gradconf.gram.ghost import factors
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.process_state import full_float32, rounds_float32
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import gram_of_units

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETTING = {"may_round": True}


@pytest.fixture(autouse=True)
def put_back() -> Any:
    precision = torch.get_float32_matmul_precision()
    SETTING["may_round"] = True
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(("device", "precision"), [(CPU, "medium"), (GPU, "high"), (GPU, "medium")])
def test_what_the_user_allows_is_forbidden_for_a_while(device: torch.device, precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    assert rounds_float32(device)
    with full_float32(device):
        assert not rounds_float32(device)
    assert rounds_float32(device)
    assert torch.get_float32_matmul_precision() == precision


def test_by_default_only_gpus_round() -> None:
    assert not rounds_float32(CPU)
    assert rounds_float32(GPU), "in convolutions"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_reads_the_old_settings_works_meanwhile(precision: str) -> None:
    """As gradient penalties through an LSTM do: PyTorch refuses to where the new settings say something else."""
    torch.set_float32_matmul_precision(precision)
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with full_float32(GPU):
        assert not torch.backends.cuda.matmul.allow_tf32
        with torch.backends.cudnn.flags(enabled=False):
            pass
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == allowed


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="settings that others follow are of torch 2.9"
)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_settings_that_follow_a_general_one_go_on_to_follow(precision: str) -> None:
    backends: Any = torch.backends
    parts = backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn
    for part in (*parts, backends):
        part.fp32_precision = "none"
    try:
        backends.fp32_precision = precision
        with full_float32(CPU):
            assert all(part.fp32_precision == "ieee" for part in parts)
        assert all(part.fp32_precision == precision for part in parts)
        backends.fp32_precision = "ieee"
        assert all(part.fp32_precision == "ieee" for part in parts)
    finally:
        backends.fp32_precision = "none"


class Rounding(torch.autograd.Function):
    """The product of a GPU that may round its factors to ten bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rounded(x) @ rounded(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = map(rounded, ctx.saved_tensors)
        return rounded(gradient) @ weight.T, x.T @ rounded(gradient)


def rounded(x: Tensor) -> Tensor:
    return x.half().to(x.dtype) if SETTING["may_round"] else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Rounding.apply(x, self.weight).tanh()).square().mean()


def test_proofs_and_contractions_do_not_round(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(value: bool) -> None:
        SETTING["may_round"] = value

    monkeypatch.setattr(process_state, "_roundings", lambda device: [(lambda: SETTING["may_round"], write, (False,))])
    contracted = []
    gram_of_sum = factors._gram_of_sum

    def noted(parts: Any, workspace: Any) -> Tensor:
        contracted.append(SETTING["may_round"])
        return gram_of_sum(parts, workspace)

    monkeypatch.setattr(factors, "_gram_of_sum", noted)
    torch.manual_seed(0)
    module, x = Net(), torch.randn(5, 6)
    target = objective(module, lambda module, x: module(x))
    exact = (1, 2, 4, 8)
    with caplog.at_level(logging.WARNING):
        for measurement in range(1, 9):
            grams, engine = gram_of_units(Ranks(CPU), target, split(x, 1), 1)
            assert engine == "ghost" and SETTING["may_round"]
            SETTING["may_round"] = False
            wanted, _ = gram_of_units(Ranks(CPU), target, split(x, 1), 1, "loop")
            SETTING["may_round"] = True
            errors = [float((grams[name] - wanted[name]).norm() / wanted[name].norm()) for name in grams]
            assert max(errors) < (1e-5 if measurement in exact else 5e-3), measurement
            assert measurement in exact or max(errors) > 1e-5, "a measurement without a proof computes as the training"
    assert not caplog.records
    assert contracted and not any(contracted)
