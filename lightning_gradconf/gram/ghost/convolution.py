"""The gradients of a convolution's weight, and four ways to their inner products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradconf.gram.ghost.contraction import (
    BLOCK,
    Form,
    Workspace,
    accumulate,
    by_blocks,
    cheapest,
    mirrored,
    products,
    triangle,
)  # fmt: skip


@dataclass
class ConvolutionFactors:
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
    def numel(self) -> int:
        """Entries of a gradient."""
        return self.weight.numel()

    @property
    def major(self) -> int:
        """Rows of a gradient read as a matrix: the first dimension of the weight."""
        return self.weight.shape[0]

    def block(self, lo: int, hi: int) -> Tensor:
        """Return some rows of the gradients, ``(n, hi - lo, ...)``, by PyTorch's own weight gradient of each unit."""
        whole = hi - lo == self.major or self.transposed or self.groups > 1
        delta = self.delta if whole else self.delta[:, lo:hi]
        weight = self.weight if whole else self.weight[lo:hi]
        units = zip(self.input.chunk(self.n), delta.chunk(self.n), strict=True)
        gradients = torch.stack([self._backward(x, d, weight, self.groups) for x, d in units])
        return gradients[:, lo:hi] if whole else gradients

    def gram(self, workspace: Workspace) -> Tensor:
        """Return all inner products, ``(n, n)``, in the form that is the fastest of those tried."""
        samples, out = self.delta.shape[:2]
        pixels, inputs = math.prod(self.delta.shape[2:]), math.prod(self.input.shape[2:])
        numel = self.weight.numel()
        formed = samples * pixels * numel / (self.groups if not self.transposed else 1) + self.n**2 * numel
        forms: dict[str, tuple[float, Callable[[], Form]]] = {}
        if self.groups == 1 and not self.transposed:
            taps = math.prod(self.weight.shape[2:])
            shifted = samples**2 / 2 * (inputs**2 * self.input.shape[1] + pixels**2 * (out + 16 * taps))
            forms["taps"] = (formed, lambda: self._by_taps(workspace))  # the first of equals is used first
            forms["shifted"] = (shifted, lambda: self._shifted(workspace))
        forms["unit"] = (formed, lambda: self._blocks(self.block))
        if not self.transposed and (self.groups == 1 or samples == self.n):
            forms["folded"] = (formed, lambda: self._blocks(self._folded))
        key = ("patches", self.n, *self.input.shape, *self.weight.shape, *self.delta.shape, self.groups)
        return cheapest(workspace, key, forms)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of the gradients times ``weights (n,)``, ``(numel,)``."""
        scaled = torch.unflatten(self.delta, 0, (self.n, -1)) * weights.view(-1, *[1] * self.delta.dim())
        return self._backward(self.input, scaled.flatten(0, 1), self.weight, self.groups).flatten()

    def _blocks(self, block: Callable[[int, int], Tensor]) -> Form:
        return by_blocks(self.n, self.numel, self.major, block)

    def _folded(self, lo: int, hi: int) -> Tensor:
        """Form gradients in one call, each sample as a group of channels of one image."""
        samples = len(self.input)
        first = lo
        if self.groups > 1:  # whole groups, from which the rows are cut
            per_group = self.major // self.groups
            some = slice(lo // per_group, -(-hi // per_group))
            first, groups = some.start * per_group, some.stop - some.start
            x, d = (torch.unflatten(t, 1, (self.groups, -1))[:, some] for t in (self.input, self.delta))
            weight = torch.unflatten(self.weight, 0, (self.groups, -1))[some].flatten(0, 1)
        else:
            x, d, weight, groups = self.input, self.delta[:, lo:hi], self.weight[lo:hi], 1
        folded_x, folded_d = (t.reshape(1, -1, *t.shape[-(self.weight.dim() - 2) :]) for t in (x, d))
        stub = weight.new_empty(1).expand(samples * len(weight), *weight.shape[1:])
        gradients = self._backward(folded_x, folded_d, stub, samples * groups)
        return gradients.view(self.n, -1, *weight.shape).sum(1)[:, lo - first : hi - first]

    def _backward(self, x: Tensor, d: Tensor, weight: Tensor, groups: int) -> Tensor:
        mask = [False, True, False]
        geometry = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding)
        gradient: Tensor = torch.ops.aten.convolution_backward(d, x, weight, None, *geometry, groups, mask)[1]
        return gradient

    def _by_taps(self, workspace: Workspace) -> Form:
        """Form the gradients of a few taps of the kernel at a time, and add up their inner products."""
        out, channels, *kernel = self.weight.shape
        edges = [edge for padding in reversed(self.padding) for edge in (padding, padding)]
        x = torch.unflatten(F.pad(self.input.movedim(1, -1), [0, 0, *edges]), 0, (self.n, -1))
        d = torch.unflatten(self.delta, 0, (self.n, -1)).transpose(1, 2).flatten(2)
        k, width, out_size = x.shape[1], kernel[-1], self.delta.shape[2:]
        unit, sample, *steps, channel = x.stride()
        fits = [taps for taps in range(1, width + 1) if width % taps == 0 and self.n * out * channels * taps <= BLOCK]
        taps = max(fits, default=1)
        strides = [step * stride for step, stride in zip(steps, self.stride, strict=True)]
        view = (unit, sample, *strides, steps[-1] * self.dilation[-1], channel)
        result = workspace.empty("rows", x, self.n, out, taps * channels)
        # Few enough units at once for what they see to stay in the cache, and many enough for few calls.
        together = max(1, (BLOCK >> 3) // (d.shape[2] * taps * channels))
        gram = x.new_zeros(self.n, self.n)
        offsets = list(product(*map(range, kernel[:-1]), range(0, width, taps)))
        for done, offset in enumerate(offsets, 1):
            start = sum(o * step * dilation for o, step, dilation in zip(offset, steps, self.dilation, strict=True))
            for lo in range(0, self.n, together):
                some = slice(lo, lo + together)
                window = workspace.empty("window", x, len(d[some]), k, *out_size, taps, channels)
                window.copy_(x.as_strided(window.shape, view, x.storage_offset() + lo * unit + start))
                torch.bmm(d[some], window.view(len(window), -1, taps * channels), out=result[some])
            accumulate(gram, result.flatten(1))
            yield done / len(offsets)
        return mirrored(gram)

    def _shifted(self, workspace: Workspace) -> Form:
        """Contract products of patches as sums of products of shifted pixels, times products of deltas."""
        samples, _, *size = self.input.shape
        out_size = self.delta.shape[2:]
        x, d = (t.flatten(2).transpose(1, 2).contiguous() for t in (self.input, self.delta))
        step = max(1, BLOCK // (samples * max(x.shape[1], d.shape[1]) ** 2))
        gram = x.new_zeros(samples, samples)
        for here, rest, done in triangle(samples, step):
            lo = rest.start
            pixels = products(workspace, "left", x[here], x[rest])
            deltas = products(workspace, "right", d[here], d[rest])
            pixels = pixels.view(-1, *size, samples - lo, *size)
            patches = torch.zeros_like(deltas).view(-1, *out_size, samples - lo, *out_size)
            for offset in product(*map(range, self.weight.shape[2:])):
                windows = [self._window(i, o, size[i], out_size[i]) for i, o in enumerate(offset)]
                read = (slice(None), *(window[0] for window in windows))
                write = (slice(None), *(window[1] for window in windows))
                patches[write + write] += pixels[read + read]
            rows = d.shape[1]
            gram[here, rest] = (patches.view_as(deltas) * deltas).view(-1, rows, samples - lo, rows).sum((1, 3))
            yield done
        return mirrored(gram).view(self.n, -1, self.n, samples // self.n).sum((1, 3))

    def _window(self, axis: int, offset: int, size: int, out_size: int) -> tuple[slice, slice]:
        """Return which inputs a tap of the kernel reads along an axis, and for which outputs."""
        shift = offset * self.dilation[axis] - self.padding[axis]
        stride = self.stride[axis]
        first = max(0, -(shift // stride))
        last = min(out_size, (size - 1 - shift) // stride + 1)
        if last <= first:
            return slice(0, 0), slice(0, 0)
        return slice(first * stride + shift, (last - 1) * stride + shift + 1, stride), slice(first, last)
