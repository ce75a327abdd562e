"""Layers that add noise in training by themselves, such as stochastic depth: without it while gradients are measured.

PyTorch's own dropout is a function with a probability (`dropout`). Stochastic depth is written anew by each
library. Such layers have in common that they hold no parameters, buffers or other modules, and draw random numbers in
training mode alone. They are found by that, and compute as in evaluation mode, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from lightning_gradconf.gram.metric_answers import METRICS
from lightning_gradconf.gram.process_state import random_states, torch_states
from lightning_gradconf.gram.python_draws import states_of_python
from lightning_gradconf.gram.restoring import restore_mapping

# Whether a layer adds noise in training mode alone.
_ADDS_NOISE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def without_noise(module: nn.Module) -> Iterator[None]:
    """Within this context, layers of ``module`` that add noise in training mode compute as in evaluation mode."""
    layers = [layer for layer in module.modules() if _may_add_noise(layer)]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _may_add_noise(layer: nn.Module) -> bool:
    # PyTorch's own layers call functions for their noise, and metrics are answered for.
    if type(layer).__module__.startswith("torch.") or isinstance(layer, METRICS):
        return False
    own = vars(layer)
    holds = own["_parameters"] or own["_buffers"] or own["_modules"] or "forward" in own
    return layer.training and not holds and _ADDS_NOISE.get(layer, True)


def _forward(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if layer.training and layer not in _ADDS_NOISE:
        in_training = _trial(layer, forward, args, kwargs)
        in_evaluation = _trial(layer.eval(), forward, args, kwargs)
        layer.train()
        _ADDS_NOISE[layer] = in_training.draws and not in_evaluation.draws and _is_alike(in_training, in_evaluation)
    if not layer.training or not _ADDS_NOISE[layer]:
        return forward(*args, **kwargs)
    layer.eval()
    try:
        return forward(*args, **kwargs)
    finally:
        layer.train()


class _Trial(NamedTuple):
    """What a call of a layer shows: whether it draws random numbers or fails, and its results."""

    draws: bool
    results: list[Any]
    structure: TreeSpec | None


def _is_alike(in_training: _Trial, in_evaluation: _Trial) -> bool:
    """Return whether evaluation gives the same kind of thing, and a gradient where training does.

    If not, as where a mask of what was hidden or a hard decision comes out, the layer does more than to add noise.
    """
    if in_training.structure != in_evaluation.structure:
        return False
    return all(
        (a.shape == b.shape and a.requires_grad <= b.requires_grad)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b)
        for a, b in zip(in_training.results, in_evaluation.results, strict=True)
    )


def _trial(layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> _Trial:
    """Call a layer in its mode on copies of what it gets, and put back what that changes."""
    drawn, attributes, before = random_states(), dict(vars(layer)), _states()
    args, kwargs = tree_map_only(Tensor, _copy, (args, kwargs))
    try:
        with torch.enable_grad():
            result = forward(*args, **kwargs)
        trial = _Trial(before != _states(), *tree_flatten(result))
    except Exception:
        trial = _Trial(True, [], None)
    for restore, state in drawn:
        restore(state)
    restore_mapping(vars(layer), attributes)
    return trial


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _states() -> list[Any]:
    """Return the states of the random generators that layers draw from, to be compared."""
    return [*states_of_python(), *(state.tolist() for state in torch_states())]
