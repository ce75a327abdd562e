"""Every differentiable operation of PyTorch, with the arguments of its own tests: ghost against the loop.

    python benchmarks/operators.py [--operators roll gather] [--arguments 3] [--engine ghost]

Needs the package expecttest, which the tables of PyTorch's tests import. A sample goes through a scale and a shift that
are parameters, then through the operation; or it goes into the operation beside an argument that is a parameter. Each
model is measured three times with changing data, and must have the Gram of the loop or be refused.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_gradconf import gradient_gram

SAMPLES, MEASUREMENTS = 4, 3
MOST_ELEMENTS = 5000
WRONG = 1e-6  # of the product of two norms, in float64


class Applied(nn.Module):
    """The sum of what an operation makes of each sample.

    Args:
        operation: Takes an input and more arguments.
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


def models(operator: Any, arguments: int) -> Iterator[tuple[Applied, torch.Size, Tensor]]:
    """Yield models of an operator, with some of the arguments of its tests, and an input of each."""
    samples = [s for s in operator.sample_inputs("cpu", torch.float64, requires_grad=False) if _is_usable(s.input)]
    for sample in samples[:: max(1, len(samples) // arguments)][:arguments]:
        x, args, kwargs = (tree_map(_constant, part) for part in (sample.input, sample.args, sample.kwargs))
        for learned in (None, *(i for i, arg in enumerate(args) if _is_usable(arg))):
            yield Applied(operator.op, args, kwargs, x.shape, learned), x.shape, x


def _is_usable(value: Any) -> bool:
    usual = isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided
    return usual and 0 < value.numel() <= MOST_ELEMENTS


def _constant(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def outcome(model: Applied, x: Tensor, engine: str) -> str:
    """Return what came of three measurements of a model."""
    for _ in range(MEASUREMENTS):
        batch = torch.stack([x * (1 + 0.02 * torch.rand(x.shape)) for _ in range(SAMPLES)])
        want = gradient_gram(model, Applied.forward, batch, engine="loop")
        total = sum(want.values(), torch.zeros(()))
        if not torch.isfinite(total).all():
            return "not finite"
        try:
            got = gradient_gram(model, Applied.forward, batch, engine=engine)  # type: ignore[arg-type]
        except Exception as error:
            return f"refused: {(str(error).strip() or type(error).__name__).splitlines()[0]:.100}"
        norms = total.diagonal().clamp_min(1e-24).sqrt()
        off = max(float(((got[name] - want[name]).abs() / norms.outer(norms)).max()) for name in want)
        if off > WRONG:
            return f"WRONG by {off:.1e}"
    return "right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", help="by name; all by default")
    parser.add_argument("--arguments", type=int, default=3, help="sets of arguments for each operation")
    parser.add_argument("--engine", default="ghost")
    options = parser.parse_args()
    from torch.testing._internal.common_methods_invocations import op_db

    warnings.simplefilter("ignore")
    logging.getLogger("lightning_gradconf").setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float64)
    found: Counter[str] = Counter()
    operators = set()
    for operator in op_db:
        if options.operators and operator.name not in options.operators:
            continue
        if not operator.supports_autograd or torch.float64 not in operator.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        for model, shape, x in models(operator, options.arguments):
            try:
                if not model(x[None]).requires_grad:
                    continue
                came = outcome(model, x, options.engine)
            except Exception:  # a sample that its own test has a use for alone
                continue
            operators.add(operator.name)
            found[came.partition(":")[0].partition(" ")[0]] += 1
            if came not in ("right", "not finite"):
                of = "its input" if model.learned is None else f"argument {model.learned}"
                print(f"{operator.name} {operator.variant_test_name}, {tuple(shape)}, {of}: {came}", flush=True)
    print(f"{len(operators)} operations, {found.total()} models: {dict(found)}")


if __name__ == "__main__":
    main()
