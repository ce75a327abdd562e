"""State of the whole process: its random generators, which warnings are shown, and which ways PyTorch takes."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What reads a setting, what writes it, and some of its values.
_Setting = tuple[Callable[[], Any], Callable[[Any], Any], tuple[Any, ...]]


@contextmanager
def without_warnings(beginning: str = "") -> Iterator[None]:
    """Ignore warnings that begin so, as if they had never come.

    `warnings.catch_warnings` makes Python forget what it has shown already: the warnings of the training would be
    shown once more after each measurement. An entry in the list of filters has no such effect.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    saved = list(filters)
    filters.insert(0, ("ignore", re.compile(beginning) if beginning else None, Warning, None, 0))
    try:
        yield
    finally:
        filters[:] = saved


def random_states() -> list[tuple[Callable[[Any], Any], Any]]:
    """Return the state of every global random generator, each with the function that sets it."""
    return [(random.setstate, random.getstate()), (np.random.set_state, np.random.get_state()), *_of_torch()]


def torch_states() -> list[Tensor]:
    """Return the states of the random generators of PyTorch, to be compared."""
    return [part for _, state in _of_torch() for part in (state if isinstance(state, list) else [state])]


def have_drawn(before: list[Tensor]) -> bool:
    """Return whether the random generators of PyTorch have other states than they had before, as of `torch_states`."""
    return not all(map(torch.equal, before, torch_states()))


def _of_torch() -> list[tuple[Callable[[Any], Any], Any]]:
    states: list[tuple[Callable[[Any], Any], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    for backend in (torch.cuda, getattr(torch, "xpu", None)):
        if backend is not None and backend.is_available() and backend.is_initialized():
            states.append((backend.set_rng_state_all, backend.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return states


def rounds_float32(device: torch.device) -> bool:
    """Return whether PyTorch may round float32 to TF32 or bfloat16 in matrix products or convolutions on a device.

    GPUs do so in convolutions unless they are told otherwise.
    """
    return any(read() not in exact for read, _, exact in _roundings(device))


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within this context, float32 is not rounded on a device, whatever the user allows."""
    settings = _roundings(device)
    values = [read() for read, _, _ in settings]
    try:
        for read, write, exact in settings:
            if read() not in exact:
                write(exact[0])
        yield
    finally:
        for (read, write, _), value in zip(settings, values, strict=True):
            if read() != value:  # what follows another setting is not written to, and goes on to follow
                write(value)


def _roundings(device: torch.device) -> list[_Setting]:
    """Return what reads and writes each setting that allows rounding on a device, and its values that do not.

    To write to a setting may change those after it.
    """
    backends: Any = torch.backends
    products = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",)
    old: list[_Setting] = [products]
    if device.type == "cuda":
        old.append(_setting(backends.cudnn, "allow_tf32", (False,)))
    if not hasattr(backends, "fp32_precision"):  # before torch 2.9
        return old
    cpu = backends.mkldnn
    if device.type != "cuda":
        return [_setting(part) for part in (backends, cpu.matmul, cpu.conv, cpu.rnn)]
    # Where the old settings differ from the new, to read them is an error, as it is in `torch.backends.cudnn.flags`.
    parts = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, cpu.matmul
    return [*filter(_is_readable, old), *map(_setting, parts)]


def _setting(part: Any, name: str = "fp32_precision", exact: tuple[Any, ...] = ("ieee", "none")) -> _Setting:
    return partial(getattr, part, name), partial(setattr, part, name), exact


def _is_readable(setting: _Setting) -> bool:
    """Return whether a setting can be read, as it cannot where the user has written to others for the same thing."""
    try:
        setting[0]()
    except RuntimeError:
        return False
    return True


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let encoders in evaluation mode compute as in training: PyTorch's fast path for them has no rule for vmap."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
