"""Grams across ranks: every pair of units, also of different ranks, and no rank holds the gradients of all.

Each rank computes the gradients of its own units. An all-to-all gives each rank its slice of the parameters for the
units of all ranks; it contracts the slice, and an all-reduce of ``(n, n)`` adds the slices up. What does not fit a
memory budget is computed and sent again, block by block (`engines.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradconf.engines import ghost, loop, reason, say_why, vmap
from lightning_gradconf.engines.blocks import Plan, Progress, Rows, blockwise, least, plan, repeatable
from lightning_gradconf.engines.budget import bytes_for_gradients, units_at_once
from lightning_gradconf.engines.layers import MeasuredLayers
from lightning_gradconf.engines.memory import Memory
from lightning_gradconf.engines.objective import Objective, accumulation_dtype, sizes
from lightning_gradconf.factors import Factors, partial_grams
from lightning_gradconf.isolation import untouched

Result = TypeVar("Result")
_UNBOUNDED = 1 << 62


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def minimum(value: int, device: torch.device) -> int:
    """Return the least ``value`` of all ranks."""
    if world_size() == 1:
        return value
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def gather(values: list[Result]) -> list[Result]:
    """Return the values of all ranks, in rank order."""
    if world_size() == 1:
        return values
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, values)
    return list(chain.from_iterable(found))


def on_all_ranks(action: Callable[[], Result], device: torch.device) -> Result:
    """Return ``action()`` if it succeeds on all ranks; where it fails on one, raise on all.

    Every rank takes part, so that none waits for another that has given up.

    Raises:
        Exception: What ``action`` raised here, or a RuntimeError if it failed elsewhere.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if minimum(error is None, device):
        return result  # type: ignore[return-value]
    raise error or RuntimeError("another rank could not measure, and its own log says why")


def gram_of_units(
    target: Objective,
    units: Sequence[Any],
    unit_size: int | None,
    engine: str,
    chunk_size: int | None,
    dropout: bool,
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
    usual: int | None = None,
    memory: Memory | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram ``(world_size * n, world_size * n)`` of each parameter in rank order, and the engine used.

    All ranks use the same engine, also where only one of them has to fall back. ``memory_budget`` is that of each rank;
    all of them follow the plan of the least.
    """
    n, bytes_of_each, device = len(units), sizes(target.parameters.values()), target.device
    budget = agreed_budget(memory_budget, least(bytes_of_each), device)
    differentiators = {"vmap": vmap.differentiator, "loop": loop.differentiator}
    memory = Memory() if memory is None else memory
    at_once = n

    def measured(name: str) -> dict[str, Tensor]:
        if name == "ghost":
            factors = on_all_ranks(lambda: ghost.unit_factors(target, units, unit_size, memory), device)
            return _by_factors(target, factors, n, memory)
        chunk = None if name == "loop" else chunk_size or (at_once if at_once < n else None)
        made = plan(n, bytes_of_each, budget, chunk)
        compute = repeatable(on_all_ranks(lambda: differentiators[name](target), device), units, made)
        return contract(n, lambda i, j: on_all_ranks(lambda: compute(i, j), device), made, sum(bytes_of_each), progress)

    with MeasuredLayers(running_statistics=unit_size == 1, dropout=dropout):
        if engine == "loop":
            return measured("loop"), "loop"
        fitting = on_all_ranks(lambda: units_at_once(target, units, unit_size, usual, budget), device)
        at_once = minimum(fitting, device)
        name, reasons = engine, list[str]()
        if engine == "auto":
            name, needed = "loop", {"ghost": n, "vmap": min(n, 2)}
            for faster in ("vmap",) if dropout or n < 2 else ("ghost", "vmap"):  # a mask for all is not that of each
                if at_once < needed[faster]:
                    reasons.append(f"{faster}: a pass of several units does not fit the memory budget")
                    continue
                try:
                    with untouched(target.module):
                        grams = measured(faster)
                    say_why(target, faster, reasons)
                    return grams, faster
                except Exception as error:  # the user's own comes up again in the loop
                    reasons.append(reason(faster, error))
        grams = measured(name)
        say_why(target, name, reasons)
        return grams, name


def _by_factors(target: Objective, factors: Factors, n: int, memory: Memory) -> dict[str, Tensor]:
    """The Gram of each parameter over the units of all ranks, of which each rank has the factors of its own."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        grams = on_all_ranks(lambda: partial_grams(factors, memory.work), target.device)
    size = world_size() * n
    for name, p in target.parameters.items():  # another rank's
        if name not in grams:
            grams[name] = torch.zeros(size, size, dtype=accumulation_dtype(p), device=p.device)
    return add_up({name: grams[name] for name in target.parameters})


def agreed_budget(memory_budget: int | str | None, smallest: int, device: torch.device) -> int:
    """Return the least of what the ranks may fill with gradients, so that all make the same plan."""
    budget = on_all_ranks(lambda: bytes_for_gradients(memory_budget, smallest, device, world_size()), device)
    return minimum(_UNBOUNDED if budget is None else budget, device)


def contract(
    n: int, compute: Callable[[int, int], Rows], made: Plan, size: int, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Return the Gram of each parameter over the units of all ranks, from what computes gradients of this rank's.

    Each gradient that is computed is sent once. The exchange takes place in slices that need no more memory than a
    gradient, of ``size`` bytes.
    """
    # For what is sent, what is received, and the copy that pads a parameter to a multiple of the ranks.
    slices = partial(_exchange, width=max(size // 3, 1 << 20) // made.chunk)
    return add_up(blockwise(n, compute, made, ranks=world_size(), pieces=slices, progress=progress))


def add_up(grams: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sums over ranks of what each of them has of the Gram of each parameter."""
    for dtype in dict.fromkeys(gram.dtype for gram in grams.values()):  # in one order on all ranks, as no set has
        names = [name for name, gram in grams.items() if gram.dtype == dtype]
        total = torch.stack([grams[name] for name in names])
        dist.all_reduce(total)
        grams |= dict(zip(names, total, strict=True))
    return grams


def _exchange(rows: Rows, width: int) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of the columns, for the units of all ranks, ``(ranks, units, columns)``.

    Columns go in slices of ``width`` bytes a gradient; a parameter is released when all of it was sent.
    """
    ranks = world_size()
    for name in list(rows):
        whole = rows.pop(name)
        for columns in torch.split(whole, max(1, width // (whole.itemsize * ranks)) * ranks, dim=1):
            padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % ranks))
            mine = padded.view(len(columns), ranks, -1).transpose(0, 1).contiguous()
            slices = torch.empty_like(mine)
            dist.all_to_all_single(slices, mine)
            yield name, slices
