"""Every differentiable operation and layer of PyTorch, with the arguments of its own tests: ghost against the loop.

    python benchmarks/operators.py [--names roll nn.LSTM] [--arguments 3] [--engine ghost]

Needs the package expecttest, which the tables of PyTorch's tests import. A sample goes through a scale and a shift that
are parameters, then through the operation or layer, in both modes; or it goes into an operation beside an argument that
is a parameter. Each model is measured three times with changing data, in units of one and of two samples, and must have
the Gram of the loop or be refused.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_gradconf import gradient_gram

SAMPLES, UNIT_SIZES, MEASUREMENTS = 6, (1, 2), 3
MOST_ELEMENTS = 5000
WRONG = 1e-6  # of the product of two norms, in float64


class Applied(nn.Module):
    """The sum of what an operation makes of each sample.

    Args:
        operation: A function or a layer that takes an input and more arguments.
        args: The other arguments.
        kwargs: Those by name.
        shape: Of a sample.
        learned: The argument that is a parameter; None for a scale and a shift of the input.
    """

    def __init__(self, operation: Any, args: Any, kwargs: Any, shape: torch.Size, learned: int | None) -> None:
        super().__init__()
        self.operation, self.args, self.kwargs, self.learned = operation, args, kwargs, learned
        if learned is None:
            self.scale = nn.Parameter(1 + 0.01 * torch.randn(shape))
            self.shift = nn.Parameter(0.01 * torch.randn(shape))
        else:
            self.weight = nn.Parameter(args[learned].detach().clone())

    def forward(self, batch: Tensor) -> Tensor:
        total = torch.zeros(())
        for x in batch:
            args = list(self.args)
            if self.learned is None:
                x = x * self.scale + self.shift
            else:
                args[self.learned] = self.weight
            for result in tree_leaves(self.operation(x, *args, **self.kwargs)):
                if isinstance(result, Tensor) and result.requires_grad:
                    real = torch.view_as_real(result) if result.is_complex() else result
                    total = total + (real * torch.linspace(0.5, 1.5, real.numel()).view(real.shape)).sum()
        return total


def of_operations(names: Sequence[str], arguments: int) -> Iterator[tuple[str, Applied, Tensor]]:
    """Yield models of operations, with some of the arguments of their tests, and an input of each."""
    from torch.testing._internal.common_methods_invocations import op_db

    for operator in op_db:
        has_gradient = operator.supports_autograd and torch.float64 in operator.supported_dtypes("cpu")
        if not has_gradient or not _is_wanted(operator.name, names):
            continue
        samples = [s for s in operator.sample_inputs("cpu", torch.float64, requires_grad=False) if _is_usable(s.input)]
        for sample in samples[:: max(1, len(samples) // arguments)][:arguments]:
            x, args, kwargs = (tree_map(_constant, part) for part in (sample.input, sample.args, sample.kwargs))
            for learned in (None, *(i for i, arg in enumerate(args) if _is_usable(arg))):
                yield operator.name, Applied(operator.op, args, kwargs, x.shape, learned), x


def of_layers(names: Sequence[str], arguments: int) -> Iterator[tuple[str, Applied, Tensor]]:
    """Yield models of layers and losses in both modes, with some of the arguments of their tests, and an input."""
    from torch.testing._internal.common_modules import module_db

    how = {"device": "cpu", "dtype": torch.float64, "requires_grad": False}
    for layer in module_db:
        for training in (True, False) if _is_wanted(layer.name, names) else ():
            for sample in layer.module_inputs_func(layer, training=training, **how)[: 2 * arguments]:
                given = sample.forward_input
                if given is not None and given.args and _is_usable(given.args[0]):
                    built = layer.module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)
                    x, *args = tree_map(_constant, given.args)
                    model = Applied(built.double().train(training), args, given.kwargs, x.shape, None)
                    yield layer.name, model, x


def _is_wanted(name: str, names: Sequence[str]) -> bool:
    return not names or name in names


def _is_usable(value: Any) -> bool:
    usual = isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided
    return usual and 0 < value.numel() <= MOST_ELEMENTS


def _constant(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def outcome(model: Applied, x: Tensor, unit_size: int, engine: str) -> str:
    """Return what came of three measurements of a model."""
    for _ in range(MEASUREMENTS):
        batch = torch.stack([x * (1 + 0.02 * torch.rand(x.shape)) for _ in range(SAMPLES)])
        of_units = partial(gradient_gram, model, Applied.forward, batch, unit_size=unit_size)
        try:
            want = of_units(engine="loop")
        except Exception:  # no derivative, or no such input
            return "not differentiable"
        total = sum(want.values(), torch.zeros(()))
        if not torch.isfinite(total).all():
            return "not finite"
        try:
            got = of_units(engine=engine)  # type: ignore[arg-type]
        except Exception as error:
            return f"refused: {(str(error).strip() or type(error).__name__).splitlines()[0]:.100}"
        norms = total.diagonal().clamp_min(1e-24).sqrt()
        off = max(float(((got[name] - want[name]).abs() / norms.outer(norms)).max()) for name in want)
        if off > WRONG:
            return f"WRONG: by {off:.1e}"
    return "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=[], help="of operations and layers; all by default")
    parser.add_argument("--arguments", type=int, default=3, help="sets of arguments for each operation")
    parser.add_argument("--engine", default="ghost")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning_gradconf").setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    for kind, models in (("operations", of_operations), ("layers", of_layers)):
        found, names = Counter[str](), set[str]()
        for name, model, x in models(options.names, options.arguments):
            try:
                differentiable = model(x[None]).requires_grad
            except Exception:  # a sample that only its own test has a use for
                continue
            for unit_size in UNIT_SIZES if differentiable else ():
                came = outcome(model, x, unit_size, options.engine)
                names.add(name)
                found[came.partition(":")[0]] += 1
                if came.startswith(("WRONG", "refused")):
                    of = "its input" if model.learned is None else f"argument {model.learned}"
                    print(f"{name} of {tuple(x.shape)}, {of}, units of {unit_size}: {came}", flush=True)
        print(f"{len(names)} {kind}, {found.total()} models: {dict(found)}", flush=True)


if __name__ == "__main__":
    main()
