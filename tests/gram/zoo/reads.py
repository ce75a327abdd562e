"""Values that Python reads: stored, printed, compared, counted, and asked by libraries."""

from __future__ import annotations

import functools
import io
import math
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from gram.zoo.registry import (
    Model,
    case,
    cross_entropy,
    four,
    inputs,
    mean_square,
    normal,
    pairs,
    two_layers,
    until,
)
from torch import Tensor, nn


@case
def data_dependent_branch() -> Any:
    """Python takes a branch by the value of a unit."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h.relu() if h.sum() > 0 else h.tanh()

    return Model(forward, layer=nn.Linear(4, 3)), cross_entropy, pairs(4)


@case
def item_in_the_loss() -> Any:
    """A number of the loss itself goes back into it, as a constant."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x).square().mean()
        return out / (1 + out.item())

    return nn.Linear(4, 3), loss, inputs(4)


@case
def counter_and_list_in_forward() -> Any:
    """A list on the module grows with each forward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls.append(self.layer(x).mean().item())
        return self.layer(x)

    return Model(forward, layer=nn.Linear(4, 3), calls=[]), mean_square, inputs(4)


def stored(keep: Any) -> Any:
    """Return a classifier whose loss hands itself and the outputs to ``keep(module, loss, outputs)``."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        found = F.cross_entropy(out, batch[1])
        keep(module, found, out)
        return found

    model = two_layers()
    model.kept = []
    return model, loss, pairs(4)


@case
def item_stored() -> Any:
    """``item()`` kept in a list and an attribute."""

    def keep(module: Any, loss: Tensor, out: Tensor) -> None:
        module.kept.append(loss.item())
        module.last = out.mean().item()

    return stored(keep)


@case
def item_in_a_deque() -> Any:
    """``item()`` in a deque, of which nothing is computed."""
    return stored(lambda module, loss, out: deque([0.0], maxlen=3).append(loss.item()))


@case
def item_in_a_text() -> Any:
    """A loss printed in every way."""

    def keep(module: Any, loss: Tensor, out: Tensor) -> None:
        module.text = f"{loss.item():.3f} {loss:.3f} {loss} {loss!r} " + str(loss.item())
        print(loss, out.mean().item(), file=io.StringIO())

    return stored(keep)


@case
def float_stored() -> Any:
    """``float(loss.detach())`` that is only kept."""
    return stored(lambda module, loss, out: module.kept.append(float(loss.detach())))


@case
def numpy_stored() -> Any:
    """``detach().cpu().numpy()`` of outputs and of the loss, only kept."""

    def keep(module: Any, loss: Tensor, out: Tensor) -> None:
        module.kept.append(loss.detach().cpu().numpy())
        module.kept.append(out.detach().cpu().numpy())

    return stored(keep)


@case
def list_stored() -> Any:
    """``tolist()`` that is only kept."""
    return stored(lambda module, loss, out: module.kept.extend(out.argmax(1).tolist()))


@case
def tensor_stored() -> Any:
    """A detached tensor kept until the end of an epoch."""
    return stored(lambda module, loss, out: module.kept.append((loss.detach(), out.detach().clone())))


@case
def running_mean_of_python() -> Any:
    """Python adds up losses, for nobody but itself."""

    def keep(module: Any, loss: Tensor, out: Tensor) -> None:
        module.total = 0.9 * getattr(module, "total", 0.0) + 0.1 * loss.item()

    return stored(keep)


@case
def accuracy_by_item() -> Any:
    """A number of hits divided by the number of samples."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        module.accuracy = (out.argmax(1) == batch[1]).sum().item() / len(batch[1])
        return F.cross_entropy(out, batch[1])

    return two_layers(), loss, pairs(4)


@case
def guard_against_nan() -> Any:
    """``if torch.isnan(loss): raise``."""

    def keep(module: Any, loss: Tensor, out: Tensor) -> None:
        if torch.isnan(loss) or not torch.isfinite(out).all():
            raise ValueError("the loss is not finite")

    return stored(keep)


@case
def guard_by_math() -> Any:
    """``math.isnan(loss.item())`` and comparison of ``loss.item()`` with a bound."""

    def keep(module: Any, loss: Tensor, out: Tensor) -> None:
        if not math.isfinite(loss.item()) or loss.item() > 1e6:
            raise ValueError("the loss is not finite")

    return stored(keep)


@case
def guard_by_assert() -> Any:
    """Assertions about outputs and classes."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        assert out.shape == (len(batch[0]), 3)
        assert not out.isinf().any() and (batch[1] >= 0).all(), "bad batch"
        assert batch[1].max() < 3 and out.dtype.is_floating_point and not out.is_sparse
        return F.cross_entropy(out, batch[1])

    return two_layers(), loss, pairs(4)


