"""How BatchNorm and dropout behave while gradients are measured.

Their calls are rewritten on the way to PyTorch, wherever they come from: a layer, an attention module, a recurrent
one, or a functional call. No module is changed, and no ``training`` flag, since some models return a loss only in
training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_gradconf.gram.dropout import without_dropout


class MeasurementMode(TorchFunctionMode):
    """Within this context, BatchNorm never touches its buffers, and dropout is off if asked.

    Args:
        running_statistics: Normalise with the running statistics also in training mode, as gradients of single
            samples require. Otherwise BatchNorm is in its module's own mode.
        dropout: False sets the probability of every dropout to zero.
    """

    def __init__(self, *, running_statistics: bool, dropout: bool) -> None:
        super().__init__()
        self.running_statistics = running_statistics
        self.dropout = dropout

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with the arguments it has while measuring."""
        args, kwargs = self.arguments(func, args, kwargs or {})
        return func(*args, **kwargs)

    def arguments(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that a call has while measuring."""
        if func is F.batch_norm:
            return _batch_norm(self.running_statistics, *args, **kwargs), {}
        if func is torch.batch_norm:
            return _batch_norm_of_torch(self.running_statistics, *args, **kwargs), {}
        if func is F.instance_norm:
            return _instance_norm(*args, **kwargs), {}
        return (args, kwargs) if self.dropout else without_dropout(func, args, kwargs)


def _batch_norm(
    running_statistics: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    if training and running_statistics and running_mean is not None:
        training = False
    elif training:
        # Without buffers the output is the same, nothing is updated, and torch.func can batch it.
        running_mean = running_var = None
    return input, running_mean, running_var, weight, bias, training, momentum, eps


def _batch_norm_of_torch(
    running_statistics: bool,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *options: Any,
) -> tuple[Any, ...]:
    given = _batch_norm(running_statistics, input, running_mean, running_var, weight, bias, training)
    input, running_mean, running_var, weight, bias, training, *_ = given
    return input, weight, bias, running_mean, running_var, training, *options


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    if use_input_stats:  # the buffers would only be written to
        running_mean = running_var = None
    return input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
