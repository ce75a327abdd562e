"""Random numbers of torch: what one of n units draws among the others is recorded, and drawn again for it alone.

So the gradient of a loss with noise can be compared with that of plain autograd too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradconf.gram.process_state import have_drawn, torch_states


class _Watching(TorchDispatchMode):
    """Calls `drawn` with the result of every operation that has drawn from a global generator.

    The tag of an operation only says that it may draw: attention does not if its dropout is 0. So the states of the
    generators before and after the call are compared.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise it would be imported, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``func``."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        before = torch_states()
        result = func(*args, **kwargs)
        if have_drawn(before):
            self.drawn(result, before)
        return result

    def drawn(self, result: Any, before: list[Tensor]) -> None:
        """Take what an operation drew, and the state before it."""
        raise NotImplementedError


class Recorder(_Watching):
    """Within this context, keep what one of n units draws while torch.func computes all of them.

    Args:
        unit: Which one.
        n: How many there are.
    """

    def __init__(self, unit: int, n: int) -> None:
        super().__init__()
        self._numbers: list[Tensor | None] = []
        self._unit, self._n = unit, n
        self._state = torch_states()
        self._is_seeded = False

    def drawn(self, result: Any, before: list[Tensor]) -> None:
        """Keep the unit's part of ``result``, ``(n, ...)``, and note whether somebody has set the state before."""
        self._is_seeded |= not all(map(torch.equal, before, self._state))
        self._state = torch_states()
        has_units = isinstance(result, Tensor) and result.dim() > 0 and len(result) == self._n
        self._numbers.append(result[self._unit].clone() if has_units else None)

    def checked(self) -> list[Tensor | None]:
        """Return what the unit drew, in order; None where units do not lie on the first dimension.

        Raises:
            NotImplementedError: The loss sets a seed, after which each unit alone draws the same numbers.
        """
        if self._is_seeded:
            raise NotImplementedError("the loss sets the seed of its random numbers, so all units draw the same")
        return self._numbers


class Replayer(_Watching):
    """Within this context, operations draw the recorded numbers.

    Args:
        numbers: Of `Recorder`.
    """

    def __init__(self, numbers: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._numbers, self._next, self._fits = numbers, 0, True

    def drawn(self, result: Any, before: list[Tensor]) -> None:
        """Put the next of the recorded numbers in the place of ``result``."""
        number = self._numbers[self._next] if self._next < len(self._numbers) else None
        self._next += 1
        if number is None or not isinstance(result, Tensor) or number.shape != result.shape:
            self._fits = False
        else:
            result.copy_(number)

    @property
    def has_fitted(self) -> bool:
        """Whether all that was recorded was drawn, and no more."""
        return self._fits and self._next == len(self._numbers)
