"""Grams across ranks: every pair of units, also of different ranks, and no rank holds the gradients of all.

Each rank computes the gradients of its own units. An all-to-all gives each rank its slice of the parameters for the
units of all ranks; it contracts the slice, and an all-reduce of ``(n, n)`` adds the slices up. Without a process group
the functions here do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_gradconf.engines import loop, vmap
from lightning_gradconf.engines.layers import MeasuredLayers
from lightning_gradconf.engines.objective import Objective

Result = TypeVar("Result")


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
    device: torch.device,
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram ``(world_size * n, world_size * n)`` of each parameter in rank order, and the engine used.

    All ranks use the same engine, also where only one of them has to fall back. The engines that form no gradients
    have nothing to exchange, so ``"auto"`` is vmap, then the loop.
    """
    engines: dict[str, Callable[[], dict[str, Tensor]]] = {
        "vmap": lambda: vmap.unit_gradients(target, units, chunk_size),
        "loop": lambda: loop.unit_gradients(target, units),
    }
    names = list(engines) if engine in ("auto", "ghost") else [engine]
    with MeasuredLayers(running_statistics=unit_size == 1, dropout=dropout):
        for name in names:
            try:
                rows = on_all_ranks(engines[name], device)
                break
            except Exception:
                if name == names[-1]:
                    raise
    return contract(rows), name


def contract(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the Gram of each parameter over the units of all ranks, from this rank's gradients ``(n, numel)``.

    Sends and receives about n * numel numbers a parameter, whatever the number of ranks.
    """
    grams = {name: _partial_gram(rows.pop(name)) for name in list(rows)}
    for dtype in dict.fromkeys(gram.dtype for gram in grams.values()):  # in one order on all ranks, as no set has
        names = [name for name, gram in grams.items() if gram.dtype == dtype]
        total = torch.stack([grams[name] for name in names])
        dist.all_reduce(total)
        grams |= dict(zip(names, total, strict=True))
    return grams


def _partial_gram(rows: Tensor) -> Tensor:
    """What this rank's slice of one parameter contributes."""
    ranks, n = world_size(), len(rows)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % ranks))
    mine = rows.view(n, ranks, -1).transpose(0, 1).contiguous()
    slices = torch.empty_like(mine)
    dist.all_to_all_single(slices, mine)
    slices = slices.view(ranks * n, -1)
    return slices @ slices.T
