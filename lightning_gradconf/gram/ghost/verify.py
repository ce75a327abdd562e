"""The proof that factors are the gradients of the units: an exact test with random weights.

For random r, PyTorch's own gradient of ``sum_i r_i loss_i`` must be ``sum_i r_i g_i``, with the g_i that the factors
stand for. Where the units lie elsewhere, or a rule is wrong, that holds with probability zero. Both sides share one
forward pass, so they differ by rounding alone. One unit is computed in plain autograd besides, which shares nothing
with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_gradconf.gram.ghost import graph as graphs
from lightning_gradconf.gram.ghost.factor_tensors import of_units
from lightning_gradconf.gram.ghost.factors import GradientFactors, materialize
from lightning_gradconf.gram.ghost.nodes import dtypes
from lightning_gradconf.gram.objective import as_rows

# Rounding errors by which a parameter's two sums may differ, in norms: of its own, and of the largest gradient.
_OWN, _LARGEST = 500, 20
# The same for types of half precision, which round each entry of a sum of their own.
_OWN_HALF, _LARGEST_HALF = 16, 1
# Rounding errors of inner products, relative to the squared sum of the norms of the units' gradients.
_CONTRACTED = 200
_SUMMED = 1 << 16  # entries whose squares may be added up one after the other: over 2^26, 1 % is lost
# The tolerance grows by _NOISE times the difference of two of PyTorch's own passes; the weights of the second pass are
# SCALE times those of the first. SCALE is no power of two: such a factor would leave all roundings as they are.
_NOISE = 8
SCALE = 1.37


@dataclass
class Proof:
    """What is compared in one measurement.

    Args:
        weights: The random r, ``(n,)``.
        wanted: PyTorch's gradients of the weighted losses, by the id of the leaf; each is dropped once it is compared.
        unit: A unit whose gradient is kept, to be compared with plain autograd.
        precision: The least precise type of any tensor in the graph.

    Attributes:
        row: The gradient of that unit, by parameter.
        leaves: The leaves of each parameter in the graph.
        unproved: Uses that had no gradient, or one that fits several places.
        errors: For each parameter the norm of the difference, and the larger norm of the two sides.
        sizes: For each parameter the norm of the weighted sum of gradients as the factors have it, the sum of the norms
            of its parts, of which little may be left, and the number of entries.
    """

    weights: Tensor
    wanted: dict[int, Tensor | None]
    unit: int
    precision: torch.dtype
    row: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    unproved: set[int] = field(default_factory=set)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    sizes: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    def compare(
        self, name: str, leaves: Sequence[Tensor], parts: Sequence[GradientFactors], source: GradientEdge | None
    ) -> None:
        """Compare the weighted sum of a parameter's gradients with PyTorch's own.

        Args:
            name: The parameter.
            leaves: Its leaves in the graph.
            parts: The factors of its gradients.
            source: The tensor that these are the gradients of, if its entries are those of the parameter rearranged.
        """
        leaf = leaves[0]
        weights = self.weights.to(as_rows(leaf[None], 1).dtype)
        first, *others = [part.weighted(weights) for part in parts]
        of_parts = sum(_norm(part) for part in (first, *others))
        got = sum(others, first)
        self.sizes[name] = _norm(got), of_parts, got.numel()
        row = materialize(*(of_units(part, torch.tensor([self.unit])) for part in parts))[0]
        if source is not None:
            got, row = (_pulled(gradient, source, leaf) for gradient in (got, row))
        known = [self.wanted.pop(id(tensor)) for tensor in leaves]
        wanted = [as_rows(gradient, 1)[0] for gradient in known if gradient is not None]
        self.row[name] = row
        self.leaves[name] = leaves
        want = sum(wanted[1:], wanted[0]) if wanted else torch.zeros_like(got)
        size = max(float(got.norm()), float(want.norm()))
        got -= want  # in place, as fresh memory costs more than the arithmetic
        self.errors[name] = float(got.norm()), size

    def compare_gram(self, name: str, gram: Tensor) -> None:
        """Compare the Gram of a parameter with the factors that it was contracted from: r^T K r is |sum_i r_i g_i|^2.

        Raises:
            ArithmeticError: It is not, so the contraction is wrong; or it multiplied large numbers that cancel each
                other in the gradients, and little but their rounding errors is left.
        """
        weights, norms = self.weights.to(gram.dtype), gram.diagonal().clamp_min(0).sqrt()
        size, of_parts, numel = self.sizes[name]
        error = abs(float(weights @ gram @ weights) - size**2)
        kind, of_units = torch.finfo(gram.dtype), max(float(weights @ norms), size)
        allowed = _CONTRACTED * kind.eps * of_units * max(of_units, of_parts)
        allowed += kind.tiny * numel * float(weights.sum()) ** 2  # squares of less than `tiny` are zeros
        if error > allowed:
            raise ArithmeticError(f"the inner products of {name!r} are not those of its gradients, or lost in rounding")

    def failures(self, again: Sequence[Mapping[int, Tensor | None]] = ()) -> dict[str, float]:
        """Return the parameters that failed, each with its relative error.

        Args:
            again: PyTorch's own gradients of the weighted losses, for the weights r and for `SCALE` times r. Apart from
                this factor they differ by rounding alone, so their difference is the noise of each gradient. A layer
                before a BatchNorm may have a gradient that is nothing but noise.
        """
        half = self.precision in (torch.bfloat16, torch.float16)
        own, of_largest = (_OWN_HALF, _LARGEST_HALF) if half else (_OWN, _LARGEST)
        epsilon = torch.finfo(self.precision).eps
        largest = max((size for _, size in self.errors.values() if size < float("inf")), default=0.0)
        failed = {}
        for name, (error, size) in self.errors.items():
            allowed = epsilon * (own * size + of_largest * largest)
            if error > allowed and again:
                allowed += _NOISE * self._noise(name, *again)
            if error > allowed:
                failed[name] = error / max(size, 1e-300)
        return failed

    def _noise(self, name: str, wanted: Mapping[int, Tensor | None], scaled: Mapping[int, Tensor | None]) -> float:
        pairs = [(scaled[id(leaf)], wanted[id(leaf)]) for leaf in self.leaves[name]]
        differences = [a / SCALE - b for a, b in pairs if a is not None and b is not None]
        return float(sum(float(difference.to_dense().norm()) for difference in differences))


def random_weights(like: Tensor, seed: int) -> Tensor:
    """Return weights between 0.5 and 1.5, no two of them close, in the type of ``like (n,)``."""
    n, generator = len(like), torch.Generator().manual_seed(seed)
    steps = torch.randperm(n, generator=generator) + 0.5 * torch.rand(n, generator=generator)
    return (0.5 + steps / n).to(like)


def _norm(x: Tensor) -> float:
    return float(torch.stack([part.norm() for part in x.split(_SUMMED)]).norm())


def _pulled(gradient: Tensor, source: GradientEdge, leaf: Tensor) -> Tensor:
    kind = dtypes(source.node)[source.output_nr]
    numbers = torch.view_as_complex(gradient.view(-1, 2)) if kind.is_complex else gradient
    seed = numbers.view(graphs.shape(source)).to(kind)
    (found,) = torch.autograd.grad([source], [leaf], [seed], retain_graph=True)
    return as_rows(found[None], 1)[0]
