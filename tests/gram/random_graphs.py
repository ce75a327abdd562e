"""Random small models: operations in random layouts over a pool of shared parameters, measured four times.

A `Recipe` is data, so that it can be drawn, printed and shortened. Activations are of samples, steps and features.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from gram.oracle import error, expected, measure
from gram.zoo.registry import Case, labels, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYOUTS = ("bsf", "sbf", "fbs", "bfs", "sfb", "fsb")  # samples (batch), steps, features
LONGEST = 7


@dataclass(frozen=True)
class Recipe:
    """A model with its data.

    Attributes:
        steps: What is done, as ``(operation, layout, which parameters, contiguous)``.
        loss: A key of `LOSSES`.
        features: Features of every activation.
        lengths: Steps of the sequences at each measurement.
        unit_size: Samples in a unit.
        seed: Of weights and data.
    """

    steps: tuple[tuple[str, str, int, bool], ...]
    loss: str
    features: int
    lengths: tuple[int, ...]
    unit_size: int
    seed: int


class Network(nn.Module):
    """The pool of parameters, and the operations of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        f = recipe.features
        self.recipe = recipe
        self.matrices = nn.ParameterList(torch.randn(f, f) / f**0.5 for _ in range(2))
        self.vectors = nn.ParameterList(torch.randn(f) for _ in range(2))
        self.over_steps = nn.ParameterList(torch.randn(LONGEST, LONGEST) / LONGEST for _ in range(2))
        self.kernels = nn.ParameterList(torch.randn(f, f, 3) / f for _ in range(2))
        self.tables = nn.ParameterList(torch.randn(LONGEST, f) for _ in range(2))
        self.scalars = nn.ParameterList(torch.randn(()) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(f, f) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(f) for _ in range(2))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(f) for _ in range(2))
        self.recurrent = nn.GRU(f, f)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation after the last step, samples first and features last."""
        past = x = self.layers[0](x)
        for name, layout, which, contiguous in self.recipe.steps:
            operate, last = OPERATIONS[name]
            own = layout if layout[-1] == last or last is None else layout.replace(last, "") + last
            h = arranged(x, "bsf", own)
            result = operate(self, h.contiguous() if contiguous else h, which, own, arranged(past, "bsf", own))
            past, x = x, arranged(result, own, "bsf")
        return x


def arranged(x: Tensor, order: str, wanted: str) -> Tensor:
    """Return a view with its dimensions in another order."""
    return x.permute([order.index(dim) for dim in wanted])


def along(layout: str, dim: str) -> int:
    """Return the position of a dimension."""
    return layout.index(dim)


def attended(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Let steps attend to one another, with one head."""
    x = arranged(h, layout, "bsf")
    q = x @ self.matrices[which]
    return arranged(F.scaled_dot_product_attention(q, x, x, is_causal=bool(which)), "bsf", layout)


