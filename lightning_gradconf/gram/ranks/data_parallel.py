"""Grams across ranks: every pair of units, also of different ranks, and no rank holds the gradients of all.

With ``ghost``, each rank finds the factors of its own units' gradients, and those of a parameter go to one rank, which
contracts them (`factors`). With the other engines, each rank computes the gradients of its own units, and an all-to-all
gives it its slice of the parameters for the units of all ranks to contract; what does not fit a memory budget is
computed and sent again, block by block (`engines.blocks`). An all-reduce of ``(n, n)`` adds up what the ranks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradconf.gram import loop, vmap
from lightning_gradconf.gram.blockwise import Plan, Progress, Rows, blockwise, least, plan, repeatable
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.factors import Factors, partial_grams
from lightning_gradconf.gram.ghost.memory import Memory
from lightning_gradconf.gram.measurement_mode import MeasuredLayers
from lightning_gradconf.gram.memory_budget import bytes_for_gradients, units_at_once
from lightning_gradconf.gram.metric_answers import answered
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import Objective, accumulation_dtype, sizes
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import in_words, say_why

_UNBOUNDED = 1 << 62


def gram_of_units(
    ranks: Ranks,
    target: Objective,
    units: Sequence[Any],
    unit_size: int | None,
    engine: str,
    dropout: bool,
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
    usual: int | None = None,
    memory: Memory | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram ``(ranks * n, ranks * n)`` of each parameter in rank order, and the engine used.

    All ranks use the same engine, also where only one of them has to fall back. ``memory_budget`` is that of each rank;
    all of them follow the plan of the least.
    """
    n, bytes_of_each = len(units), sizes(target.parameters.values())
    budget = agreed_budget(ranks, memory_budget, least(bytes_of_each))
    differentiators = {"vmap": vmap.differentiator, "loop": loop.differentiator}
    memory = Memory() if memory is None else memory
    at_once = n

    def measured(name: str) -> dict[str, Tensor]:
        if name == "ghost":
            factors = ranks.on_all(lambda: ghost.unit_factors(target, units, unit_size, memory, budget))
            return gram_of_factors(ranks, target.parameters, factors, n, memory.work)
        chunk = None if name == "loop" else (at_once if at_once < n else None)
        made = plan(n, bytes_of_each, budget, chunk)
        compute = repeatable(ranks.on_all(lambda: differentiators[name](target)), units, made)
        return contract(ranks, n, lambda i, j: ranks.on_all(lambda: compute(i, j)), made, sum(bytes_of_each), progress)

    layers = MeasuredLayers(running_statistics=unit_size == 1, dropout=dropout)
    with layers, answered(target, units[0]) as target:
        if engine == "loop":
            return measured("loop"), "loop"
        at_once = ranks.minimum(ranks.on_all(lambda: units_at_once(target, units, unit_size, usual, budget)))
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
                    reasons.append(f"{faster}: {in_words(error)}")
        grams = measured(name)
        say_why(target, name, reasons)
        return grams, name


def gram_of_factors(
    ranks: Ranks, parameters: Mapping[str, Tensor], factors: Factors, n: int, work: Workspace
) -> dict[str, Tensor]:
    """Return the Gram ``(ranks * n, ranks * n)`` of each parameter, from the factors of this rank's n gradients."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        grams = ranks.on_all(lambda: partial_grams(ranks, factors, work))
    size = ranks.size * n
    for name, p in parameters.items():  # another rank's
        if name not in grams:
            grams[name] = torch.zeros(size, size, dtype=accumulation_dtype(p), device=p.device)
    return ranks.add_up({name: grams[name] for name in parameters})


def agreed_budget(ranks: Ranks, memory_budget: int | str | None, smallest: int) -> int:
    """Return the least of what the ranks may fill with gradients, so that all make the same plan."""
    budget = ranks.on_all(lambda: bytes_for_gradients(memory_budget, smallest, ranks.device, ranks.size))
    return ranks.minimum(_UNBOUNDED if budget is None else budget)


def contract(
    ranks: Ranks,
    n: int,
    compute: Callable[[int, int], Rows],
    made: Plan,
    size: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the Gram of each parameter over the units of all ranks, from what computes gradients of this rank's.

    Each gradient that is computed is sent once. The exchange takes place in slices that need no more memory than a
    gradient, of ``size`` bytes.
    """
    # For what is sent, what is received, and the copy that pads a parameter to a multiple of the ranks.
    slices = partial(_exchange, ranks, width=max(size // 3, 1 << 20) // made.chunk)
    return ranks.add_up(blockwise(n, compute, made, ranks=ranks.size, pieces=slices, progress=progress))


def _exchange(ranks: Ranks, rows: Rows, width: int) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of the columns, for the units of all ranks, ``(ranks, units, columns)``.

    Columns go in slices of ``width`` bytes a gradient; a parameter is released when all of it was sent.
    """
    for name in list(rows):
        whole = rows.pop(name)
        for columns in torch.split(whole, max(1, width // (whole.itemsize * ranks.size)) * ranks.size, dim=1):
            padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % ranks.size))
            mine = padded.view(len(columns), ranks.size, -1).transpose(0, 1).contiguous()
            slices = torch.empty_like(mine)
            dist.all_to_all_single(slices, mine, group=ranks.group)
            yield name, slices