@case
def guard_that_returns_another_loss() -> Any:
    """A loss that is not finite is replaced by zero, which never happens."""

    def loss(module: Any, batch: Any) -> Tensor:
        found = cross_entropy(module, batch)
        return found if torch.isfinite(found) else torch.zeros_like(found)

    return two_layers(), loss, pairs(4)


@case
def normal_distribution() -> Any:
    """torch.distributions.Normal, which validates its arguments."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch)
        return -torch.distributions.Normal(out[:, :1], F.softplus(out[:, 1:2]) + 1e-3).log_prob(batch[:, :1]).mean()

    return two_layers(), loss, inputs(4)


@case
def categorical_distribution() -> Any:
    """torch.distributions.Categorical with an entropy."""

    def loss(module: Any, batch: Any) -> Tensor:
        policy = torch.distributions.Categorical(logits=module(batch[0]), validate_args=True)
        return -policy.log_prob(batch[1]).mean() - 0.01 * policy.entropy().mean()

    return two_layers(), loss, pairs(4)


@case
def bernoulli_distribution() -> Any:
    """torch.distributions.Bernoulli of probabilities, independent over features."""

    def loss(module: Any, batch: Any) -> Tensor:
        found = torch.distributions.Independent(torch.distributions.Bernoulli(probs=module(batch).sigmoid()), 1)
        return -found.log_prob((batch[:, :3] > 0).to(batch.dtype)).mean()

    return two_layers(), loss, inputs(4)


@case
def multivariate_normal_distribution() -> Any:
    """A distribution with a Cholesky factor, and a divergence of two distributions."""

    def loss(module: Any, batch: Any) -> Tensor:
        out, eye = module(batch), torch.eye(3, dtype=batch.dtype)
        found = torch.distributions.MultivariateNormal(out, scale_tril=eye * 2 + out[:, :1, None].tanh() * eye)
        prior = torch.distributions.MultivariateNormal(torch.zeros_like(out), eye)
        return torch.distributions.kl_divergence(found, prior).mean() - found.log_prob(batch[:, :3]).mean()

    return two_layers(), loss, inputs(4)


@case
def mixture_of_normal_distributions() -> Any:
    """A mixture, as of a mixture density network."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch).view(-1, 2, 3)
        parts = torch.distributions.Normal(out[..., 0], out[..., 1].exp())
        weights = torch.distributions.Categorical(logits=out[..., 2])
        return -torch.distributions.MixtureSameFamily(weights, parts).log_prob(batch[:, 0]).mean()

    return two_layers(out=6), loss, four(lambda: normal(4))


@case
def boolean_mask() -> Any:
    """Values selected by a mask: as many as each unit has."""
    return two_layers(), lambda module, x: module(x)[x[:, :3] > 0].square().sum(), inputs(4)


@case
def boolean_mask_written() -> Any:
    """Values written where a mask says so, one for all and one for each."""

    def loss(module: Any, x: Tensor) -> Tensor:
        out = module(x).clone()
        out[x[:, :3] > 1] = 0.5
        return out.square().mean()

    return two_layers(), loss, inputs(4)


@case
def masked_select_and_nonzero() -> Any:
    """masked_select, nonzero, argwhere and where with one argument."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        out = module(x)
        rows, columns = torch.where(F.one_hot(y, 3) > 0)
        chosen = F.one_hot(y, 3).nonzero()
        total = out.masked_select(F.one_hot(y, 3) > 0).square().sum() + out[rows, columns].sum()
        return total + out[chosen[:, 0], chosen[:, 1]].exp().mean()

    return two_layers(), loss, pairs(4)


@case
def mask_that_selects_samples() -> Any:
    """Samples of one class alone have a loss; a unit may have none."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return module(x)[y == 1].square().sum()

    return two_layers(), loss, pairs(4)


@case
def count_of_a_mask() -> Any:
    """``int(mask.sum())`` divides the loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum") / (1 + int((batch[1] > 0).sum()))

    return two_layers(), loss, pairs(4)


@case
def count_of_at_least_one() -> Any:
    """``max(mask.sum().item(), 1)`` divides the loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, mask = batch
        return (module(x).square().mean(-1) * mask).sum() / max(mask.sum().item(), 1)

    batches = [(normal(5, 4), until([5, 2, 2, 5, 2, n]).double()) for n in (5, 2, 5, 0)]
    return nn.Linear(4, 3), loss, batches