def convolved(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Convolve over steps."""
    out = F.conv1d(arranged(h, layout, "bfs"), self.kernels[which], self.vectors[which], padding=1)
    return arranged(out, "bfs", layout)


def looked_up(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Add rows of a table that the data choose."""
    index = arranged(h, layout, "bsf").detach().argmax(-1)
    return h + arranged(F.embedding(index, self.tables[which]), "bsf", layout)


def placed(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Add a row of a table for each step."""
    rows = self.tables[which][torch.arange(h.shape[along(layout, "s")])]
    return h + arranged(rows[None].expand(h.shape[along(layout, "b")], -1, -1), "bsf", layout)


def batch_normed(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Normalise each feature over samples and steps."""
    return arranged(self.batch_norms[which](arranged(h, layout, "bfs")), "bfs", layout)


def recurrent(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Go over the steps one by one."""
    return arranged(self.recurrent(arranged(h, layout, "sbf"))[0], "sbf", layout)


def over_steps(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Mix steps by a matrix."""
    s = h.shape[-1]
    return h @ self.over_steps[which][:s, :s]


def gathered(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Take features in the order of their size."""
    return h.gather(-1, h.detach().argsort(-1)) * self.vectors[which]


def written(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Write a part of the features into zeros."""
    out = torch.zeros(h.shape, dtype=h.dtype)
    out[..., 0] = h[..., -1]
    out[..., 1:] += h[..., :-1]
    return out + self.scalars[which] * h


def guarded(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Ask whether everything is finite, and go one way or the other by a sign of the data."""
    if not torch.isfinite(h).all():
        raise ValueError("not finite")
    return h * self.scalars[which] if which and h.sum() > 0 else h.tanh()


def joined(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Put another activation beside this one, and take both together."""
    both = torch.cat([h, past], -1)
    weight = torch.cat([self.matrices[which], self.matrices[1 - which].T], 1)
    return F.linear(both, weight)


def masked(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Take parameters where the data say so."""
    return torch.where(past.detach() > 0, h, self.vectors[which].expand_as(h))


def centred(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Subtract a mean over samples."""
    return h - 0.5 * h.mean(along(layout, "b"), keepdim=True)


def turned(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Sort samples by their first value."""
    dim = along(layout, "b")
    return h.index_select(dim, arranged(h, layout, "bsf")[:, 0, 0].argsort())


def low_rank(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Multiply by a product of parameters."""
    return F.linear(h, self.matrices[which] @ self.matrices[1 - which] + self.vectors[which].outer(self.vectors[0]))


def averaged(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Add the mean over steps to each."""
    return h + self.scalars[which] * h.mean(along(layout, "s"), keepdim=True)


def selected(self: Any, h: Tensor, which: int, layout: str, past: Tensor) -> Tensor:
    """Multiply by how many values are positive, as Python counts them."""
    return h / max(int((h.detach() > 0).any(along(layout, "f")).all()), 1) * self.scalars[which].exp()


Operation = Callable[[Any, Tensor, int, str, Tensor], Tensor]
# Each with the dimension that has to be last, if any.
OPERATIONS: dict[str, tuple[Operation, str | None]] = {
    "linear": (lambda self, h, i, *_: self.layers[i](h), "f"),
    "functional linear": (lambda self, h, i, *_: F.linear(h, self.layers[i].weight), "f"),
    "matmul": (lambda self, h, i, *_: h @ self.matrices[i], "f"),
    "transposed matmul": (lambda self, h, i, *_: h @ self.matrices[i].T, "f"),
    "einsum": (lambda self, h, i, *_: torch.einsum("xyf,fg->xyg", h, self.matrices[i]), "f"),
    "layer norm": (lambda self, h, i, *_: self.norms[i](h), "f"),
    "gain": (lambda self, h, i, *_: h * self.vectors[i], "f"),
    "bias": (lambda self, h, i, *_: h + self.vectors[i], "f"),
    "scalar": (lambda self, h, i, *_: h * self.scalars[i], None),
    "divide": (lambda self, h, i, *_: h / (1 + self.vectors[i].square()), "f"),
    "prelu": (lambda self, h, i, *_: torch.where(h > 0, h, h * self.scalars[i]), None),
    "low rank": (low_rank, "f"),
    "joined": (joined, "f"),
    "over steps": (over_steps, "s"),
    "convolved": (convolved, None),
    "attended": (attended, None),
    "looked up": (looked_up, None),
    "placed": (placed, None),
    "batch norm": (batch_normed, None),
    "recurrent": (recurrent, None),
    "gathered": (gathered, "f"),
    "written": (written, "f"),
    "guarded": (guarded, None),
    "selected": (selected, None),
    "masked": (masked, "f"),
    "centred": (centred, None),
    "turned": (turned, None),
    "averaged": (averaged, None),
    "tanh": (lambda self, h, *_: h.tanh(), None),
    "gelu": (lambda self, h, *_: F.gelu(h), None),
    "relu": (lambda self, h, *_: h.relu(), None),
    "softmax": (lambda self, h, *_: h.softmax(-1), None),
    "cumsum": (lambda self, h, i, layout, past: h.cumsum(along(layout, "s")) / LONGEST, None),
    "residual": (lambda self, h, i, layout, past: h + past, None),
    "gate": (lambda self, h, i, layout, past: h * past.sigmoid(), None),
    "detached": (lambda self, h, i, layout, past: h + past.detach(), None),
    "dropout": (lambda self, h, *_: F.dropout(h, 0.5), None),
    "checkpoint": (lambda self, h, i, *_: checkpoint(self.layers[i], h, use_reentrant=False), "f"),
    "in place": (lambda self, h, i, *_: h.clone().mul_(2).add_(self.vectors[i]), "f"),
}


def penalised(self: Any, out: Tensor, y: Tensor) -> Tensor:
    """A mean square with a penalty on the weights."""
    return out.square().mean() + 0.1 * sum(p.square().sum() for p in self.matrices)


def contrasted(self: Any, out: Tensor, y: Tensor) -> Tensor:
    """Compare the samples of a unit."""
    z = F.normalize(out.mean(1), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z))) + out.square().mean()


def weighted(self: Any, out: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with weights of classes."""
    weight = torch.arange(1, out.shape[-1] + 1, dtype=out.dtype)
    return F.cross_entropy(out.mean(1), y % out.shape[-1], weight, label_smoothing=0.1)


LOSSES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "mean square": lambda self, out, y: out.square().mean(),
    "sum": lambda self, out, y: out.sin().sum(),
    "cross entropy": lambda self, out, y: F.cross_entropy(out.mean(1), y % out.shape[-1]),
    "of each step": lambda self, out, y: F.cross_entropy(
        out.flatten(0, 1), (y[:, None].expand(-1, out.shape[1]) % out.shape[-1]).flatten()
    ),
    "weighted": weighted,
    "masked mean": lambda self, out, y: (out.square().mean((1, 2)) * (y > 0)).sum() / (y > 0).sum().clamp_min(1),
    "penalised": penalised,
    "contrasted": contrasted,
    "root": lambda self, out, y: (out.square().mean() + 0.1).sqrt(),
    "largest": lambda self, out, y: out.square().mean((1, 2)).max(),
}


def build(recipe: Recipe) -> Case:
    """Return the model of a recipe, its loss, and its batches."""
    torch.manual_seed(recipe.seed)
    network = Network(recipe).double()

    def loss(module: Any, batch: Any) -> Tensor:
        return LOSSES[recipe.loss](module, module(batch[0]), batch[1])

    batches = [(normal(length, recipe.features), labels(3)) for length in recipe.lengths]
    return Case(network, loss, batches)


def draw(rng: random.Random) -> Recipe:
    """Return a random recipe."""
    steps = tuple(
        (rng.choice([*OPERATIONS]), rng.choice(LAYOUTS), rng.randrange(2), rng.random() < 0.5)
        for _ in range(rng.randint(1, 8))
    )
    lengths = tuple(rng.choice((1, 2, 3, 5, 6, 7)) for _ in range(4))
    if rng.random() < 0.5:
        lengths = lengths[:1] * 4
    return Recipe(
        steps, rng.choice([*LOSSES]), rng.choice((2, 3, 4, 6)), lengths, rng.choice((1, 2, 3)), rng.randrange(1 << 30)
    )


def deviation(recipe: Recipe, engine: str = "auto") -> tuple[str | None, list[str]]:
    """Return what is wrong with an engine's measurements of a recipe, if anything, and which engines measured."""
    case, wrong, used = build(recipe), [], []

    def measured(measurement: int, batch: Any, want: Any) -> None:
        try:
            got, name = measure(case.module, case.loss_fn, batch, recipe.unit_size, engine)
        except Exception as refused:
            if engine == "auto":
                raise
            used.append(f"refused: {type(refused).__name__}: {str(refused).strip().splitlines()[0]:.90}")
            return
        used.append(name)
        if not (off := error(got, want)) < 1e-7:
            wrong.append(f"measurement {measurement} by {name} is wrong by {off:.1e}")

    expected(case, recipe.unit_size, measured)
    return wrong[0] if wrong else None, used


def shortened(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """Return a recipe that fails with as few steps as can be found by leaving out one after the other."""
    i = 0
    while i < len(recipe.steps):
        shorter = replace(recipe, steps=recipe.steps[:i] + recipe.steps[i + 1 :])
        if fails(shorter):
            recipe = shorter
        else:
            i += 1
    for loss in LOSSES:
        simpler = replace(recipe, loss=loss)
        if fails(simpler):
            return simpler
    return recipe
