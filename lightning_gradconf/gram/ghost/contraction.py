"""How Grams are contracted: in the form that is fastest for a shape, a block of gradients at a time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Elements of scratch memory that a block may take: small enough to stay in the last level of a cache.
BLOCK = 1 << 20
_SMALL = 1e6  # operations that are not worth a choice
_NEAR = 4  # times as many operations may still be faster
_ROUNDINGS = 1000  # of the largest squared norm, by which Grams of two forms may differ
_NEW = 5e-3  # seconds that new memory and kernels may cost on a CPU

log = logging.getLogger("lightning_gradconf")
# A way to compute a Gram, which pauses after each of its parts and yields the share of the work that is done.
Form = Generator[float, None, Tensor]


@dataclass
class Workspace:
    """What the contractions of one module share.

    Attributes:
        rounding: The device, if the user allows it to round float32; contractions do not.
        tries: Whether this measurement tries one more form of each shape met before.
        seconds: For each shape met, how long the forms take that were used or tried.
        buffers: Scratch memory, since fresh memory costs as much as the arithmetic that fills it.
        products: The matrix that was multiplied with its own transpose last, and what came out.
    """

    rounding: torch.device | None = None
    tries: bool = False
    seconds: dict[Hashable, dict[str, float]] = field(default_factory=dict)
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


def completed(form: Form) -> Tensor:
    """Return what a form computes."""
    while True:
        try:
            next(form)
        except StopIteration as end:
            gram: Tensor = end.value
            return gram


def cheapest(workspace: Workspace, key: Hashable, forms: dict[str, tuple[float, Callable[[], Form]]]) -> Tensor:
    """Return the Gram that each form computes: at first by the form with the fewest operations, later by the fastest.

    A measurement with ``workspace.tries`` starts one form that was not timed before, and completes it only if it looks
    faster than all others. So no measurement pays for all forms. The first time, its Gram is compared with that of the
    form before it. Forms with far more operations are never started.
    """
    seconds = workspace.seconds.setdefault(key, {})
    least = min(cost for cost, _ in forms.values())
    untried = [name for name, (cost, _) in forms.items() if name not in seconds and _SMALL <= least >= cost / _NEAR]
    if workspace.tries and seconds and untried:
        name, known = untried[0], min(seconds, key=lambda name: seconds[name])
        form, seconds[name] = _begun(forms[name][1], seconds[known])
        if seconds[name] < seconds[known]:
            gram, expected = completed(form), completed(forms[known][1]())
            if _agree(gram, expected):
                return gram
            seconds[name] = math.inf
            log.warning(f"the form {name!r} of a contraction is wrong here, and left: please report it, with {key}")
            return expected
    name = min(seconds, key=lambda name: seconds[name]) if seconds else min(forms, key=lambda name: forms[name][0])
    if not untried:
        return completed(forms[name][1]())
    start = _now()
    gram = completed(forms[name][1]())
    seconds[name] = min(_now() - start, seconds.get(name, math.inf))
    return gram


def _begun(begin: Callable[[], Form], fastest: float) -> tuple[Form, float]:
    """Start a form; return it with an estimate of its total time, made from the last part that was computed.

    The first part also pays for new memory and kernels, so the second part is timed. A form of a single part may be
    started again for this.
    """
    form = begin()
    seconds, share = _part(form, 0.0)
    if share < 1:
        return form, _part(form, share)[0]
    if not fastest < seconds < 2 * fastest + _NEW:
        return form, seconds
    form = begin()
    return form, _part(form, 0.0)[0]


def _part(form: Form, done: float) -> tuple[float, float]:
    """Compute the next part of a form; return how long all of it would take, and the share that is done then."""
    start = _now()
    share = next(form)
    return (_now() - start) / (share - done), share


def _agree(gram: Tensor, expected: Tensor) -> bool:
    """Return whether two Grams differ by rounding alone, also where some of their entries are not finite.

    The largest gradient is the measure: of one that is almost nothing, forms may well keep different roundings.
    """
    kind = torch.finfo(gram.dtype)
    largest = expected.diagonal().max().clamp_min(kind.tiny / kind.eps)
    return not bool(((gram - expected).abs() > _ROUNDINGS * kind.eps * largest).any())


def _now() -> float:
    """Return the time, when an accelerator is done with what it has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _same_memory(some: Tensor, other: Tensor) -> bool:
    return some.data_ptr() == other.data_ptr() and some.shape == other.shape and some.stride() == other.stride()


def by_blocks(n: int, numel: int, major: int, block: Callable[[int, int], Tensor]) -> Form:
    """Return the Gram of n gradients of ``numel`` entries, from ``block(lo, hi)``: some of their ``major`` rows."""
    step = max(1, BLOCK * major // (n * numel))
    gram: Tensor | None = None
    for lo in range(0, major, step):
        hi = min(lo + step, major)
        rows = block(lo, hi).flatten(1)
        gram = rows.new_zeros(n, n) if gram is None else gram
        accumulate(gram, rows)
        yield hi / major
    assert gram is not None
    return mirrored(gram)


def triangle(n: int, step: int) -> Iterator[tuple[slice, slice, float]]:
    """Yield some of n rows, those from the first of them on, and the share of all pairs that is done with these."""
    done = 0
    for lo in range(0, n, step):
        here, rest = slice(lo, min(lo + step, n)), slice(lo, n)
        done += (here.stop - lo) * (n - lo)
        left = sum((min(after + step, n) - after) * (n - after) for after in range(lo + step, n, step))
        yield here, rest, done / (done + left)


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
