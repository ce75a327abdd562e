"""What a use of a parameter contributes to the gradients of the units: one function for each kind of autograd node.

A rule reads what the node saved in the forward pass, takes ``delta``, the gradient of the node's result, and returns
the factors of the gradient of one of its operands, in that operand's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradconf.gram.ghost import lstm
from lightning_gradconf.gram.ghost.contraction import Contribution, Dense, Lookup, Patches, Rows
from lightning_gradconf.gram.ghost.nodes import saved
from lightning_gradconf.gram.objective import accumulation_dtype

Place = tuple[int, str]


@dataclass
class Units:
    """Where the units lie in a batched tensor.

    Attributes:
        n: The number of units.
        k: Samples in a unit.
        guess: Which of the possible places is taken: 0 is the outermost, 1 the innermost, then all others.
        guesses: The most places that any tensor had.
        places: Those that were taken: the dimension, and whether the batch is all of it, its outer or its inner part.
        deltas: The gradients of all results of the node at hand, for nodes with several.
        scratch: What the operands of the node at hand have in common.
    """

    n: int
    k: int
    guess: int = 0
    guesses: int = 1
    places: set[Place] = field(default_factory=set)
    deltas: Sequence[Tensor | None] = ()
    scratch: dict[str, Any] = field(default_factory=dict)

    def rows(self, x: Tensor) -> Tensor:
        """Return ``(rows, ...)`` as ``(n, rows / n, ...)``."""
        outer = self._choose([(0, outer) for outer in self._outer(x.shape[0])], x)[1]
        if outer == 1:
            return torch.unflatten(x, 0, (self.n, -1))
        return torch.unflatten(x, 0, (outer, self.n, -1)).transpose(0, 1).flatten(1, 2)

    def reduce(self, x: Tensor, shape: tuple[int, ...]) -> Dense:
        """Return what ``x`` contributes to an operand of ``shape`` that was broadcast to the shape of ``x``."""
        x = wide(x)
        if x.numel() == 1:  # a penalty on the parameters: each unit's own loss has it whole, and the mean once
            return Dense((x.reshape(1, 1) / self.n).expand(self.n, 1))
        shape = (1,) * (x.dim() - len(shape)) + shape
        places = [(axis, outer) for axis, size in enumerate(shape) if size == 1 for outer in self._outer(x.shape[axis])]
        axis, outer = self._choose(sorted(places, key=lambda place: place[1] > 1), x)
        x = torch.unflatten(x, axis, (outer, self.n, -1))
        shape = (*shape[:axis], 1, self.n, 1, *shape[axis + 1 :])
        summed = [d for d, size in enumerate(shape) if size == 1]
        x = x.sum(summed) if any(x.shape[d] > 1 for d in summed) else x.squeeze(summed)
        return Dense(x.movedim(sum(d not in summed for d in range(axis + 1)), 0).reshape(self.n, -1))

    def _outer(self, size: int) -> list[int]:
        """How often the batch may be repeated along a dimension, the likely first."""
        batch = self.n * self.k
        if size == 0 or size % batch:
            return []
        repeats = size // batch
        return list(dict.fromkeys([1, repeats, *(d for d in range(2, repeats) if repeats % d == 0)]))

    def _choose(self, places: list[tuple[int, int]], x: Tensor) -> tuple[int, int]:
        if not places:
            raise NotImplementedError(f"no dimension of {tuple(x.shape)} holds {self.n} units of {self.k} samples")
        self.guesses = max(self.guesses, len(places))
        axis, outer = places[min(self.guess, len(places) - 1)]
        repeats = x.shape[axis] // (self.n * self.k)
        inner = "inner" if outer == repeats else f"inside {outer}"
        self.places.add((axis, "all" if repeats == 1 else "outer" if outer == 1 else inner))
        return axis, outer


Rule = Callable[[Node, int, Tensor, tuple[int, ...], Units], Contribution]


def contribution(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    """Return what operand ``slot`` of ``node``, of the given shape, receives from each unit.

    Raises:
        NotImplementedError: There is no rule for the node, or it does not apply.
    """
    name = node.name()
    if name not in RULES:
        raise NotImplementedError(f"there is no rule for {name}")
    if delta.is_complex() or delta.is_sparse:
        raise NotImplementedError(f"{name} works on complex or sparse tensors")
    return RULES[name](node, slot, delta, shape, units)


def wide(x: Tensor) -> Tensor:
    """``x`` in the precision that inner products are accumulated in."""
    return x.to(accumulation_dtype(x))


def _outer_products(left: Tensor, right: Tensor, units: Units, factor: float = 1.0) -> Rows:
    """The sum over rows of ``left (rows, p)`` and ``right (rows, q)``, or of ``(rows, groups, p)`` and so on."""
    left, right = units.rows(wide(left)), units.rows(wide(right))
    if factor != 1:
        right = right * factor
    if left.dim() == 3:
        return Rows(left[None], right[None])
    return Rows(left.permute(2, 0, 1, 3), right.permute(2, 0, 1, 3))


def _matrix_product(node: Node, slot: int, delta: Tensor, first: str, second: str, units: Units, by: float) -> Rows:
    if slot == 1:
        return _outer_products(saved(node, first), delta, units, by)
    return _outer_products(delta.T, saved(node, second).T, units, by)


def _mm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return _matrix_product(node, slot, delta, "self", "mat2", units, 1.0)


def _mv(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if slot != 1:
        raise NotImplementedError("a parameter is multiplied with a vector of data")
    return units.reduce(wide(delta)[:, None] * saved(node, "self"), shape)


def _addmm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if slot == 0:
        return _scaled(units.reduce(delta, shape), saved(node, "beta"))
    return _matrix_product(node, slot - 1, delta, "mat1", "mat2", units, saved(node, "alpha"))


def _batched_product(node: Node, slot: int, delta: Tensor, first: str, second: str, units: Units, by: float) -> Rows:
    if slot == 1:
        return _outer_products(saved(node, first).transpose(0, 1), delta.transpose(0, 1), units, by)
    return _outer_products(delta.permute(2, 0, 1), saved(node, second).permute(2, 0, 1), units, by)


def _bmm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return _batched_product(node, slot, delta, "self", "mat2", units, 1.0)


def _baddbmm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if slot == 0:
        return _scaled(units.reduce(delta, shape), saved(node, "beta"))
    return _batched_product(node, slot - 1, delta, "batch1", "batch2", units, saved(node, "alpha"))


def _trilinear(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if slot != 1 or [*saved(node, "expand2")] != [0] or [*saved(node, "sumdim")] != [2, 3]:
        raise NotImplementedError("a product of three tensors that is no bilinear layer")
    inputs = wide(saved(node, "i1")).unsqueeze(2) * saved(node, "i3").unsqueeze(1)
    return _outer_products(delta, inputs.flatten(1), units)


def _convolution(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if slot == 2:
        return units.reduce(wide(delta).flatten(2).sum(2), shape)
    if slot != 1:
        raise NotImplementedError("the input of a convolution is a parameter")
    x, delta = (units.rows(wide(t)).flatten(0, 1) for t in (saved(node, "input"), delta))
    stride, padding, dilation = (list(saved(node, key)) for key in ("stride", "padding", "dilation"))
    groups, transposed = saved(node, "groups"), saved(node, "transposed")
    if groups == 1 and not transposed and set(shape[2:]) == {1} and set(stride) == {1} and not any(padding):
        pixels = (t.flatten(2).transpose(1, 2) for t in (delta, x))
        left, right = (torch.unflatten(t, 0, (units.n, -1)).flatten(1, 2) for t in pixels)
        return Rows(left[None], right[None])
    weight = x.new_empty(1).expand(shape)
    outputs = list(saved(node, "output_padding"))
    return Patches(x, delta, weight, units.n, stride, padding, dilation, transposed, outputs, groups)


def _embedding(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    index, padding = saved(node, "indices"), saved(node, "padding_idx")
    if saved(node, "scale_grad_by_freq"):
        raise NotImplementedError("an embedding counts its tokens over the whole batch")
    if 0 <= padding < shape[0]:
        delta = delta.masked_fill((index == padding).unsqueeze(-1), 0)
    return _lookup(index, delta, shape, units)


def _embedding_bag(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    index, offsets, mode = (saved(node, key) for key in ("indices", "offsets", "mode"))
    length = index.numel() // max(1, len(offsets))
    starts = torch.arange(0, index.numel(), max(1, length), device=index.device)
    if slot != 0 or mode == 2 or not torch.equal(offsets, starts) or saved(node, "scale_grad_by_freq"):
        raise NotImplementedError("bags of different lengths, their maximum, or counts over the whole batch")
    kept = wide(delta.new_ones(()) * (index != saved(node, "padding_idx"))).view(-1, length)
    if mode == 1:
        kept = kept / kept.sum(1, keepdim=True).clamp_min(1)
    if (weights := saved(node, "per_sample_weights")) is not None:
        kept = kept * weights.view(-1, length)
    return _lookup(index, wide(delta).unsqueeze(1) * kept.unsqueeze(2), shape, units)


def _index(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    first, *rest = saved(node, "indices")
    if slot != 0 or first is None or any(index is not None for index in rest):
        raise NotImplementedError("a parameter is indexed in another dimension than its first")
    return _lookup(first % shape[0], delta, shape, units)


def _index_select(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if saved(node, "dim") != 0:
        raise NotImplementedError("a parameter is indexed in another dimension than its first")
    return _lookup(saved(node, "index"), delta, shape, units)


def _lookup(index: Tensor, delta: Tensor, shape: tuple[int, ...], units: Units) -> Lookup:
    values = wide(delta).reshape(index.numel(), -1)
    return Lookup(units.rows(index.flatten()), units.rows(values), shape[0])


def _layer_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if slot == 2:
        return units.reduce(delta, shape)
    mean, scale = saved(node, "result1"), saved(node, "result2")
    return units.reduce((wide(saved(node, "input")) - mean).mul_(scale).mul_(delta), shape)


def _rms_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return units.reduce(wide(saved(node, "input")) * saved(node, "result1") * delta, shape)


def _group_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    delta = wide(delta).flatten(2)
    if slot == 2:
        return units.reduce(delta.sum(2), shape)
    x = wide(saved(node, "input")).flatten(2)
    channels = x.shape[1] // saved(node, "group")
    mean, scale = (wide(saved(node, key)).repeat_interleave(channels, 1) for key in ("result1", "result2"))
    return units.reduce((torch.einsum("ncl,ncl->nc", x, delta) - mean * delta.sum(2)) * scale, shape)


def _batch_norm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    delta = wide(delta).reshape(*delta.shape[:2], -1)
    if slot == 2:
        return units.reduce(delta.sum(2), shape)
    x = wide(saved(node, "input")).reshape(*delta.shape)
    if saved(node, "training"):
        mean, scale = saved(node, "result1"), saved(node, "result2")
    else:
        mean, scale = saved(node, "running_mean"), (saved(node, "running_var") + saved(node, "eps")).rsqrt()
    return units.reduce(((x * delta).sum(2) - mean * delta.sum(2)) * scale, shape)


def _add(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return _scaled(units.reduce(delta, shape), saved(node, "alpha") if slot == 1 else 1)


def _sub(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return _scaled(units.reduce(delta, shape), -saved(node, "alpha") if slot == 1 else 1)


def _mul(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return units.reduce(wide(delta) * saved(node, "other" if slot == 0 else "self"), shape)


def _div(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    other = wide(saved(node, "other"))
    if slot == 0:
        return units.reduce(delta / other, shape)
    return units.reduce(-wide(delta) * saved(node, "self") / other.square(), shape)


def _where(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    condition = saved(node, "condition")
    return units.reduce(delta * (condition if slot == 0 else ~condition), shape)


def _expand(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return units.reduce(delta, shape)


def _repeat(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    sizes = (1,) * (delta.dim() - len(shape)) + shape
    split = [size for whole, size in zip(delta.shape, sizes, strict=True) for size in (whole // size, size)]
    return units.reduce(delta.reshape(split), tuple(size for part in sizes for size in (1, part)))


def _prelu(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    return units.reduce(wide(delta) * saved(node, "self").clamp(max=0), shape)


def _lstm(node: Node, slot: int, delta: Tensor, shape: tuple[int, ...], units: Units) -> Contribution:
    if "rows" not in units.scratch:
        units.scratch["gates"] = lstm.gates(node, tuple(units.deltas))
        # Time is the outermost dimension here, whatever it is for the user.
        rows = (torch.unflatten(t, 1, (units.n, -1)).transpose(0, 1).flatten(1, 2) for t in units.scratch["gates"][:3])
        units.scratch["rows"] = tuple(map(wide, rows))
    gates, x, h = units.scratch["rows"]
    if slot > 2:
        return Dense(gates.sum(1))
    return Rows(gates[None], (x if slot == 1 else h)[None])


def _scaled(dense: Dense, factor: float) -> Dense:
    return dense if factor == 1 else Dense(dense.gradients * factor)


RULES: dict[str, Rule] = {
    "AddBackward0": _add,
    "AddmmBackward0": _addmm,
    "BaddbmmBackward0": _baddbmm,
    "BmmBackward0": _bmm,
    "ConvolutionBackward0": _convolution,
    "DivBackward0": _div,
    "EmbeddingBackward0": _embedding,
    "EmbeddingBagBackward0": _embedding_bag,
    "ExpandBackward0": _expand,
    "FusedRmsNormBackward0": _rms_norm,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    lstm.NAME: _lstm,
    "MmBackward0": _mm,
    "MulBackward0": _mul,
    "MvBackward0": _mv,
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "PreluKernelBackward0": _prelu,
    "RepeatBackward0": _repeat,
    "SubBackward0": _sub,
    "TrilinearBackward0": _trilinear,
    "WhereBackward0": _where,
}
