"""Random numbers of Python and NumPy, which torch.func draws once for all units."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from lightning_gradconf.gram.module_state import reachable


@contextmanager
def without_python_draws(generators: Sequence[Any]) -> Iterator[None]:
    """Check that a loss of several units draws nothing from Python or NumPy: all units would get the same numbers.

    Args:
        generators: Those of the module's own, as of `generators_of`, beside the global ones.

    Raises:
        NotImplementedError: It does.
    """
    before = [states_of_python(), *map(_state, generators)]
    yield
    if before != [states_of_python(), *map(_state, generators)]:
        raise NotImplementedError("the loss draws random numbers from Python or NumPy, of which all units get the same")


def states_of_python() -> list[Any]:
    """Return the states of the global random generators of Python and NumPy, to be compared."""
    of_numpy: Any = np.random.get_state()
    kind, keys, *position = of_numpy
    return [random.getstate(), kind, keys.tobytes(), *position]


def generators_of(module: nn.Module) -> list[Any]:
    """Return the random generators of Python and NumPy that Python state of ``module`` leads to."""
    kinds = random.Random | np.random.Generator | np.random.RandomState
    return [value for value in reachable(module) if isinstance(value, kinds)]


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return pickle.dumps(generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state())
