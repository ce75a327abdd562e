"""Inner products of per-unit gradients from their factors, without forming all of these gradients.

Each class below holds what one use of a parameter contributes to the gradients of n units, and can do two things:
``block(lo, hi)`` forms some leading rows of the n gradients, and ``gram`` is the Gram in the cheapest way known.
The gradient of a unit, read as a matrix, has ``major`` rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of scratch memory that a block may take: small enough to stay in the last level of a cache.
_BLOCK = 1 << 20
_NEW = 5e-3  # seconds that new memory and kernels may cost on a CPU


@dataclass
class Workspace:
    """What contractions of one run share.

    Attributes:
        fastest: For each shape met, the form that was fastest.
        buffers: Scratch memory, since fresh memory costs as much as the arithmetic that fills it.
        products: The matrix that was multiplied with its own transpose last, and what came out.
    """

    fastest: dict[Hashable, str] = field(default_factory=dict)
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)
    products: tuple[Tensor, Tensor] | None = None

    def square(self, rows: Tensor) -> Tensor:
        """Return the inner products of rows. Of a linear layer, weight and bias ask for those of the same deltas."""
        if self.products is None or not _same_memory(self.products[0], rows):
            self.products = rows, rows @ rows.T
        return self.products[1]

    def empty(self, purpose: str, like: Tensor, *shape: int) -> Tensor:
        """Return uninitialised memory, valid until the next call for the same purpose."""
        key, size = (purpose, like.dtype, like.device), math.prod(shape)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = like.new_empty(size)
        return self.buffers[key][:size].view(shape)


@dataclass
class Dense:
    """Gradients that exist already, ``(n, numel)``."""

    gradients: Tensor

    @property
    def major(self) -> int:
        """Rows of a gradient read as a matrix."""
        return self.gradients.shape[1]

    def block(self, lo: int, hi: int) -> Tensor:
        """Some entries of the gradients, ``(n, hi - lo)``."""
        return self.gradients[:, lo:hi]

    def gram(self, work: Workspace) -> Tensor:
        """All inner products, ``(n, n)``."""
        return work.square(self.gradients)


@dataclass
class Rows:
    """Gradients that are sums of outer products: for each of g groups, the sum over r of ``left[r] right[r]^T``.

    Attributes:
        left: ``(g, n, rows, p)``.
        right: ``(g, n, rows, q)``.
    """

    left: Tensor
    right: Tensor

    @property
    def major(self) -> int:
        """Rows of a gradient read as a matrix: those of ``left``, or the groups if there are several."""
        return self.left.shape[3] if self.left.shape[0] == 1 else self.left.shape[0]

    def block(self, lo: int, hi: int) -> Tensor:
        """Some rows of the gradients, ``(n, hi - lo, ...)``."""
        if self.left.shape[0] == 1:
            return torch.bmm(self.left[0, ..., lo:hi].transpose(1, 2), self.right[0])
        return (self.left[lo:hi].transpose(2, 3) @ self.right[lo:hi]).flatten(2).transpose(0, 1)

    def gram(self, work: Workspace) -> Tensor:
        """All inner products, ``(n, n)``, by pairs of rows or by gradients, whichever costs less."""
        groups, n, rows, p = self.left.shape
        q = self.right.shape[3]
        pairs = (n * rows) ** 2 * (p + q + 16) / (2 if n * rows > 512 else 1)
        formed = n * rows * p * q + n * n * p * q + 8 * n * p * q
        tall = self if p >= q else Rows(self.right, self.left)  # blocks of it are nearer to squares
        forms = {
            "pairs": (groups * pairs, lambda: self._pairs(work)),
            "formed": (groups * formed, lambda: by_blocks(tall, partial(tall._formed, work))),
        }
        return cheapest(work, ("rows", *self.left.shape, q), forms)

    def _formed(self, work: Workspace, lo: int, hi: int) -> Tensor:
        if self.left.shape[0] > 1:
            return self.block(lo, hi)
        left, right = self.left[0, ..., lo:hi].transpose(1, 2), self.right[0]
        return torch.bmm(left, right, out=work.empty("rows", left, len(left), hi - lo, right.shape[2]))

    def _pairs(self, work: Workspace) -> Tensor:
        _, n, rows, _ = self.left.shape
        gram = self.left.new_zeros(n, n)
        if rows == 1:
            for left, right in zip(self.left[:, :, 0], self.right[:, :, 0], strict=True):
                gram.addcmul_(work.square(left), work.square(right))
            return gram
        step = max(1, _BLOCK // max(1, n * rows * rows))
        for left, right in zip(self.left, self.right, strict=True):
            for lo in range(0, n, step):
                here, rest = slice(lo, lo + step), slice(lo, n)
                products = _products(work, "left", left[here], left[rest])
                products *= _products(work, "right", right[here], right[rest])
                gram[here, rest] += products.view(-1, rows, n - lo, rows).sum((1, 3))
        return mirrored(gram)


@dataclass
class Lookup:
    """Gradients of a table of which rows were looked up: row ``index[r]`` receives ``values[r]``.

    Attributes:
        index: ``(n, rows)``.
        values: ``(n, rows, q)``.
        major: The number of rows of the table.
    """

    index: Tensor
    values: Tensor
    major: int

    def block(self, lo: int, hi: int) -> Tensor:
        """Some rows of the gradients of the table, ``(n, hi - lo, q)``."""
        n, _, q = self.values.shape
        inside = (self.index >= lo) & (self.index < hi)
        unit = torch.arange(n, device=self.index.device)[:, None].expand_as(self.index)
        table = self.values.new_zeros(n * (hi - lo), q)
        table.index_add_(0, (unit * (hi - lo) + self.index - lo)[inside], self.values[inside])
        return table.view(n, hi - lo, q)

    def gram(self, work: Workspace) -> Tensor:
        """All inner products, ``(n, n)``: over the rows of the table that two units have both looked up."""
        n, _, q = self.values.shape
        unit = torch.arange(n, device=self.index.device)[:, None]
        key, where = (self.index * n + unit).flatten().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        values = self.values.new_zeros(len(key), q).index_add_(0, where, self.values.flatten(0, 1))
        word, unit = key // n, key % n
        if not self._is_sparse(word):
            return self._by_table(word, unit, values)
        gram = self.values.new_zeros(n, n)
        for distance in range(n):  # of the same row of the table, the units lie side by side
            some, other = slice(0, len(key) - distance), slice(distance, None)
            same = (word[some] == word[other]).nonzero().squeeze(1)
            if not len(same):
                break
            products = (values[some][same] * values[other][same]).sum(1)
            gram.index_put_((unit[some][same], unit[other][same]), products, accumulate=True)
        return mirrored(gram)

    def _is_sparse(self, word: Tensor) -> bool:
        """Whether few units have looked up the same rows; ``word`` is in order."""
        n, rows = self.index.shape
        _, counts = word.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        pairs = int(counts.square().sum())
        return 8 * pairs < n * n * rows

    def _by_table(self, word: Tensor, unit: Tensor, values: Tensor) -> Tensor:
        """The part of the table that was looked up, some columns at a time."""
        n, _, q = self.values.shape
        used, word = word.unique_consecutive(return_inverse=True)  # type: ignore[no-untyped-call]
        gram = values.new_zeros(n, n)
        step = max(1, _BLOCK // (n * len(used)))
        for lo in range(0, q, step):
            some = values[:, lo : lo + step]
            table = values.new_zeros(n, len(used), some.shape[1])
            table[unit, word] = some
            accumulate(gram, table.flatten(1))
        return mirrored(gram)


@dataclass
class Patches:
    """Gradients of a convolution's weight.

    Attributes:
        input: ``(n * k, channels, *size)``, the samples of a unit one after the other.
        delta: ``(n * k, out, *size)``, the gradient of the convolution's output.
        weight: The weight, for its shape.
        n: The number of units.
        stride, padding, dilation, transposed, output_padding, groups: As PyTorch has them.
    """

    input: Tensor
    delta: Tensor
    weight: Tensor
    n: int
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @property
    def major(self) -> int:
        """Rows of a gradient read as a matrix: the first dimension of the weight."""
        return self.weight.shape[0]

    def block(self, lo: int, hi: int) -> Tensor:
        """Some rows of the gradients, ``(n, hi - lo, ...)``."""
        return self._by_unit(lo, hi)

    def gram(self, work: Workspace) -> Tensor:
        """All inner products, ``(n, n)``, in the form that was fastest when this shape was met first."""
        samples, out = self.delta.shape[:2]
        pixels, inputs = math.prod(self.delta.shape[2:]), math.prod(self.input.shape[2:])
        numel = self.weight.numel()
        formed = samples * pixels * numel / (self.groups if not self.transposed else 1) + self.n**2 * numel
        forms: dict[str, tuple[float, Callable[[], Tensor]]] = {
            "unit": (formed, lambda: by_blocks(self, self._by_unit)),
        }
        if self.groups == 1 and not self.transposed:
            forms["taps"] = (formed, lambda: self._by_taps(work))
        if self._can_fold():
            forms["folded"] = (formed, lambda: by_blocks(self, self._folded))
        if self.groups == 1 and not self.transposed:
            taps = math.prod(self.weight.shape[2:])
            shifted = samples**2 / 2 * (inputs**2 * self.input.shape[1] + pixels**2 * (out + 16 * taps))
            forms["shifted"] = (shifted, lambda: self._shifted(work))
        key = ("patches", self.n, *self.input.shape, *self.weight.shape, *self.delta.shape, self.groups)
        return cheapest(work, key, forms)

    def _can_fold(self) -> bool:
        return not self.transposed and (self.groups == 1 or len(self.input) == self.n)

    def _by_unit(self, lo: int, hi: int) -> Tensor:
        """One call of PyTorch's own weight gradient a unit."""
        whole = hi - lo == self.major or self.transposed or self.groups > 1
        delta = self.delta if whole else self.delta[:, lo:hi]
        weight = self.weight if whole else self.weight[lo:hi]
        units = zip(self.input.chunk(self.n), delta.chunk(self.n), strict=True)
        gradients = torch.stack([self._backward(x, d, weight, self.groups) for x, d in units])
        return gradients[:, lo:hi] if whole else gradients

    def _folded(self, lo: int, hi: int) -> Tensor:
        """All samples in one call, each as a group of channels of one image."""
        samples = len(self.input)
        per_group = self.major // self.groups
        if self.groups > 1:
            lo, hi = lo // per_group, -(-hi // per_group)
            x, d = (torch.unflatten(t, 1, (self.groups, -1))[:, lo:hi] for t in (self.input, self.delta))
            weight, groups = torch.unflatten(self.weight, 0, (self.groups, -1))[lo:hi].flatten(0, 1), hi - lo
        else:
            x, d, weight, groups = self.input, self.delta[:, lo:hi], self.weight[lo:hi], 1
        folded_x, folded_d = (t.reshape(1, -1, *t.shape[-(self.weight.dim() - 2) :]) for t in (x, d))
        stub = weight.new_empty(1).expand(samples * len(weight), *weight.shape[1:])
        gradients = self._backward(folded_x, folded_d, stub, samples * groups)
        return gradients.view(self.n, -1, *weight.shape).sum(1)

    def _backward(self, x: Tensor, d: Tensor, weight: Tensor, groups: int) -> Tensor:
        mask = [False, True, False]
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding)
        gradient: Tensor = torch.ops.aten.convolution_backward(d, x, weight, None, *geometry, groups, mask)[1]
        return gradient

    def _by_taps(self, work: Workspace) -> Tensor:
        """A few taps of the kernel at a time: what they see of the input, pixel by pixel, times the deltas."""
        out, channels, *kernel = self.weight.shape
        edges = [edge for padding in reversed(self.padding) for edge in (padding, padding)]
        x = torch.unflatten(F.pad(self.input.movedim(1, -1), [0, 0, *edges]), 0, (self.n, -1))
        d = torch.unflatten(self.delta, 0, (self.n, -1)).transpose(1, 2).flatten(2)
        k, width, out_size = x.shape[1], kernel[-1], self.delta.shape[2:]
        unit, sample, *steps, channel = x.stride()
        fits = [taps for taps in range(1, width + 1) if width % taps == 0 and self.n * out * channels * taps <= _BLOCK]
        taps = max(fits, default=1)
        strides = [step * stride for step, stride in zip(steps, self.stride, strict=True)]
        view = (unit, sample, *strides, steps[-1] * self.dilation[-1], channel)
        result = work.empty("rows", x, self.n, out, taps * channels)
        # Few enough units at once for what they see to stay in the cache, and many enough for few calls.
        together = max(1, (_BLOCK >> 3) // (d.shape[2] * taps * channels))
        gram = x.new_zeros(self.n, self.n)
        for offset in product(*map(range, kernel[:-1]), range(0, width, taps)):
            start = sum(o * step * dilation for o, step, dilation in zip(offset, steps, self.dilation, strict=True))
            for lo in range(0, self.n, together):
                some = slice(lo, lo + together)
                window = work.empty("window", x, len(d[some]), k, *out_size, taps, channels)
                window.copy_(x.as_strided(window.shape, view, x.storage_offset() + lo * unit + start))
                torch.bmm(d[some], window.view(len(window), -1, taps * channels), out=result[some])
            accumulate(gram, result.flatten(1))
        return mirrored(gram)

    def _shifted(self, work: Workspace) -> Tensor:
        """Products of patches as sums of products of shifted pixels, times products of deltas."""
        samples, _, *size = self.input.shape
        out_size = self.delta.shape[2:]
        x, d = (t.flatten(2).transpose(1, 2).contiguous() for t in (self.input, self.delta))
        step = max(1, _BLOCK // (samples * max(x.shape[1], d.shape[1]) ** 2))
        gram = x.new_zeros(samples, samples)
        for lo in range(0, samples, step):
            here, rest = slice(lo, lo + step), slice(lo, samples)
            pixels = _products(work, "left", x[here], x[rest])
            deltas = _products(work, "right", d[here], d[rest])
            pixels = pixels.view(-1, *size, samples - lo, *size)
            patches = torch.zeros_like(deltas).view(-1, *out_size, samples - lo, *out_size)
            for offset in product(*map(range, self.weight.shape[2:])):
                windows = [self._window(i, o, size[i], out_size[i]) for i, o in enumerate(offset)]
                read = (slice(None), *(window[0] for window in windows))
                write = (slice(None), *(window[1] for window in windows))
                patches[write + write] += pixels[read + read]
            rows = d.shape[1]
            gram[here, rest] = (patches.view_as(deltas) * deltas).view(-1, rows, samples - lo, rows).sum((1, 3))
        return mirrored(gram).view(self.n, -1, self.n, samples // self.n).sum((1, 3))

    def _window(self, axis: int, offset: int, size: int, out_size: int) -> tuple[slice, slice]:
        """Which inputs a tap of the kernel reads along an axis, and for which outputs."""
        shift = offset * self.dilation[axis] - self.padding[axis]
        stride = self.stride[axis]
        first = max(0, -(shift // stride))
        last = min(out_size, (size - 1 - shift) // stride + 1)
        if last <= first:
            return slice(0, 0), slice(0, 0)
        return slice(first * stride + shift, (last - 1) * stride + shift + 1, stride), slice(first, last)


def _same_memory(some: Tensor, other: Tensor) -> bool:
    return some.data_ptr() == other.data_ptr() and some.shape == other.shape and some.stride() == other.stride()


def _products(work: Workspace, purpose: str, some: Tensor, others: Tensor) -> Tensor:
    some, others = some.flatten(0, 1), others.flatten(0, 1)
    return torch.mm(some, others.T, out=work.empty(purpose, some, len(some), len(others)))


Contribution = Dense | Rows | Lookup | Patches


def gram_of_sum(parts: Sequence[Contribution], work: Workspace) -> Tensor:
    """Return the Gram ``(n, n)`` of gradients that are sums over several uses of a parameter."""
    if len(parts) == 1:
        return parts[0].gram(work)
    rows = [part for part in parts if isinstance(part, Rows)]
    if len(rows) == len(parts) and len({(p.left.shape[0], p.left.shape[3]) for p in rows}) == 1:
        return Rows(torch.cat([p.left for p in rows], 2), torch.cat([p.right for p in rows], 2)).gram(work)
    if len({part.major for part in parts}) == 1:

        def block(lo: int, hi: int) -> Tensor:
            return sum((part.block(lo, hi).flatten(1) for part in parts[1:]), parts[0].block(lo, hi).flatten(1))

        return by_blocks(parts[0], block)
    gradients = sum((whole(part) for part in parts[1:]), whole(parts[0]))
    return gradients @ gradients.T


def whole(part: Contribution) -> Tensor:
    """Return the gradients themselves, ``(n, numel)``."""
    return part.block(0, part.major).flatten(1)


def head(part: Contribution, n: int) -> Contribution:
    """Return the gradients of the first n units."""
    match part:
        case Dense():
            return Dense(part.gradients[:n])
        case Rows():
            return Rows(part.left[:, :n], part.right[:, :n])
        case Lookup():
            return Lookup(part.index[:n], part.values[:n], part.major)
        case Patches():
            samples = n * (len(part.input) // part.n)
            return replace(part, input=part.input[:samples], delta=part.delta[:samples], n=n)


def copied(part: Contribution) -> Contribution:
    """Return the contribution in memory of its own."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.contiguous_format)

    match part:
        case Dense():
            return Dense(copy(part.gradients))
        case Rows():
            return Rows(copy(part.left), copy(part.right))
        case Lookup():
            return replace(part, index=copy(part.index), values=copy(part.values))
        case Patches():
            return replace(part, input=copy(part.input), delta=copy(part.delta))


def scaled(part: Contribution, factor: float) -> Contribution:
    """Return a contribution times a number."""
    match part:
        case Dense():
            return Dense(part.gradients * factor)
        case Rows():
            return Rows(part.left * factor, part.right)
        case Lookup():
            return replace(part, values=part.values * factor)
        case Patches():
            return replace(part, delta=part.delta * factor)


def by_blocks(part: Contribution, block: Callable[[int, int], Tensor] | None = None) -> Tensor:
    """Return the Gram from a few rows of the gradients at a time."""
    block = block or part.block
    n, numel = extent(part)
    step = max(1, _BLOCK * part.major // (n * numel))
    gram: Tensor | None = None
    for lo in range(0, part.major, step):
        rows = block(lo, min(lo + step, part.major)).flatten(1)
        gram = rows.new_zeros(n, n) if gram is None else gram
        accumulate(gram, rows)
    assert gram is not None
    return mirrored(gram)


def accumulate(gram: Tensor, rows: Tensor) -> None:
    """Add the products of ``rows`` to ``gram``: the upper triangle, and of the lower one what comes with it."""
    step = len(rows) if len(rows) < 32 else max(16, -(-len(rows) // 4))
    for lo in range(0, len(rows), step):
        gram[lo : lo + step, lo:].addmm_(rows[lo : lo + step], rows[lo:].T)


def extent(part: Contribution) -> tuple[int, int]:
    """Return the number of units, and of entries of a gradient."""
    match part:
        case Dense():
            return part.gradients.shape[0], part.gradients.shape[1]
        case Rows():
            return part.left.shape[1], part.left.shape[0] * part.left.shape[3] * part.right.shape[3]
        case Lookup():
            return part.values.shape[0], part.major * part.values.shape[2]
        case Patches():
            return part.n, part.weight.numel()


def mirrored(gram: Tensor) -> Tensor:
    """Return the symmetric matrix of which the upper triangle is known."""
    return gram.triu() + gram.triu(1).T


def cheapest(work: Workspace, key: Hashable, forms: dict[str, tuple[float, Callable[[], Tensor]]]) -> Tensor:
    """Return what all ``forms`` compute: in the one that was fastest before, or in each once, to find it.

    Operations are counted to leave out what cannot win, and to save the measurement where it does not matter.
    """
    if (name := work.fastest.get(key)) is not None:
        return forms[name][1]()
    least = min(cost for cost, _ in forms.values())
    near = {name: form for name, (cost, form) in forms.items() if cost <= 8 * least}
    if len(near) == 1 or least < 1e6:
        work.fastest[key] = min(forms, key=lambda name: forms[name][0])
        return forms[work.fastest[key]][1]()
    seconds: dict[str, float] = {}
    limit = math.inf
    for _ in range(2):  # since memory and kernels are slow when they are new
        for name in [name for name in near if seconds.get(name, 0) <= limit]:
            start = time.perf_counter()
            result = near[name]()
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            seconds[name] = min(seconds.get(name, math.inf), time.perf_counter() - start)
        limit = math.inf if result.is_cuda else 2 * min(seconds.values()) + _NEW
    work.fastest[key] = min(seconds, key=lambda name: seconds[name])
    return result
