"""Dropout that is a function: its calls get a probability of zero, wherever they come from.

That covers the layers of PyTorch, its attention and its recurrent layers. Layers of other libraries that draw for
themselves are in `noise_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DROPOUTS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.native_dropout,
    torch.alpha_dropout, torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
)  # fmt: skip
# The position of the dropout probability among the positional arguments, and its keyword.
_PROBABILITY: dict[Callable[..., Any], tuple[int, str]] = {
    **dict.fromkeys(_DROPOUTS, (1, "p")),
    F.scaled_dot_product_attention: (4, "dropout_p"),
    F.multi_head_attention_forward: (10, "dropout_p"),
}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def without_dropout(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with a dropout probability of zero, where ``func`` has one."""
    if func in _PROBABILITY:
        position, keyword = _PROBABILITY[func]
    elif func in _RECURRENT:
        packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
        position, keyword = (6 if packed else 5), "dropout"
    else:
        return args, kwargs
    if len(args) > position:
        return (*args[:position], 0.0, *args[position + 1 :]), kwargs
    return args, kwargs | {keyword: 0.0}
