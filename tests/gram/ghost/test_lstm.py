"""The fused LSTM of a CPU: the gradients of its gates, without its own backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gram.zoo.registry import Model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradconf import gradient_gram


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest error of the total Gram, in units of the norms of the two gradients."""
    got_sum, want_sum = (sum(gram.double() for gram in grams.values()) for grams in (got, want))
    norms = want_sum.diagonal().sqrt()
    return float(((got_sum - want_sum).abs() / norms.outer(norms).clamp_min(1e-300)).max())


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "lstm": lambda: (nn.LSTM(3, 4, batch_first=True), torch.randn(6, 5, 3)),
    "stacked bidirectional lstm": lambda: (nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(6, 5, 3)),
    "lstm without biases": lambda: (nn.LSTM(3, 4, bias=False, batch_first=True), torch.randn(6, 5, 3)),
    "lstm with as many steps as samples": lambda: (nn.LSTM(3, 4, batch_first=True), torch.randn(6, 6, 3)),
    "gru": lambda: (nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), torch.randn(6, 5, 3)),
}


@pytest.mark.parametrize("state", [False, True], ids=["outputs", "last state"])
@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers_in_float32(name, state):
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    first = layer.batch_first

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out, last = module(x if first else x.transpose(0, 1))
        if state:
            return (last[0] if isinstance(last, tuple) else last).transpose(0, 1).square().mean()
        return out.square().mean()

    got = gradient_gram(layer, loss, x, engine="ghost")
    assert error(got, gradient_gram(layer.double(), loss, x.double(), engine="loop")) < 1e-5


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("states", [False, True], ids=["outputs", "states"])
def test_below_a_fused_lstm_gradients_come_from_its_gates(states, unit_size):
    """Its first states, its input and what goes around it all have parameters below."""
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor) -> Tensor:
        first = self.first(x.mean(1)).unflatten(1, (8, 4)).transpose(0, 1).contiguous()
        below = self.below(x)
        out, (state, cell) = self.rnn(below, (first[:4], 3 * first[4:]))
        seen = torch.cat([state, cell]).transpose(0, 1) if states else out
        return torch.cat([seen.flatten(1), below.flatten(1)], 1)

    rnn = nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    model = Model(forward, first=nn.Linear(3, 32), below=nn.Linear(3, 3), rnn=rnn)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    x = torch.randn(6, 5, 3)
    for _ in range(3):  # the third is without a proof
        ran = Operations()
        with ran:
            got = gradient_gram(model, loss, x, engine="ghost", unit_size=unit_size)
    assert "aten::mkldnn_rnn_layer" in ran.names
    assert "aten::mkldnn_rnn_layer_backward" not in ran.names
    want = gradient_gram(model.double(), loss, x.double(), engine="loop", unit_size=unit_size)
    for name in want:
        assert error({name: got[name]}, {name: want[name]}) < 1e-5, name