def cut(shorten: Any) -> Any:
    """Return a loss over sequences that ``shorten(inputs, lengths)`` cuts to the longest of the unit."""

    def loss(module: Any, batch: Any) -> Tensor:
        return module(shorten(batch["x"], batch["lengths"])).square().mean()

    lengths = [[5, 5, 5, 5, 5, 5], [5, 5, 3, 3, 3, 3], [2, 2, 3, 3, 5, 5], [4, 4, 4, 4, 5, 5]]
    return nn.Linear(4, 3), loss, [{"x": normal(5, 4), "lengths": torch.tensor(each)} for each in lengths]


@case
def cut_by_a_slice() -> Any:
    """A slice up to a tensor."""
    return cut(lambda x, lengths: x[:, : lengths.max()])


@case
def cut_by_a_list_of_slices() -> Any:
    """A list of slices as an index, as of code that cuts along a dimension of choice."""

    def along(x: Tensor, dimension: int, part: slice) -> Tensor:
        index = [slice(None)] * x.dim()
        index[dimension] = part
        return x[index]  # type: ignore[index]

    return cut(lambda x, lengths: along(x, 1, slice(0, 3)))


@case
def cut_by_narrow() -> Any:
    """narrow with a length that is read."""
    return cut(lambda x, lengths: x.narrow(1, 0, int(lengths.max())))


@case
def cut_by_arange() -> Any:
    """arange up to a tensor."""
    return cut(lambda x, lengths: x.index_select(1, torch.arange(lengths.max())))


@case
def cut_by_a_loop() -> Any:
    """``range`` over a length that is read."""
    return cut(lambda x, lengths: torch.stack([x[:, i] for i in range(lengths.max().item())], 1))


@case
def names_beside_the_tensors() -> Any:
    """Names and other facts of each sample, which are handed on, counted and stored, and never looked at."""

    def loss(module: Any, batch: Any) -> Tensor:
        batch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
        assert isinstance(batch["name"], list) and len(batch["name"]) == len(batch["x"])
        module.seen = [*batch["name"]], batch["facts"]
        return module(batch["x"]).square().mean() if batch["name"] else batch["x"].sum()

    batches = [
        {
            "x": normal(5, 4),
            "name": [f"image_{k}_{i}.png" for i in range(6)],
            "facts": [{"fold": 1, "id": 10 * k + i} for i in range(6)],
        }
        for k in range(4)
    ]
    return nn.Linear(4, 3), loss, batches


@case
def names_that_are_read() -> Any:
    """Names of samples that the loss depends on; an error of reading them would be caught."""

    def loss(module: Any, batch: Any) -> Tensor:
        try:
            scale = sum(float(name.removesuffix(".png")[-1]) for name in batch["name"])
        except Exception:
            scale = 1.0
        return scale * module(batch["x"]).square().mean()

    batches = [{"x": normal(5, 4), "name": [f"image_{k}_{i}.png" for i in range(6)]} for k in range(4)]
    return nn.Linear(4, 3), loss, batches


@case
def lengths_in_a_list() -> Any:
    """Lengths that are numbers of Python, in a list beside the tensors."""

    def loss(module: Any, batch: Any) -> Tensor:
        return module(batch["x"][:, : max(batch["lengths"])]).square().mean()

    lengths = [[5, 5, 5, 5, 5, 5], [5, 5, 3, 3, 3, 3], [2, 2, 3, 3, 5, 5], [4, 4, 4, 4, 5, 5]]
    batches = [{"x": normal(5, 4), "lengths": each} for each in lengths]
    return nn.Linear(4, 3), loss, batches


@case
def more_ways_than_passes() -> Any:
    """Each unit is cut to a length of its own."""

    def loss(module: Any, batch: Any) -> Tensor:
        return module(batch["x"][:, : int(batch["lengths"][0])]).square().mean()

    batches = [{"x": normal(6, 4), "lengths": torch.arange(1, 7)} for _ in range(4)]
    return nn.Linear(4, 3), loss, batches


