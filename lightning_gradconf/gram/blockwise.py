"""Exact Grams in bounded memory: hold a block of gradients, and compute the others again to pair them with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradconf.gram.memory_budget import megabytes
from lightning_gradconf.gram.process_state import full_float32, random_states

log = logging.getLogger("lightning_gradconf")
Rows = dict[str, Tensor]
Progress = Callable[[int, int], None]


class Plan(NamedTuple):
    """How the Gram of n gradients is made.

    Attributes:
        block: Gradients held at once.
        chunk: Gradients computed at once, beside those held; ``block`` is a multiple of it.
        passes: Gradients computed in all, some of them several times; n if all are held.
    """

    block: int
    chunk: int
    passes: int


def make_plan(n: int, sizes: Sequence[int], budget: int, at_once: int | None = None) -> Plan:
    """Return how to make the Gram of ``n`` gradients within ``budget`` bytes.

    Where an ordinary pass holds the parameters' gradients, engines hold copies of the parameters; beside these they
    need room to rearrange one parameter's gradient, and for one more gradient if they compute several at once.

    Args:
        n: How many gradients.
        sizes: The bytes of each parameter's gradient.
        budget: Bytes to make do with.
        at_once: How many gradients are computed at once; None is as many as fit well.

    Raises:
        ValueError: The budget has no room for two gradients.

    >>> make_plan(n=32, sizes=[2 * 10**8, 8 * 10**8], budget=10**10)
    Plan(block=8, chunk=1, passes=80)
    """
    size, largest = sum(sizes), max(sizes)
    fitting = (budget - largest) // max(1, size)
    if fitting > n:
        return Plan(n, min(at_once or n, n), n)
    if fitting < 2:
        raise ValueError(
            f"a memory budget of {megabytes(budget)} has no room for two gradients of {megabytes(size)}, which it "
            f"takes to compare them; allow {megabytes(min_budget(sizes))}, measure fewer parameters (parameters=), or "
            "use engine='ghost', which holds none where it applies"
        )
    chunk = min(at_once or max(1, fitting // 8), max(1, fitting // 3))
    block = (fitting - chunk - (chunk > 1)) // chunk * chunk
    plan = Plan(block, chunk, sum(n - start for start in range(0, n, block)))
    _say_once(n, size, plan)
    return plan


def min_budget(sizes: Sequence[int]) -> int:
    """Return the smallest budget that `make_plan` takes, in bytes."""
    return 2 * sum(sizes) + max(sizes)


@lru_cache(maxsize=256)
def _say_once(n: int, size: int, plan: Plan) -> None:
    log.info(
        f"{n} gradients of {megabytes(size)} do not fit the memory budget: {plan.block} are held at a time, and the "
        f"others computed again to be paired with them, {plan.passes / n - 1:.1f} extra passes over the units. Raise "
        "memory_budget or lower num_units to be faster."
    )


def blockwise(
    n: int,
    compute: Callable[[int, int], Rows],
    plan: Plan,
    *,
    ranks: int = 1,
    pieces: Callable[[Rows], Iterator[tuple[str, Tensor]]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the Gram ``(ranks * n, ranks * n)`` of each parameter.

    Args:
        n: The units of this rank.
        compute: The gradients of this rank's units from one number to another, ``{parameter name: (units, numel)}``.
        plan: The plan.
        ranks: How many ranks' units are compared.
        pieces: What turns gradients of this rank into pieces of those of all, ``(ranks, units, columns)``, in the same
            order each time; the Grams of the pieces of a parameter add up.
        progress: Called with the gradients computed so far and those in all.
    """
    done = 0
    grams: dict[str, Tensor] = {}

    def add(name: str, left: Tensor, right: Tensor, i: slice, j: slice) -> None:
        if name not in grams:
            grams[name] = left.new_zeros(ranks, n, ranks, n)
        with full_float32(left.device):
            product = (left.flatten(0, 1) @ right.flatten(0, 1).T).view(*left.shape[:2], *right.shape[:2])
        grams[name][:, i, :, j] += product
        if i != j:
            grams[name][:, j, :, i] += product.permute(2, 3, 0, 1)

    for low in range(0, n, plan.block):
        block = slice(low, min(low + plan.block, n))
        held: list[tuple[str, Tensor]] = []
        for start in range(low, n, plan.chunk):
            chunk = slice(start, min(start + plan.chunk, n))
            for k, (name, piece) in enumerate((pieces or _alone)(compute(chunk.start, chunk.stop))):
                if chunk == block:
                    add(name, piece, piece, block, block)
                    if block.stop < n:
                        held.append((name, piece))
                elif start < block.stop:
                    if start == low:
                        held.append((name, piece.new_empty(ranks, block.stop - low, piece.shape[2])))
                    held[k][1][:, start - low : chunk.stop - low] = piece
                else:
                    add(name, held[k][1], piece, block, chunk)
            if chunk.stop == block.stop and chunk != block:
                for name, piece in held:
                    add(name, piece, piece, block, block)
            done += chunk.stop - start
            if progress is not None:
                progress(done, plan.passes)
    return {name: gram.view(ranks * n, ranks * n) for name, gram in grams.items()}


def repeatable(
    gradients: Callable[[Sequence[Any]], Rows], units: Sequence[Any], plan: Plan
) -> Callable[[int, int], Rows]:
    """Return what computes the gradients of some units, the second time with the random numbers of the first.

    Raises:
        RuntimeError: (by what is returned) A gradient is another one the second time.
    """
    if plan.passes == len(units):
        return lambda start, stop: gradients(units[start:stop])
    before: dict[int, list[tuple[Callable[[Any], Any], Any]]] = {}
    norms: dict[int, Tensor] = {}

    def compute(start: int, stop: int) -> Rows:
        for restore, state in before.setdefault(start, random_states()):
            restore(state)
        rows = gradients(units[start:stop])
        of_parameters = [torch.linalg.vector_norm(row, dim=1).cpu().double() for row in rows.values()]
        now = torch.stack(of_parameters).square().sum(0)
        if not torch.allclose(now, norms.setdefault(start, now), rtol=1e-3, atol=0.0, equal_nan=True):
            raise RuntimeError(
                "the gradient of a unit changed when it was computed again, so its loss depends on more than weights, "
                "data and the global random state; raise memory_budget until all gradients fit, or use engine='ghost'"
            )
        return rows

    return compute


def _alone(rows: Rows) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients as they are, each released as soon as it is used."""
    for name in list(rows):
        yield name, rows.pop(name).unsqueeze(0)
