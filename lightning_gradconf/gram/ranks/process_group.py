"""Collectives among the ranks that measure together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """The processes that measure together.

    Attributes:
        device: Of this one.
        group: What they talk through; None is a process by itself, which then talks to nobody.
    """

    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return 0 if self.group is None else self.group.rank()

    def minimum(self, value: int) -> int:
        """Return the least ``value`` of all ranks."""
        if self.group is None:
            return value
        least = torch.tensor(value, device=self.device)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return int(least)

    def gather(self, values: list[Result]) -> list[Result]:
        """Return the values of all ranks, in rank order."""
        if self.group is None:
            return values
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, values, group=self.group)
        return list(chain.from_iterable(found))

    def run_on_all_ranks(self, action: Callable[[], Result]) -> Result:
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
        if self.minimum(error is None):
            return result  # type: ignore[return-value]
        raise error or RuntimeError("another rank could not measure, and its own log says why")

    def add_up(self, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over ranks of what each of them has of the Gram of each parameter."""
        if self.group is None:
            return grams
        for dtype in dict.fromkeys(gram.dtype for gram in grams.values()):  # in one order on all ranks, as no set has
            names = [name for name, gram in grams.items() if gram.dtype == dtype]
            total = torch.stack([grams[name] for name in names])
            dist.all_reduce(total, group=self.group)
            grams |= dict(zip(names, total, strict=True))
        return grams

    def leave(self) -> None:
        """Give the group up."""
        if self.group is not None:
            dist.destroy_process_group(self.group)


def new_process_group(device: torch.device, timeout: timedelta | None = None) -> Ranks:
    """Create a process group of all ranks for measuring alone, so that its collectives never mix with the training's.

    Args:
        device: Of this process.
        timeout: How long a rank waits for the others; PyTorch's default if None.
    """
    return Ranks(device, dist.new_group(timeout=timeout, group_desc="gradient_confusion"))
