"""How a case of the zoo is written: a function that returns a module, its loss and four batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 6  # units of 1, 2 and 3 samples can be made of them
MEASUREMENTS = 4
_SCALES = (1.0, 1.0, 0.3, 3.0)


def nothing(module: nn.Module, measurement: int) -> None:
    """Change nothing between measurements."""


class Case(NamedTuple):
    """A module with its loss, the batches of four measurements, and what changes between them.

    Attributes:
        module: The module, the same in all measurements.
        loss_fn: ``loss_fn(module, batch)``.
        batches: One for each measurement.
        before: Called with the module and the number of the measurement before it.
    """

    module: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batches: list[Any]
    before: Callable[[Any, int], None] = nothing


Function = Callable[[], tuple[Any, ...]]
ZOO: dict[str, Callable[[], Case]] = {}
SINGLE: set[str] = set()  # cases in float32, as an operation exists or behaves otherwise there


def case(function: Function) -> Function:
    """Add a function to the zoo, under its name and in float64."""

    def made() -> Case:
        torch.manual_seed(0)
        found = Case(*function())
        if not any(p.is_complex() for p in found.module.parameters()):  # these have no double()
            found.module.double()
        return found

    assert function.__name__ not in ZOO, f"there are two cases {function.__name__}"
    ZOO[function.__name__] = made
    return function


def single(function: Function) -> Function:
    """Add a function to the zoo, under its name and in float32."""

    def made() -> Case:
        torch.manual_seed(0)
        found = Case(*function())
        return found._replace(module=found.module.float(), batches=[cast(b, torch.float32) for b in found.batches])

    assert function.__name__ not in ZOO, f"there are two cases {function.__name__}"
    ZOO[function.__name__] = made
    SINGLE.add(function.__name__)
    return function


def first(name: str) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Any]:
    """Return a case's module, its loss and the batch of its first measurement."""
    found = ZOO[name]()
    return found.module, found.loss_fn, found.batches[0]


class Model(nn.Module):
    """A module whose forward is the function it is given, with the submodules and parameters it is given."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(self, *args)


def two_layers(inner: nn.Module | None = None, out: int = 3) -> nn.Sequential:
    """Return a network of two linear layers from 4 to 3 features, with ``inner`` between them."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh() if inner is None else inner, nn.Linear(5, out))


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross entropy of ``(inputs, classes)``."""
    x, y = batch
    return F.cross_entropy(module(x), y)


def mean_square(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean square of what the module makes of the batch."""
    return module(batch).square().mean()


def normal(*shape: int) -> Tensor:
    """Return random samples of a shape, in float64."""
    return torch.randn(SAMPLES, *shape, dtype=torch.float64)


def labels(classes: int = 3) -> Tensor:
    """Return random classes."""
    return torch.randint(classes, (SAMPLES,))


def words(length: int = 5, vocabulary: int = 7) -> Tensor:
    """Return random tokens."""
    return torch.randint(vocabulary, (SAMPLES, length))


def until(lengths: list[int], longest: int = 5) -> Tensor:
    """Return the mask ``(samples, longest)`` of sequences of these lengths."""
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def four(make: Callable[[], Any]) -> list[Any]:
    """Return four batches."""
    return [make() for _ in range(MEASUREMENTS)]


def inputs(*shape: int) -> list[Tensor]:
    """Return four batches of inputs, of different scales."""
    return [scale * normal(*shape) for scale in _SCALES]


def pairs(*shape: int, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return four batches of inputs and classes, of different scales."""
    return [(scale * normal(*shape), labels(classes)) for scale in _SCALES]


def texts(length: int = 5, vocabulary: int = 7, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return four batches of tokens and classes."""
    return four(lambda: (words(length, vocabulary), labels(classes)))


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Return a batch with its floating-point tensors in another type."""
    return _mapped(batch, lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t)


def unit_of(batch: Any, samples: slice) -> Any:
    """Return some samples of a batch, for the oracle: this knows the few shapes that batches of the zoo have."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[samples].clone() if leaf.dim() else leaf
        return leaf[samples] if isinstance(leaf, list) else leaf

    return _mapped(batch, of_leaf)


def _mapped(batch: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(batch, list) and not any(isinstance(part, Tensor) for part in batch):
        return function(batch)
    if isinstance(batch, tuple | list):
        return type(batch)(_mapped(part, function) for part in batch)
    if isinstance(batch, dict):
        return {key: _mapped(part, function) for key, part in batch.items()}
    if dataclasses.is_dataclass(batch):
        return dataclasses.replace(batch, **{k: _mapped(v, function) for k, v in vars(batch).items()})  # type: ignore[type-var]
    return function(batch)
