"""Rules for losses that differentiate or ask about gradients themselves: they act on the tensors below vmap.

Autograd records below vmap. Units do not meet, so the derivative of the sum over units holds each unit's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradconf.gram.ghost.functorch import batched, behind, below_vmap, in_front, is_batched, level_of

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode


def _requires_grad_(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, requires_grad: bool = True) -> Tensor:
    if not is_batched(tensor) and not requires_grad:
        return function(tensor, requires_grad)  # type: ignore[no-any-return]  # of a parameter: vmap refuses
    inner = behind(tensor) if is_batched(tensor) else tensor
    if not inner.is_leaf:
        raise NotImplementedError("requires_grad is set on the result of an operation")
    with below_vmap():  # there it is a leaf, and there autograd records
        inner.requires_grad_(requires_grad)
    return tensor


def _of_autograd(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, *_: Any) -> Any:
    """Answer as the tensor below vmap, where autograd records."""
    with torch._C.DisableTorchFunction():
        return function(behind(tensor))


def _gradient(
    mode: UnitMode,
    function: Callable[..., Any],
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> Any:
    """Differentiate below vmap: units do not meet, so the gradient of the sum of their outputs is that of each."""
    outputs, inputs = ([values] if isinstance(values, Tensor) else list(values) for values in (outputs, inputs))
    if not any(map(is_batched, (*outputs, *inputs))):
        options = {"allow_unused": allow_unused, "is_grads_batched": is_grads_batched}
        options |= {"materialize_grads": materialize_grads}
        return function(outputs, inputs, grad_outputs, retain_graph, create_graph, **options)
    if is_grads_batched or not all(map(is_batched, (*outputs, *inputs))):
        raise NotImplementedError("the loss differentiates with respect to parameters itself")
    if grad_outputs is None or isinstance(grad_outputs, Tensor):
        grad_outputs = [grad_outputs] * len(outputs)
    rows = [in_front(output, mode.n) for output in outputs]
    seeds = [
        torch.ones_like(row) if seed is None else in_front(seed, mode.n)
        for row, seed in zip(rows, grad_outputs, strict=True)
    ]
    with below_vmap(), torch._C.DisableTorchFunction():
        found = torch.autograd.grad(
            rows, [behind(tensor) for tensor in inputs], seeds,
            retain_graph=True, create_graph=create_graph, allow_unused=allow_unused,
            materialize_grads=materialize_grads,
        )  # fmt: skip
    return tuple(
        None if gradient is None else batched(gradient, level_of(tensor), like=tensor)
        for gradient, tensor in zip(found, inputs, strict=True)
    )


def _data(mode: UnitMode, function: Callable[..., Any], tensor: Tensor) -> Tensor:
    return tensor.detach()


def _set_data(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, value: Tensor) -> None:
    if not is_batched(tensor):
        raise RuntimeError("units are written into a tensor that they share, inplace")
    rows, inner = in_front(tensor, mode.n), in_front(value, mode.n)
    if is_batched(rows) or is_batched(inner) or rows.shape != inner.shape:
        raise NotImplementedError("data of another shape")
    with below_vmap(), torch._C.DisableTorchFunction(), torch.no_grad():
        rows.copy_(inner)


def _refused(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"the loss calls {function.__name__} on a tensor")


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__: _requires_grad_,  # type: ignore[attr-defined]
    **{getattr(Tensor, name).__get__: _of_autograd for name in ("requires_grad", "grad_fn", "is_leaf")},
    **dict.fromkeys(
        (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.backward, Tensor.retain_grad), _refused
    ),
}
# Rules that are always asked, not only where an argument is batched: they may act on a list, or on a parameter.
UNCONDITIONAL_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.requires_grad_: _requires_grad_,
    torch.autograd.grad: _gradient,
    torch.autograd.backward: _refused,
}
