"""What the gradients of n units are made of, for one use of a parameter.

Each class holds factors and can do three things: ``block(lo, hi)`` forms some leading rows of the n gradients, ``gram``
is their Gram in the cheapest way known, and ``weighted(r)`` is a weighted sum of the gradients that forms none of them.
The gradient of a unit, read as a matrix, has ``major`` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_gradconf.gram.ghost.contraction import (
    BLOCK,
    Form,
    Workspace,
    accumulate,
    by_blocks,
    cheapest,
    completed,
    mirrored,
    products,
    triangle,
)  # fmt: skip
from lightning_gradconf.gram.ghost.convolution import ConvolutionFactors
from lightning_gradconf.gram.process_state import full_float32


@dataclass
class Dense:
    """Gradients that exist already, ``(n, numel)``."""

    gradients: Tensor

    @property
    def n(self) -> int:
        """Units."""
        return self.gradients.shape[0]

    @property
    def numel(self) -> int:
        """Entries of a gradient."""
        return self.gradients.shape[1]

    major = numel

    def block(self, lo: int, hi: int) -> Tensor:
        """Return some entries of the gradients, ``(n, hi - lo)``."""
        return self.gradients[:, lo:hi]

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of the gradients times ``weights (n,)``, ``(numel,)``."""
        return weights @ self.gradients

    def gram(self, workspace: Workspace) -> Tensor:
        """Return all inner products, ``(n, n)``."""
        return workspace.square(self.gradients)