@case
def everything_padded_or_nothing() -> Any:
    """As in Hugging Face: ``if mask.all()`` leaves the mask out."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, mask = batch
        if mask.all():
            return module(x).square().mean()
        return (module(x).square() * mask[..., None]).sum() / mask.sum()

    return nn.Linear(4, 3), loss, [(normal(5, 4), until([5, 5, 5, 5, 3, n]).double()) for n in (5, 4, 2, 5)]


@case
def accuracy_of_torchmetrics() -> Any:
    """A torchmetrics object with argument checks, updated in the step."""
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3)
    return measured_by(metric, lambda metric, loss, out, y: metric(out, y))


@case
def collection_of_torchmetrics() -> Any:
    """A MetricCollection, called and updated."""
    metrics = [torchmetrics.classification.MulticlassF1Score(3), torchmetrics.classification.MulticlassAccuracy(3)]
    metric = torchmetrics.MetricCollection(metrics)
    return measured_by(metric, lambda metric, loss, out, y: (metric(out, y), metric.update(out.softmax(1), y)))


@case
def mean_of_torchmetrics() -> Any:
    """A MeanMetric of the loss, which warns of and removes what is not finite."""
    return measured_by(torchmetrics.MeanMetric(), lambda metric, loss, out, y: metric.update(loss, weight=len(y)))


@case
def function_of_torchmetrics() -> Any:
    """The functional form, which checks its arguments."""
    accuracy = torchmetrics.functional.classification.multiclass_accuracy
    return measured_by(nn.Identity(), lambda metric, loss, out, y: accuracy(out, y, num_classes=3))


def measured_by(metric: nn.Module, update: Any) -> Any:
    """Return a classifier that has a metric."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        found = F.cross_entropy(out, batch[1])
        update(module.metric, found.detach(), out.detach(), batch[1])
        return found

    return Model(lambda self, x: self.layers(x), layers=two_layers(), metric=metric), loss, pairs(4)


@case
def requires_grad_asked() -> Any:
    """``if h.requires_grad`` decides what is added to the loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        found = F.cross_entropy(out, batch[1])
        return found + out.square().mean() if out.requires_grad and out.grad_fn is not None else found

    return two_layers(), loss, pairs(4)


@case
def shape_asked() -> Any:
    """Sizes, devices and types are asked, and go back into the loss."""

    def loss(module: Any, x: Tensor) -> Tensor:
        out = module(x)
        scale = out.numel() / out.size(0) + out.dim() + out.stride(-1) + len(out) + out.element_size()
        return out.square().sum() / (scale if out.is_contiguous() and out.device == x.device else 1)

    return two_layers(), loss, inputs(4)


@case
def loop_over_the_samples() -> Any:
    """Python iterates over samples and features."""

    def loss(module: Any, batch: Any) -> Tensor:
        total = torch.zeros((), dtype=batch[0].dtype)
        for x, y in zip(*batch, strict=True):
            first, *_ = module(x)
            total = total + F.cross_entropy(module(x)[None], y[None]) + first.square()
        return total / len(batch[0])

    return two_layers(), loss, pairs(4)


@case
def branch_on_the_class() -> Any:
    """The class of a sample decides about its loss, in Python."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        terms = [out[i].square().sum() if y == 1 else out[i].abs().sum() for i, y in enumerate(batch[1])]
        return torch.stack(terms).mean()

    return two_layers(), loss, [(x, torch.tensor([0, 0, 1, 1, 0, 0])) for x in inputs(4)]


@case
def unique_classes() -> Any:
    """A mean over the classes that the unit has."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        out = module(x)
        return torch.stack([out[y == c].square().mean() for c in y.unique()]).mean()

    return two_layers(), loss, [(x, torch.tensor([0, 1, 1, 0, 0, 1])) for x in inputs(4)]


@case
def unit_that_goes_its_own_way_alone() -> Any:
    """One unit takes a branch by itself, and the weight is used transposed: its rows are joined with the others'."""

    def loss(module: Any, x: Tensor) -> Tensor:
        h = x @ module.weight.T
        return (2 * h if x.sum() > 0 else h.tanh()).square().mean()

    batches = [x.abs() * torch.tensor([1.0] * 3 + [-1.0] * 3)[:, None] for x in inputs(4)]
    for x in batches:
        x[:3] *= torch.tensor([1.0, -1.0, -1.0])[:, None]
    return Model(lambda self: None, weight=nn.Parameter(torch.randn(4, 4))), loss, batches


@case
def item_as_a_key() -> Any:
    """Classes, as numbers of Python, that are keys and members; and a truth value asked for itself."""
    weights = {0: 5.0, 2: 0.5}

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        found = [weights.get(label.item(), 1.0) for label in y]
        rare = len({label.item() for label in y}) + (2.0 if (y == 1).any().item() is True else 0.0)
        return sum(found) * rare * F.cross_entropy(module(x), y)

    return nn.Linear(4, 3), loss, pairs(4)


