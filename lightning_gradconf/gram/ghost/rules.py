"""What a use of a parameter contributes to the gradients of the units: one function for each kind of autograd node.

A rule reads what the node saved in the forward pass, takes ``delta``, the gradient of the node's result, and returns
the factors of the gradient of one of its operands, in that operand's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_gradconf.gram.ghost import lstm
from lightning_gradconf.gram.ghost.convolution import ConvolutionFactors
from lightning_gradconf.gram.ghost.custom_functions import unit_of
from lightning_gradconf.gram.ghost.factors import Dense, GradientFactors, IndexedRows, OuterProducts
from lightning_gradconf.gram.ghost.nodes import called_alone, saved
from lightning_gradconf.gram.ghost.placement import Placement
from lightning_gradconf.gram.memory_budget import megabytes
from lightning_gradconf.gram.objective import accumulation_dtype, as_rows, upcast

Rule = Callable[[Node, int, Tensor, tuple[int, ...], Placement], GradientFactors]


def factors_of(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    """Return what operand ``slot`` of ``node``, of the given shape, receives from each unit.

    Raises:
        NotImplementedError: The units cannot be found in the node's tensors.
    """
    rule = RULES.get(node.name())
    # Gradients of gradients may reach the statistics of a norm and not its result, which the rules are about.
    is_of_others = node.name() != lstm.NAME and at.deltas[0] is None
    if rule is not None and not is_of_others and not delta.is_complex() and not delta.is_sparse:
        try:
            return rule(node, slot, delta, shape, at)
        except NotImplementedError:
            pass
    return _by_backward(node, slot, shape, at)


def _by_backward(node: Node, slot: int, shape: tuple[int, ...], at: Placement) -> Dense:
    """Differentiate the node alone, once for each unit's part of the deltas."""
    deltas = [delta for delta in at.deltas if delta is not None]
    shapes = at.operands or {slot: shape}
    needed = at.n * sum(map(math.prod, shapes.values())) * accumulation_dtype(deltas[0]).itemsize
    if at.budget is not None and needed > at.budget:
        raise NotImplementedError(
            f"gradients of {megabytes(needed)} have to be formed, which exceeds the memory budget"
        )
    if (unit := unit_of(node)) is not None:
        return Dense(F.pad(_of_one_unit(node, slot, at.deltas), (0, 0, unit, at.n - 1 - unit)))
    # Each operand finds out where its units lie, and the first takes the gradients of all.
    parts = zip(*([None] * at.n if delta is None else at.parts(delta) for delta in at.deltas), strict=True)
    if (known := ("gradients", at.guess)) not in at.scratch:
        at.scratch[known] = called_alone(node, parts, shapes.keys(), deltas[0].device)
    zeros = deltas[0].new_zeros(shape)
    gradients = [zeros if gradient is None else gradient for gradient in at.scratch[known].pop(slot)]
    # Autograd sums after the node what was broadcast.
    summed = [gradient if gradient.shape == shape else gradient.sum_to_size(shape) for gradient in gradients]
    return Dense(torch.cat([as_rows(gradient, 1) for gradient in summed]))


