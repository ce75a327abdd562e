"""How much memory gradients may take: what the user allows, or a share of what is free."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import Objective

UNBOUNDED = 1 << 62  # bytes, where nothing is known of the memory
_SIZES = {"": 1, "b": 1}
_SIZES |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}
_SIZES |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", 1)}
# Of the free memory, since what a pass needs beside the gradients is not known beforehand.
_SHARE = 0.5
_LATELY = 10  # seconds for which free memory is not asked again: it takes as long as a small network
# What is kept for a backward pass may take this part of a budget; torch.func keeps about twice as much.
_PART_OF_PASSES = 1 / 4
# Files under /sys/fs/cgroup with the limit of a container and with what it uses, of the two versions of control groups.
_CONTAINER = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def bytes_of(memory_budget: int | str) -> int:
    """Return a memory budget in bytes.

    Raises:
        ValueError: It is no positive number of bytes and no size with a unit.

    >>> bytes_of("500MB"), bytes_of("1.5 GiB")
    (500000000, 1610612736)
    """
    if isinstance(memory_budget, str):
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[kmgt]i?)?b|)\s*", memory_budget.lower())
        number = int(float(parts[1]) * _SIZES[parts[2]]) if parts else 0
    else:
        number = memory_budget if isinstance(memory_budget, int) and not isinstance(memory_budget, bool) else 0
    if number < 1:
        raise ValueError(
            f"memory_budget={memory_budget!r} is no amount of memory; give bytes as an integer, or a text like '2GB', "
            "'500MB' or '1.5GiB'"
        )
    return number


def megabytes(size: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"


def bytes_for_gradients(memory_budget: int | str | None, smallest: int, device: torch.device, ranks: int = 1) -> int:
    """Return the bytes that gradients may take on a device: the budget, or without one a share of what is free.

    Args:
        memory_budget: What `bytes_of` takes; or None.
        smallest: To be tried without a budget, however little is free.
        device: Where the gradients are.
        ranks: How many processes share the memory of a machine. Each has a GPU of its own.
    """
    if memory_budget is not None:
        return bytes_of(memory_budget)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for reuse
        free: int | None = torch.cuda.mem_get_info(device)[0] + kept
    else:
        free = _free_lately(int(time.monotonic() / _LATELY))
    if free is None:
        return UNBOUNDED
    share = int(_SHARE * free / (1 if device.type == "cuda" else ranks))
    # In coarse steps, so that measurements of one run have one plan.
    step = 1 << max(0, share.bit_length() - 2)
    return max(smallest, share // step * step)


def units_at_once(
    target: Objective, units: Sequence[Any], unit_size: int | None, train_batch_size: int | None, budget: int
) -> int:
    """Return how many units may go through one forward and backward pass.

    All units, if together they have no more samples than an ordinary pass, ``train_batch_size``. Otherwise as many as
    an ordinary pass has, or more if their activations fit a small part of the budget. A forward pass of one unit tells
    their size.
    """
    n = len(units)
    if unit_size is None or train_batch_size is None or n * unit_size <= train_batch_size:
        return n
    fitting = int(_PART_OF_PASSES * budget) // max(1, _kept(target, units[0]))
    return min(n, max(1, train_batch_size // unit_size, fitting))


def _kept(target: Objective, unit: Any) -> int:
    """Return the bytes that a forward pass of the unit keeps for its backward pass, without parameters and buffers."""
    state = target.copies()
    own = {tensor.data_ptr() for tensor in state.values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        detached = tensor.detach()  # a node that held its own result would never be released
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = detached
        return detached  # for a loss that runs a backward pass itself

    with untouched(target.module), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        target.at(state, copy_of(unit), lambda loss: None)
    return sum(tensor.nbytes for tensor in kept.values())


@lru_cache(maxsize=1)
def _free_lately(period: int) -> int | None:
    """Return the free memory as it was when it was first asked for in this period."""
    return _free_of_machine()


def _free_of_machine() -> int | None:
    """Free memory in bytes: of the container, if it has a limit, and else of the machine."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(found[1]) * 1024 if found else None
    else:
        try:  # not what is free, but a bound on it
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            free = None
    for limit, used in _CONTAINER:
        try:
            left = int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = left if free is None else min(free, left)
    return free
