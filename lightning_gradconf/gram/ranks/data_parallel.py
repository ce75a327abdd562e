"""Grams across ranks: every pair of units, also of different ranks, and no rank holds the gradients of all.

With ``ghost``, each rank finds the factors of its own units' gradients, and those of a parameter go to one rank, which
contracts them (`factor_exchange`). With the other engines, each rank computes the gradients of its own units, and an
all-to-all gives it its slice of the parameters for the units of all ranks to contract; what does not fit a memory
budget is computed and sent again, block by block (`blockwise`). An all-reduce of ``(n, n)`` adds up what ranks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradconf.gram.blockwise import Plan, Progress, Rows, blockwise, min_budget
from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.memory_budget import bytes_for_gradients
from lightning_gradconf.gram.objective import accumulation_dtype
from lightning_gradconf.gram.ranks.factor_exchange import Factors, partial_grams
from lightning_gradconf.gram.ranks.process_group import Ranks


def gram_of_factors(
    ranks: Ranks, parameters: Mapping[str, Tensor], factors: Factors, n: int, workspace: Workspace
) -> dict[str, Tensor]:
    """Return the Gram ``(ranks * n, ranks * n)`` of each parameter, from the factors of this rank's n gradients."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        grams = ranks.run_on_all_ranks(lambda: partial_grams(ranks, factors, workspace))
    size = ranks.size * n
    for name, p in parameters.items():  # another rank's
        if name not in grams:
            grams[name] = torch.zeros(size, size, dtype=accumulation_dtype(p), device=p.device)
    return ranks.add_up({name: grams[name] for name in parameters})


def agreed_budget(ranks: Ranks, memory_budget: int | str | None, sizes: Sequence[int]) -> int:
    """Return the least of what the ranks may fill with gradients of these sizes, so that all make the same plan."""
    how = (memory_budget, min_budget(sizes), ranks.device, ranks.size)
    return ranks.minimum(ranks.run_on_all_ranks(lambda: bytes_for_gradients(*how)))


def contract(
    ranks: Ranks,
    n: int,
    compute: Callable[[int, int], Rows],
    plan: Plan,
    size: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the Gram of each parameter over the units of all ranks, from what computes gradients of this rank's.

    Each gradient that is computed is sent once. The exchange takes place in slices that need no more memory than a
    gradient, of ``size`` bytes.
    """
    # For what is sent, what is received, and the copy that pads a parameter to a multiple of the ranks.
    slices = None if ranks.size == 1 else partial(_exchange, ranks, width=max(size // 3, 1 << 20) // plan.chunk)
    return ranks.add_up(blockwise(n, compute, plan, ranks=ranks.size, pieces=slices, progress=progress))


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