@dataclass
class OuterProducts:
    """Gradients that are sums of outer products: for each of g groups, the sum over r of ``left[r] right[r]^T``.

    Attributes:
        left: ``(g, n, rows, p)``.
        right: ``(g, n, rows, q)``.
    """

    left: Tensor
    right: Tensor

    @property
    def n(self) -> int:
        """Units."""
        return self.left.shape[1]

    @property
    def numel(self) -> int:
        """Entries of a gradient."""
        return self.left.shape[0] * self.left.shape[3] * self.right.shape[3]

    @property
    def major(self) -> int:
        """Rows of a gradient read as a matrix: those of ``left``, or the groups if there are several."""
        return self.left.shape[3] if self.left.shape[0] == 1 else self.left.shape[0]

    def block(self, lo: int, hi: int) -> Tensor:
        """Return some rows of the gradients, ``(n, hi - lo, ...)``."""
        if self.left.shape[0] == 1:
            return torch.bmm(self.left[0, ..., lo:hi].transpose(1, 2), self.right[0])
        return (self.left[lo:hi].transpose(2, 3) @ self.right[lo:hi]).flatten(2).transpose(0, 1)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of the gradients times ``weights (n,)``, ``(numel,)``."""
        left = (self.left * weights.view(-1, 1, 1)).flatten(1, 2)
        return (left.transpose(1, 2) @ self.right.flatten(1, 2)).flatten()

    def gram(self, workspace: Workspace) -> Tensor:
        """Return all inner products, ``(n, n)``, by pairs of rows or by gradients, whichever costs less."""
        groups, n, rows, p = self.left.shape
        q = self.right.shape[3]
        parts = -(-n // self._units_at_once)
        pairs = (n * rows) ** 2 * (p + q + 16) * (1 + 1 / parts) / 2
        formed = n * rows * p * q + n * n * p * q + 8 * n * p * q
        tall = self if p >= q else OuterProducts(self.right, self.left)  # blocks of it are nearer to squares
        forms = {
            "pairs": (groups * pairs, lambda: self._pairs(workspace)),
            "formed": (groups * formed, lambda: by_blocks(n, self.numel, tall.major, partial(tall._formed, workspace))),
        }
        return cheapest(workspace, ("rows", *self.left.shape, q), forms)

    @property
    def _units_at_once(self) -> int:
        """Units of which the rows are paired with all others at a time."""
        _, n, rows, _ = self.left.shape
        return max(1, BLOCK // max(1, n * rows * rows))

    def _formed(self, workspace: Workspace, lo: int, hi: int) -> Tensor:
        if self.left.shape[0] > 1:
            return self.block(lo, hi)
        left, right = self.left[0, ..., lo:hi].transpose(1, 2), self.right[0]
        return torch.bmm(left, right, out=workspace.empty("rows", left, len(left), hi - lo, right.shape[2]))

    def _pairs(self, workspace: Workspace) -> Form:
        groups, n, rows, _ = self.left.shape
        gram = self.left.new_zeros(n, n)
        for group, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            if rows == 1:
                gram.addcmul_(workspace.square(left[:, 0]), workspace.square(right[:, 0]))
                yield (group + 1) / groups
                continue
            for here, rest, done in triangle(n, self._units_at_once):
                pairs = products(workspace, "left", left[here], left[rest])
                pairs *= products(workspace, "right", right[here], right[rest])
                gram[here, rest] += pairs.view(-1, rows, n - rest.start, rows).sum((1, 3))
                yield (group + done) / groups
        return gram if rows == 1 else mirrored(gram)


@dataclass
class IndexedRows:
    """Gradients of a table of which rows were looked up: row ``index[r]`` receives ``values[r]``.

    Attributes:
        index: ``(n, rows)``.
        values: ``(n, rows, q)``.
        major: The number of rows of the table.
    """

    index: Tensor
    values: Tensor
    major: int

    @property
    def n(self) -> int:
        """Units."""
        return self.values.shape[0]

    @property
    def numel(self) -> int:
        """Entries of a gradient."""
        return self.major * self.values.shape[2]

    def block(self, lo: int, hi: int) -> Tensor:
        """Return some rows of the gradients of the table, ``(n, hi - lo, q)``."""
        n, _, q = self.values.shape
        inside = (self.index >= lo) & (self.index < hi)
        unit = torch.arange(n, device=self.index.device)[:, None].expand_as(self.index)
        table = self.values.new_zeros(n * (hi - lo), q)
        table.index_add_(0, (unit * (hi - lo) + self.index - lo)[inside], self.values[inside])
        return table.view(n, hi - lo, q)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of the gradients times ``weights (n,)``, ``(numel,)``."""
        values = (self.values * weights.view(-1, 1, 1)).flatten(0, 1)
        table = values.new_zeros(self.major, values.shape[1])
        return table.index_add_(0, self.index.flatten(), values).flatten()

    def gram(self, workspace: Workspace) -> Tensor:
        """Return all inner products, ``(n, n)``: over the rows of the table that two units have both looked up."""
        n, _, q = self.values.shape
        unit = torch.arange(n, device=self.index.device)[:, None]
        key, where = (self.index * n + unit).flatten().unique(return_inverse=True)
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
        """Return whether few units have looked up the same rows; ``word`` is in order."""
        n, rows = self.index.shape
        _, counts = word.unique_consecutive(return_counts=True)
        pairs = int(counts.square().sum())
        return 8 * pairs < n * n * rows

    def _by_table(self, word: Tensor, unit: Tensor, values: Tensor) -> Tensor:
        """Return the Gram from the part of the table that was looked up, some columns at a time."""
        n, _, q = self.values.shape
        used, word = word.unique_consecutive(return_inverse=True)
        gram = values.new_zeros(n, n)
        step = max(1, BLOCK // (n * len(used)))
        for lo in range(0, q, step):
            some = values[:, lo : lo + step]
            table = values.new_zeros(n, len(used), some.shape[1])
            table[unit, word] = some
            accumulate(gram, table.flatten(1))
        return mirrored(gram)


@dataclass
class Multiples:
    """Gradients that are multiples of one direction, as those of a penalty on the weights.

    Attributes:
        coefficients: ``(n,)``.
        direction: ``(numel,)``.
        major: Rows of a gradient read as a matrix, any divisor of ``numel``.
    """

    coefficients: Tensor
    direction: Tensor
    major: int = 1

    @property
    def n(self) -> int:
        """Units."""
        return len(self.coefficients)

    @property
    def numel(self) -> int:
        """Entries of a gradient."""
        return len(self.direction)

    def block(self, lo: int, hi: int) -> Tensor:
        """Return some rows of the gradients, ``(n, hi - lo, ...)``."""
        return self.coefficients[:, None, None] * self.direction.view(self.major, -1)[lo:hi]

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum of the gradients times ``weights (n,)``, ``(numel,)``."""
        return (weights @ self.coefficients) * self.direction

    def gram(self, workspace: Workspace) -> Tensor:
        """Return all inner products, ``(n, n)``."""
        return self.coefficients.outer(self.coefficients) * self.direction.square().sum()


GradientFactors = Dense | Multiples | OuterProducts | IndexedRows | ConvolutionFactors


def materialize(*parts: GradientFactors) -> Tensor:
    """Return the gradients themselves, ``(n, numel)``: the sum over several uses of a parameter."""
    first, *others = (part.block(0, part.major).flatten(1) for part in parts)
    return sum(others, first)


def gram_of_sum(parts: Sequence[GradientFactors], workspace: Workspace) -> Tensor:
    """Return the Gram ``(n, n)`` of gradients that are sums over several uses of a parameter."""
    with nullcontext() if workspace.rounding is None else full_float32(workspace.rounding):
        return _gram_of_sum(parts, workspace)


def _gram_of_sum(parts: Sequence[GradientFactors], workspace: Workspace) -> Tensor:
    if len(parts) == 1:
        return parts[0].gram(workspace)
    rows = [part for part in parts if isinstance(part, OuterProducts)]
    if len(rows) == len(parts) and len({(p.left.shape[0], p.left.shape[3]) for p in rows}) == 1:
        left, right = (torch.cat([getattr(part, side) for part in rows], 2) for side in ("left", "right"))
        return OuterProducts(left, right).gram(workspace)
    majors = {part.major for part in parts if not isinstance(part, Multiples)} or {parts[0].numel}
    if len(majors) == 1:
        (major,) = majors
        parts = [replace(part, major=major) if isinstance(part, Multiples) else part for part in parts]
        first = parts[0]

        def block(lo: int, hi: int) -> Tensor:
            return sum((part.block(lo, hi).flatten(1) for part in parts[1:]), first.block(lo, hi).flatten(1))

        return completed(by_blocks(first.n, first.numel, major, block))
    gradients = materialize(*parts)
    return gradients @ gradients.T
