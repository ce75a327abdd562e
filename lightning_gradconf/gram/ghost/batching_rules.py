"""Rules for operations that torch.func cannot batch, or batches slowly: fold the units into the operation's own batch.

A rule is called with the mode, the function and its arguments, and may return NotImplemented to let vmap try.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradconf.gram.ghost.functorch import batched, below_vmap, in_front, is_batched, level_of

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode


def fold(n: int, function: Callable[..., Any], *tensors: Any) -> Any:
    """Return what ``function`` makes of the tensors of all units, ``(n, ...)`` each; it runs below vmap.

    Raises:
        NotImplementedError: The user's own vmap is around a tensor.
    """
    level = max(level_of(tensor) for tensor in tensors if is_batched(tensor))
    if any(is_batched(tensor) and level_of(tensor) != level for tensor in tensors):
        raise NotImplementedError("tensors of the units meet those of a vmap of the loss's own")
    rows = [in_front(tensor, n) if isinstance(tensor, Tensor) else tensor for tensor in tensors]
    with below_vmap():
        result = function(*rows)
    if isinstance(result, tuple):
        return tuple(batched(part, level) for part in result)
    return batched(result, level)


def _fold_samples(n: int, function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """Return what ``function`` makes of tensors with samples in front: those of all units, one unit after the other."""

    def of_all(*tensors: Any) -> Any:
        shape = tensors[0].shape[:2]
        result = function(*(None if tensor is None else tensor.flatten(0, 1) for tensor in tensors))
        if isinstance(result, tuple):
            return tuple(torch.unflatten(part, 0, shape) for part in result)
        return torch.unflatten(result, 0, shape)

    return fold(n, of_all, *tensors)


def _attention(
    mode: UnitMode,
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.dim() < 3 or not query.dim() == key.dim() == value.dim():
        return NotImplemented

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch = query.shape[:-3]  # (n, ...), before (heads, time, features)
        if mask is not None:
            while mask.dim() < query.dim():
                mask = mask.unsqueeze(1)
            mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
        q, k, v = (t.flatten(0, -4) for t in (query, key, value))
        result = function(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return torch.unflatten(result, 0, batch)

    return fold(mode.n, attend, query, key, value, attn_mask)


def _recurrent(
    mode: UnitMode, function: Callable[..., Any], input: Tensor, states: Any, weights: Any, *options: Any
) -> Any:
    if not isinstance(weights, list | tuple) or any(map(is_batched, weights)):
        return NotImplemented  # a packed sequence
    is_lstm, batch = isinstance(states, list | tuple), 0 if options[-1] else 1  # options end with batch_first

    def run(input: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        n = len(input)
        rows = input.movedim(0, batch).flatten(batch, batch + 1)
        first = [state.movedim(0, 1).flatten(1, 2) for state in states]  # (layers, n * k, features)
        output, *last = function(rows, first if is_lstm else first[0], weights, *options)
        return (
            torch.unflatten(output, batch, (n, -1)).movedim(batch, 0),
            *(torch.unflatten(state, 1, (n, -1)).movedim(1, 0) for state in last),
        )

    return fold(mode.n, run, input, *(states if is_lstm else (states,)))


def _recurrent_cell(
    mode: UnitMode, function: Callable[..., Any], input: Tensor, states: Any, *weights: Tensor | None
) -> Any:
    if any(map(is_batched, weights)):
        return NotImplemented
    is_lstm = isinstance(states, list | tuple)

    def step(input: Tensor, *before: Tensor) -> Any:
        return function(input, before if is_lstm else before[0], *weights)

    return _fold_samples(mode.n, step, input, *(states if is_lstm else (states,)))


def _cross_entropy(
    mode: UnitMode,
    function: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if is_batched(weight) or size_average is not None or reduce is not None or target.is_floating_point():
        return NotImplemented
    smoothing = {"label_smoothing": label_smoothing} if function is F.cross_entropy else {}

    def losses(input: Tensor, target: Tensor) -> Tensor:
        single = input.dim() == 2  # one sample a unit, without a dimension of its own
        rows, targets = (input, target) if single else (input.flatten(0, 1), target.flatten(0, 1))
        found = function(rows, targets, weight, ignore_index=ignore_index, reduction="none", **smoothing)
        if reduction == "none":
            return found if single else torch.unflatten(found, 0, (len(input), -1))
        total = found.reshape(len(input), -1)
        total = total.squeeze(1) if total.shape[1] == 1 else total.sum(1)
        if reduction == "sum":
            return total
        counted = target != ignore_index
        if weight is None:
            if counted.all():
                return total / counted[0].numel() if counted[0].numel() > 1 else total
            counted = counted.to(total.dtype)
        else:
            counted = weight.to(total.dtype)[target.where(counted, 0)] * counted
        return total / counted.reshape(len(input), -1).sum(1)

    return fold(mode.n, losses, input, target)


def _batch_norm(
    mode: UnitMode,
    function: Callable[..., Tensor],
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or mean is None or input.dim() < 2 or any(map(is_batched, (mean, var, weight, bias))):
        return NotImplemented

    return _fold_samples(mode.n, lambda rows: function(rows, mean, var, weight, bias, False, momentum, eps), input)


def _group_norm(
    mode: UnitMode,
    function: Callable[..., Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if is_batched(weight) or is_batched(bias):
        return NotImplemented

    return _fold_samples(mode.n, lambda rows: function(rows, num_groups, weight, bias, eps), input)


def _over_leading_dimensions(
    mode: UnitMode, function: Callable[..., Tensor], input: Tensor, *others: Any, **options: Any
) -> Any:
    """Call a function that takes any number of leading dimensions, and so the units as one more of them.

    vmap multiplies and adds in steps of their own, with more uses of parameters.
    """
    if not is_batched(input) or any(map(is_batched, (*others, *options.values()))):
        return NotImplemented
    return fold(mode.n, lambda input: function(input, *others, **options), input)


def _embedding_bag(
    unit_mode: UnitMode,
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if offsets is not None or max_norm is not None or is_batched(weight) or input.dim() != 2:
        return NotImplemented
    options = {"mode": mode, "sparse": sparse, "padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}

    def bags(rows: Tensor, weights: Tensor | None) -> Any:
        return function(rows, weight, per_sample_weights=weights, **options)

    return _fold_samples(unit_mode.n, bags, input, per_sample_weights)


def _bilinear(
    mode: UnitMode,
    function: Callable[..., Tensor],
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Any:
    if input1.dim() < 2 or is_batched(weight) or is_batched(bias):
        return NotImplemented

    return _fold_samples(mode.n, lambda *rows: function(*rows, weight, bias), input1, input2)


def _ctc(
    mode: UnitMode,
    function: Callable[..., Tensor],
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Any:
    if targets.dim() != 2 or log_probs.dim() != 3:
        return NotImplemented
    lengths = [
        length if isinstance(length, Tensor) else torch.tensor(length) for length in (input_lengths, target_lengths)
    ]

    def losses(log_probs: Tensor, targets: Tensor, inputs: Tensor, wanted: Tensor) -> Tensor:
        n = len(log_probs)
        rows = log_probs.movedim(0, 1).flatten(1, 2)  # (time, n * k, classes)
        flat = (targets.flatten(0, 1), inputs.flatten(), wanted.flatten())
        found = function(rows, *flat, blank, "none", zero_infinity).view(n, -1)
        if reduction == "none":
            return found
        return found.sum(1) if reduction == "sum" else (found / wanted.clamp_min(1)).mean(1)

    return fold(mode.n, losses, log_probs, targets, *lengths)


def _cast(mode: UnitMode, function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Cast as autocast does, which is asked below vmap: there these functions have become others, not on its list."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return function(input, *args, **kwargs)
    kind = torch.get_autocast_dtype(device)

    def cast(x: Any) -> Any:
        return x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return function(*map(cast, (input, *args)), **{name: cast(value) for name, value in kwargs.items()})


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.prelu), _cast),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _cast),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _recurrent_cell),
    **dict.fromkeys((F.cross_entropy, F.nll_loss), _cross_entropy),
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    **dict.fromkeys((F.linear, F.layer_norm, F.rms_norm), _over_leading_dimensions),
    F.embedding_bag: _embedding_bag,
    F.bilinear: _bilinear,
    F.ctc_loss: _ctc,
}
