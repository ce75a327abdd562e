"""A module and its loss as one function of parameters and a unit: what every engine differentiates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call

from lightning_gradconf.gram.process_state import random_states

LossFn = Callable[[Any, Any], Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Objective:
    """The loss of one unit, ready to be evaluated at copies of the module's tensors.

    Attributes:
        module: The user's module.
        loss_fn: The scalar loss of a batch.
        parameters: The parameters that gradients are taken for, by name.
        constants: The module's other parameters and its buffers, by name.
    """

    module: nn.Module
    loss_fn: LossFn
    parameters: dict[str, nn.Parameter]
    constants: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Where the first of the parameters is."""
        return next(iter(self.parameters.values())).device

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the module's tensors for `at`, of which the parameters are leaves that require grad."""
        copies = {name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()}
        copies |= {name: t.detach().clone() for name, t in self.constants.items()}
        for name, original in (*self.parameters.items(), *self.constants.items()):
            take_attributes(copies[name], original)
        return copies

    def fill_caches(self, tensors: dict[str, Tensor], unit: Any) -> None:
        """Compute the loss of a unit in the ordinary way, before units are computed together.

        What user code caches outside of the module, such as a mask by its size, is an ordinary tensor then. One that is
        made inside vmap would be of no use to the training afterwards, which finds it in the cache.
        """
        drawn = random_states()
        constants = {name: tensor.detach().clone() for name, tensor in self.constants.items()}
        self.at({**tensors, **constants}, unit, lambda loss: None)
        for restore, state in drawn:
            restore(state)

    def at(self, tensors: dict[str, Tensor], unit: Any, then: Callable[[Tensor], Result]) -> Result:
        """Return ``then(loss of the unit)`` with ``tensors`` in place of the module's own.

        What needs the graph of the loss happens in ``then``: activation checkpoints run the module again in the
        backward pass, and must find the same tensors in it.
        """

        def run(module: nn.Module) -> Result:
            return then(checked(self.loss_fn(module, unit)))

        swapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(_Caller(self.module), swapped, (run,))  # type: ignore[no-any-return]


class _Caller(nn.Module):
    """Gives `functional_call` a forward for any function of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Result]) -> Result:
        return function(self.module)


def objective(module: nn.Module, loss_fn: LossFn, parameters: str | Sequence[str] | None = None) -> Objective:
    """Return the objective of ``module`` for the parameters that require grad and match a glob pattern.

    Raises:
        ValueError: No parameter requires grad, no name matches, or a parameter is not initialised yet.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"no parameter of {type(module).__name__} requires grad, so there is no gradient to compare; "
            "unfreeze some with `requires_grad_()`"
        )
    if lazy := [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]:
        raise ValueError(f"parameter {lazy[0]!r} is not initialised yet; run one batch through the module first")
    tracked = {name: p for name, p in matching(module, parameters).items() if p.requires_grad}
    if not tracked:
        raise ValueError(
            f"parameters={parameters!r} matches none of the {len(trainable)} parameters that require grad; "
            f"their names are like {', '.join(map(repr, list(trainable)[:5]))}"
        )
    others = {name: p for name, p in module.named_parameters() if name not in tracked}
    return Objective(module, loss_fn, tracked, others | dict(module.named_buffers()))


def matching(module: nn.Module, parameters: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters of ``module`` whose names match a glob pattern, frozen ones too; None matches all."""
    patterns = ["*"] if parameters is None else [parameters] if isinstance(parameters, str) else list(parameters)
    return {name: p for name, p in module.named_parameters() if any(fnmatchcase(name, glob) for glob in patterns)}


def take_attributes(copy: Tensor, original: Tensor) -> None:
    """Let a copy of a parameter have its attributes and pass for one: a loss may ask for its kind, or for a mask."""
    vars(copy).update(vars(original))
    if isinstance(original, nn.Parameter):
        vars(copy)["_is_param"] = True  # what isinstance() asks for
    if type(original) not in (Tensor, nn.Parameter) and type(copy) is Tensor:
        copy.__class__ = type(original)


def as_rows(gradients: Tensor, n: int) -> Tensor:
    """Return gradients ``(n, *shape)`` as dense real rows in the precision that inner products are accumulated in."""
    gradients = gradients.to_dense() if gradients.is_sparse else gradients
    gradients = torch.view_as_real(gradients) if gradients.is_complex() else gradients
    return gradients.reshape(n, -1).to(accumulation_dtype(gradients))


def empty_rows(parameter: Tensor, n: int) -> Tensor:
    """Return room for what `as_rows` makes of ``n`` gradients of a parameter."""
    return as_rows(torch.zeros(n, *parameter.shape, dtype=parameter.dtype, device=parameter.device), n)


def sizes(parameters: Iterable[Tensor]) -> list[int]:
    """Return the bytes that `as_rows` makes of the gradient of each parameter."""
    return [p.numel() * (2 if p.is_complex() else 1) * accumulation_dtype(p).itemsize for p in parameters]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Float64 for double tensors, float32 for everything narrower."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in the precision that inner products are accumulated in."""
    return x.to(accumulation_dtype(x))


def run_backward(
    output: Tensor, targets: Sequence[Tensor | GradientEdge], *, keep_graph: bool, seed: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``targets``, or without any, put all gradients into the ``grad`` of their leaves.

    `torch.autograd.grad` and `backward` suspend MeasurementMode, and a checkpoint calls layers in the backward pass.
    """
    gradients: tuple[Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
        (output,),
        (torch.ones_like(output) if seed is None else seed,),
        keep_graph,
        False,
        tuple(targets),
        allow_unreachable=True,
        accumulate_grad=not targets,
    )
    return gradients


def checked(loss: Any) -> Tensor:
    """Return the loss of a unit without dimensions.

    Raises:
        ValueError: It is not one floating-point number, or depends on no parameter.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"the loss of a unit must be one floating-point number, found {found}; return its mean")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any parameter; is it detached, or computed under no_grad?")
    return loss.reshape(()) if loss.dim() else loss
