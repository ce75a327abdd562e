"""How Grams are contracted: in the form that is fastest for a shape, a block of gradients at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Elements of scratch memory that a block may take: small enough to stay in the last level of a cache.
BLOCK = 1 << 20
_NEW = 5e-3  # seconds that new memory and kernels may cost on a CPU


@dataclass
class Workspace:
    """What the contractions of one module share.

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


def cheapest(workspace: Workspace, key: Hashable, forms: dict[str, tuple[float, Callable[[], Tensor]]]) -> Tensor:
    """Return what all ``forms`` compute: in the one that was fastest before, or in each once, to find it.

    Operations are counted to leave out what cannot win, and to save the measurement where it does not matter.
    """
    if (name := workspace.fastest.get(key)) is not None:
        return forms[name][1]()
    least = min(cost for cost, _ in forms.values())
    near = {name: form for name, (cost, form) in forms.items() if cost <= 8 * least}
    if len(near) == 1 or least < 1e6:
        workspace.fastest[key] = min(forms, key=lambda name: forms[name][0])
        return forms[workspace.fastest[key]][1]()
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
    workspace.fastest[key] = min(seconds, key=lambda name: seconds[name])
    return result


def _same_memory(some: Tensor, other: Tensor) -> bool:
    return some.data_ptr() == other.data_ptr() and some.shape == other.shape and some.stride() == other.stride()


def by_blocks(n: int, numel: int, major: int, block: Callable[[int, int], Tensor]) -> Tensor:
    """Return the Gram of n gradients of ``numel`` entries, from ``block(lo, hi)``: some of their ``major`` rows."""
    step = max(1, BLOCK * major // (n * numel))
    gram: Tensor | None = None
    for lo in range(0, major, step):
        rows = block(lo, min(lo + step, major)).flatten(1)
        gram = rows.new_zeros(n, n) if gram is None else gram
        accumulate(gram, rows)
    assert gram is not None
    return mirrored(gram)


def accumulate(gram: Tensor, rows: Tensor) -> None:
    """Add the products of ``rows`` to ``gram``: the upper triangle, and of the lower one what comes with it."""
    step = len(rows) if len(rows) < 32 else max(16, -(-len(rows) // 4))
    for lo in range(0, len(rows), step):
        gram[lo : lo + step, lo:].addmm_(rows[lo : lo + step], rows[lo:].T)


def mirrored(gram: Tensor) -> Tensor:
    """Return the symmetric matrix of which the upper triangle is known."""
    return gram.triu() + gram.triu(1).T


def products(workspace: Workspace, purpose: str, some: Tensor, others: Tensor) -> Tensor:
    """Return the inner products of all rows of ``some (units, rows, q)`` with all of ``others``, in scratch memory."""
    some, others = some.flatten(0, 1), others.flatten(0, 1)
    return torch.mm(some, others.T, out=workspace.empty(purpose, some, len(some), len(others)))