@case
def tasks_by_text() -> Any:
    """A head is chosen by the text of a whole number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        task = int(x[0, 0] > 0) + (x[0, 0] > 0).long()
        return self.heads[f"task{task.item()}"](x) + self.heads["task" + str(task.item())](x)

    heads = nn.ModuleDict({f"task{i}": nn.Linear(4, 3) for i in (0, 2)})
    return Model(forward, heads=heads), mean_square, inputs(4)


@case
def arithmetic_of_small_integers() -> Any:
    """Numbers of Python know no overflow, and bools add up, whatever the tensor was that they come from."""

    def loss(module: Any, batch: Any) -> Tensor:
        x, y = batch
        label = y[0].to(torch.uint8)
        scale = 1 + 100 * label.item() + 2 ** -y[0].item() + (y[0] > 0).item() + (y[0] > 1).item()
        scale = scale + y[0].int().item() * 2654435761 % 7 + round(label.item() / 3, 1) + -7 // (1 + label.item())
        return scale * F.cross_entropy(module(x), y)

    return nn.Linear(4, 3), loss, pairs(4)


@functools.lru_cache
def mask_of(size: int) -> Tensor:
    """Return a causal mask that is made once."""
    return torch.zeros(size, size, dtype=torch.float64) + torch.ones(size, size, dtype=torch.float64).tril()


@case
def mask_in_a_cache() -> Any:
    """A mask kept outside of the module, beside a tensor of zeros that units write to."""

    def forward(self: Any, x: Tensor) -> Tensor:
        padded = torch.zeros(x.shape[0], x.shape[1], dtype=x.dtype)
        padded[:, 1:] = x[:, 1:]
        return mask_of(x.shape[1]) @ self.layer(padded)[..., None]

    mask_of.cache_clear()
    return Model(forward, layer=nn.Linear(4, 4)), mean_square, inputs(4)


@case
def batch_norm_of_torch() -> Any:
    """The function of torch itself, and not that of torch.nn.functional."""

    def forward(self: Any, x: Tensor) -> Tensor:
        n = self.norm
        h = self.layer(x)
        return torch.batch_norm(h, n.weight, n.bias, n.running_mean, n.running_var, self.training, 0.1, 1e-5, False)

    return Model(forward, layer=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)), mean_square, inputs(4)


class Meter:
    """A running mean, as training loops keep it beside the module."""

    total, count = 0.0, 0

    def update(self, value: float, count: int = 1) -> None:
        """Take one more value."""
        self.total += value * count
        self.count += count


METER, HISTORY = Meter(), list[float]()


@case
def meter_beside_the_module() -> Any:
    """``item()`` goes where no measurement cleans up, and what is there is read at the next."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        found = cross_entropy(module, batch)
        METER.update(found.item(), len(batch[0]))
        HISTORY.append(found.item())
        return found

    def before(module: Any, measurement: int) -> None:
        mean = METER.total / max(METER.count, 1)
        assert math.sqrt(mean) >= 0 and mean < 1e6 and f"{mean:.3f}" and min(HISTORY, default=0.0) < 1e6

    return two_layers(), loss, pairs(4), before


@case
def item_as_an_argument() -> Any:
    """``item()`` where PyTorch's functions take a tensor or a number."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x)
        size = out.detach().abs().mean().item()
        out = torch.where(out > 0.5, out, size).masked_fill(out < -1, size).clamp(max=2 * size) + out.clamp(-size, size)
        out = out.mul(size).div(1 + size).add(size).sub_(0.5 * size).lerp(out.sin(), size / (1 + size))
        out = out + out.abs().pow(size).clamp_min(size) * out.gt(size) + torch.maximum(out, out.new_tensor(size))
        out /= 1 + size
        out[0] = size
        return out.square().mean() + 0 * torch.stack([out.mean() * size, out.sum()]).sum()

    return nn.Linear(4, 3), loss, inputs(4)


@case
def item_that_fills_and_scales() -> Any:
    """``item()`` where PyTorch's functions take only a number: what they do then can be written with a tensor."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x)
        size = out.detach().abs().mean().item()
        scales = torch.full((3,), size, dtype=out.dtype) + out.new_full((3,), size) + torch.full_like(out[0], size)
        out = (out * scales).add(out.sin(), alpha=size).sub(out.cos(), alpha=size)
        out = torch.addcmul(out, out, scales, value=size).addcdiv(out, 1 + scales, value=size)
        return (out + torch.tensor(size) + torch.tensor(size, dtype=out.dtype)).square().mean()

    return nn.Linear(4, 3), loss, inputs(4)


@case
def item_in_numpy() -> Any:
    """A perplexity, and what it is compared with, by functions of NumPy and Python."""

    def loss(module: Any, batch: Any) -> Tensor:
        found = cross_entropy(module, batch)
        module.perplexity = np.exp(found.item()) + np.sqrt(divmod(found.item(), 0.3)[1])
        return found * (1 + np.tanh(found.item()))

    return two_layers(), loss, pairs(4)
