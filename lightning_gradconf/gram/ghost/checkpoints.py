"""Activation checkpoints in a vmapped forward pass: run as if they were none.

A checkpoint would compute its activations again in the backward pass, after vmap has ended. Those with reentry are
custom Functions, which `custom_functions` has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint as checkpoints

# What runs around a checkpoint without reentry, by the name that a release of torch has for it.
_GENERATORS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Within this context, checkpoints without reentry only call their function, in this thread."""
    thread = threading.get_ident()
    generators = {name: vars(checkpoints)[name] for name in _GENERATORS if name in vars(checkpoints)}

    def nothing_around(generator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return iter([None]) if threading.get_ident() == thread else generator(*args, **kwargs)

    vars(checkpoints).update({name: partial(nothing_around, generator) for name, generator in generators.items()})
    try:
        yield
    finally:
        vars(checkpoints).update(generators)