def _of_one_unit(node: Node, slot: int, deltas: Sequence[Tensor | None]) -> Tensor:
    """Return the gradient ``(1, numel)`` of an operand of a custom Function that has to do with one unit alone."""
    child, number = node.next_functions[slot]
    assert child is not None
    edges = [GradientEdge(node, i) for i, delta in enumerate(deltas) if delta is not None]
    given = [delta for delta in deltas if delta is not None]
    (gradient,) = torch.autograd.grad(edges, [GradientEdge(child, number)], given, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise NotImplementedError(f"{node.name()} has no gradient for one of its operands")
    return as_rows(gradient, 1)


def _outer_products(left: Tensor, right: Tensor, at: Placement, factor: float = 1.0) -> OuterProducts:
    """Return the sum over rows of ``left (rows, p)`` and ``right (rows, q)``, or of ``(rows, groups, p)`` and so on."""
    left, right = at.rows(upcast(left)), at.rows(upcast(right))
    if factor != 1:
        right = right * factor
    if left.dim() == 3:
        return OuterProducts(left[None], right[None])
    return OuterProducts(left.permute(2, 0, 1, 3), right.permute(2, 0, 1, 3))


def _product(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    """Return what a product of two matrices, or of two batches of them, contributes."""
    first, second, factor = "self", "mat2", 1.0
    if node.name() in _WITH_A_SUMMAND:
        if slot == 0:
            return _scaled(at.reduce(delta, shape), saved(node, "beta"))
        (first, second), factor, slot = _WITH_A_SUMMAND[node.name()], saved(node, "alpha"), slot - 1
    left, right = (saved(node, first), delta) if slot == 1 else (delta.mT, saved(node, second).mT)
    return _outer_products(left.transpose(0, -2), right.transpose(0, -2), at, factor)


def _mv(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    if slot != 1:
        raise NotImplementedError("a parameter is multiplied with a vector of data")
    return at.reduce(upcast(delta)[:, None] * saved(node, "self"), shape)


def _trilinear(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    if slot != 1 or [*saved(node, "expand2")] != [0] or [*saved(node, "sumdim")] != [2, 3]:
        raise NotImplementedError("a product of three tensors that is no bilinear layer")
    inputs = upcast(saved(node, "i1")).unsqueeze(2) * saved(node, "i3").unsqueeze(1)
    return _outer_products(delta, inputs.flatten(1), at)


def _convolution(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    if slot == 2:
        return at.reduce(upcast(delta).flatten(2).sum(2), shape)
    if slot != 1:
        raise NotImplementedError("the input of a convolution is a parameter")
    return _kernel(node, saved(node, "input"), delta, shape, at)


def _convolution_backward(
    node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement
) -> GradientFactors:
    """Return what the gradient by a convolution's input contributes, as in gradient penalties.

    Multiplied with ``delta``, it is the convolution of ``delta`` multiplied with the gradient of the result.
    """
    if slot != 2:
        raise NotImplementedError("the gradient of a convolution's result is a parameter")
    return _kernel(node, delta, saved(node, "grad_output"), shape, at)


def _kernel(node: Node, x: Tensor, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    """Return the gradient by the weight of a convolution of ``x``."""
    x, delta = (at.rows(upcast(t)).flatten(0, 1) for t in (x, delta))
    stride, padding, dilation = (list(saved(node, key)) for key in ("stride", "padding", "dilation"))
    groups, transposed = saved(node, "groups"), saved(node, "transposed")
    if groups == 1 and not transposed and set(shape[2:]) == {1} and set(stride) == {1} and not any(padding):
        pixels = (t.flatten(2).transpose(1, 2) for t in (delta, x))
        left, right = (torch.unflatten(t, 0, (at.n, -1)).flatten(1, 2) for t in pixels)
        return OuterProducts(left[None], right[None])
    weight = x.new_empty(1).expand(shape)
    outputs = list(saved(node, "output_padding"))
    return ConvolutionFactors(x, delta, weight, at.n, stride, padding, dilation, transposed, outputs, groups)


def _embedding(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    index, padding = saved(node, "indices"), saved(node, "padding_idx")
    if saved(node, "scale_grad_by_freq"):
        raise NotImplementedError("an embedding counts its tokens over the whole batch")
    if 0 <= padding < shape[0]:
        delta = delta.masked_fill((index == padding).unsqueeze(-1), 0)
    return _lookup(index, delta, shape, at)


def _embedding_bag(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    index, offsets, mode = (saved(node, key) for key in ("indices", "offsets", "mode"))
    length = index.numel() // max(1, len(offsets))
    starts = torch.arange(0, index.numel(), max(1, length), device=index.device)
    if slot != 0 or mode == 2 or not torch.equal(offsets, starts) or saved(node, "scale_grad_by_freq"):
        raise NotImplementedError("bags of different lengths, their maximum, or counts over the whole batch")
    kept = upcast(delta.new_ones(()) * (index != saved(node, "padding_idx"))).view(-1, length)
    if mode == 1:
        kept = kept / kept.sum(1, keepdim=True).clamp_min(1)
    if (weights := saved(node, "per_sample_weights")) is not None:
        kept = kept * weights.view(-1, length)
    return _lookup(index, upcast(delta).unsqueeze(1) * kept.unsqueeze(2), shape, at)


def _index(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    first, *rest = saved(node, "indices")
    if slot != 0 or first is None or any(index is not None for index in rest):
        raise NotImplementedError("a parameter is indexed in another dimension than its first")
    return _lookup(first % shape[0], delta, shape, at)


def _index_select(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    if saved(node, "dim") != 0:
        raise NotImplementedError("a parameter is indexed in another dimension than its first")
    return _lookup(saved(node, "index"), delta, shape, at)


def _lookup(index: Tensor, delta: Tensor, shape: tuple[int, ...], at: Placement) -> IndexedRows:
    values = upcast(delta).reshape(index.numel(), -1)
    return IndexedRows(at.rows(index.flatten()), at.rows(values), shape[0])


def _layer_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    if slot == 2:
        return at.reduce(delta, shape)
    mean, scale = saved(node, "result1"), saved(node, "result2")
    return at.reduce((upcast(saved(node, "input")) - mean).mul_(scale).mul_(delta), shape)


def _rms_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    return at.reduce(upcast(saved(node, "input")) * saved(node, "result1") * delta, shape)


def _channel_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    """Return what a BatchNorm or GroupNorm contributes: its weight and bias have an entry for each channel."""
    delta = upcast(delta).reshape(*delta.shape[:2], -1)
    if slot == 2:
        return at.reduce(delta.sum(2), shape)
    x = upcast(saved(node, "input")).reshape(delta.shape)
    if node.name() == "NativeGroupNormBackward0":
        channels = x.shape[1] // saved(node, "group")
        mean, scale = (upcast(saved(node, key)).repeat_interleave(channels, 1) for key in ("result1", "result2"))
    elif saved(node, "training"):
        mean, scale = saved(node, "result1"), saved(node, "result2")
    else:
        mean, scale = saved(node, "running_mean"), (saved(node, "running_var") + saved(node, "eps")).rsqrt()
    return at.reduce(((x * delta).sum(2) - mean * delta.sum(2)) * scale, shape)


def _add(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    return _scaled(at.reduce(delta, shape), saved(node, "alpha") if slot == 1 else 1)


def _sub(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    return _scaled(at.reduce(delta, shape), -saved(node, "alpha") if slot == 1 else 1)


def _mul(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    return at.reduce(upcast(delta) * saved(node, "other" if slot == 0 else "self"), shape)


def _div(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    other = upcast(saved(node, "other"))
    if slot == 0:
        return at.reduce(delta / other, shape)
    return at.reduce(-upcast(delta) * saved(node, "self") / other.square(), shape)


def _where(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    condition = saved(node, "condition")
    return at.reduce(delta * (condition if slot == 0 else ~condition), shape)


def _expand(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    return at.reduce(delta, shape)


def _repeat(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    sizes = (1,) * (delta.dim() - len(shape)) + shape
    split = [size for whole, size in zip(delta.shape, sizes, strict=True) for size in (whole // size, size)]
    return at.reduce(delta.reshape(split), tuple(size for part in sizes for size in (1, part)))


def _prelu(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    return at.reduce(upcast(delta) * saved(node, "self").clamp(max=0), shape)


def _lstm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], at: Placement) -> GradientFactors:
    if "rows" not in at.scratch:
        at.scratch["gates"] = lstm.gates(node, tuple(at.deltas))
        # Time is the outermost dimension here, whatever it is for the user.
        rows = (torch.unflatten(t, 1, (at.n, -1)).transpose(0, 1).flatten(1, 2) for t in at.scratch["gates"][:3])
        at.scratch["rows"] = tuple(map(upcast, rows))
    gates, x, h = at.scratch["rows"]
    if slot > 2:
        return Dense(gates.sum(1))
    return OuterProducts(gates[None], (x if slot == 1 else h)[None])


def _scaled(dense: Dense, factor: float) -> Dense:
    return dense if factor == 1 else Dense(dense.gradients * factor)


# Products of matrices that are added to a first operand, and the names of the two that are multiplied.
_WITH_A_SUMMAND = {"AddmmBackward0": ("mat1", "mat2"), "BaddbmmBackward0": ("batch1", "batch2")}
RULES: dict[str, Rule] = {
    "AddBackward0": _add,
    **dict.fromkeys(("MmBackward0", "BmmBackward0", *_WITH_A_SUMMAND), _product),
    "ConvolutionBackward0": _convolution,
    "ConvolutionBackwardBackward0": _convolution_backward,
    "DivBackward0": _div,
    "EmbeddingBackward0": _embedding,
    "EmbeddingBagBackward0": _embedding_bag,
    "ExpandBackward0": _expand,
    "FusedRmsNormBackward0": _rms_norm,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    lstm.NAME: _lstm,
    "MulBackward0": _mul,
    "MvBackward0": _mv,
    **dict.fromkeys(("NativeBatchNormBackward0", "NativeGroupNormBackward0"), _channel_norm),
    "NativeLayerNormBackward0": _layer_norm,
    "PreluKernelBackward0": _prelu,
    "RepeatBackward0": _repeat,
    "SubBackward0": _sub,
    "TrilinearBackward0": _trilinear,
    "WhereBackward0": _where,
}
