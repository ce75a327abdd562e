"""Random numbers of Python and NumPy, which torch.func draws once for all units."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def refused() -> Iterator[None]:
    """Check that a loss of many units draws no random number that would have to be each unit's own.

    Raises:
        NotImplementedError: It does.
    """
    before = states_of_python()
    yield
    if before != states_of_python():
        raise NotImplementedError("the loss draws random numbers from Python or NumPy, of which all units get the same")


def states_of_python() -> list[Any]:
    """Return the states of the global random generators of Python and NumPy, to be compared."""
    states: list[Any] = [random.getstate()]
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *position = numpy.random.get_state()
        states += [kind, keys.tobytes(), *position]
    return states
