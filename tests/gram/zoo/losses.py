"""Losses: reductions, weights, masks, and samples that are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gram.zoo.registry import (
    SAMPLES,
    Model,
    case,
    cross_entropy,
    four,
    inputs,
    labels,
    normal,
    pairs,
    two_layers,
    until,
)
from torch import Tensor, nn


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return sequences of 5 steps and the mask of their lengths."""
    return normal(5, 4), until(lengths).double()


def ignored(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return sequences of 5 steps and classes, ignored beyond their lengths."""
    return normal(5, 4), torch.randint(3, (SAMPLES, 5)).masked_fill(~until(lengths), -100)


@case
def two_inputs_and_a_dict_output() -> Any:
    """A nested batch with a shared tensor and a text, and two losses."""

    def forward(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": self.left(batch["x"]) + self.right(batch["more"]["z"]), "aux": self.right(batch["more"]["z"])}

    def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        out = module(batch)
        return F.cross_entropy(out["logits"], batch["y"]) + batch["weight"] * out["aux"].square().mean()

    model = Model(forward, left=nn.Linear(4, 3), right=nn.Linear(2, 3))
    weight = torch.tensor(0.5, dtype=torch.float64)

    def batch() -> Any:
        return {"x": normal(4), "more": {"z": normal(2)}, "y": labels(), "weight": weight, "name": "trap"}

    return model, loss, four(batch)


@case
def list_output_of_scalars_to_grids() -> Any:
    """Outputs of which the loss uses some."""
    model = Model(lambda self, x: [self.layer(x), self.layer(x).mean(1), x[:, None, None] * 1.0], layer=nn.Linear(4, 3))
    return model, lambda module, x: sum(out.square().mean() for out in module(x)[:2]), inputs(4)


@case
def contrastive_loss() -> Any:
    """Samples of a unit are compared with each other."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        z = F.normalize(module(x), dim=1)
        return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(x)))

    return nn.Linear(4, 3), loss, inputs(4)


@case
def sum_of_the_losses() -> Any:
    """A sum over samples, not a mean."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")

    return nn.Linear(4, 3), loss, pairs(4)


@case
def mean_over_tokens_that_are_not_ignored() -> Any:
    """A mean over as many tokens as each unit has."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    return nn.Linear(4, 3), loss, [ignored([5, 2, 3, 1, 4, n]) for n in (3, 3, 1, 5)]


@case
def mean_over_tokens_that_are_not_padding() -> Any:
    """A mean over a mask, by hand."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, mask = batch
        return (module(x).square().mean(-1) * mask).sum() / mask.sum()

    return nn.Linear(4, 3), loss, [padded([5, 2, 3, 1, 4, n]) for n in (3, 3, 1, 5)]


@case
def mean_weighted_by_class() -> Any:
    """A mean weighted by the classes of the unit."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))

    return nn.Linear(4, 3), loss, pairs(4)


@case
def in_batch_negatives() -> Any:
    """The answers of others are negatives."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        question, answer = batch
        scores = module.question(question) @ module.answer(answer).T
        return F.cross_entropy(scores, torch.arange(len(question)))

    model = Model(lambda self: None, question=nn.Linear(4, 3), answer=nn.Linear(5, 3))
    return model, loss, four(lambda: (normal(4), normal(5)))


@case
def penalty_on_the_weights() -> Any:
    """A part of the loss in which no sample takes part."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1]) + 0.1 * sum(p.square().sum() for p in module.parameters())

    return nn.Linear(4, 3), loss, pairs(4)


@case
def batch_reordered_in_forward() -> Any:
    """Samples change places on the way."""

    def forward(self: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.last(self.inner(x[order]).tanh()[order.argsort()])

    model = Model(forward, inner=nn.Linear(4, 5), last=nn.Linear(5, 3))
    return model, cross_entropy, pairs(4)


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    source: str = "unit test"


@case
def dataclass_batch() -> Any:
    """A batch that is a dataclass."""

    def loss(module: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(module(batch.x), batch.y)

    return nn.Linear(4, 3), loss, [Pair(x, y) for x, y in pairs(4)]


def classified(loss: Any, *shape: int) -> Any:
    """Return a linear classifier with ``loss(outputs, classes)``."""
    return two_layers(), lambda module, batch: loss(module(batch[0]), batch[1]), pairs(4)


WEIGHTS = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)


@case
def cross_entropy_with_everything() -> Any:
    """Weights of classes, label smoothing and ignored targets, whose mean divides by what each unit has."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        out = module(batch[0]).transpose(1, 2)
        return F.cross_entropy(out, batch[1], weight=WEIGHTS, ignore_index=-100, label_smoothing=0.1)

    return nn.Linear(4, 3), loss, [ignored([5, 2, 3, 1, 4, n]) for n in (3, 3, 1, 5)]


@case
def smoothed_cross_entropy() -> Any:
    """Label smoothing alone."""
    return classified(lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2))


@case
def weighted_and_summed_cross_entropy() -> Any:
    """A sum with weights of classes and smoothing."""
    return classified(lambda out, y: F.cross_entropy(out, y, WEIGHTS, reduction="sum", label_smoothing=0.2))


@case
def cross_entropy_of_each_sample() -> Any:
    """No reduction, and a mean by hand."""
    return classified(lambda out, y: F.cross_entropy(out, y, WEIGHTS, reduction="none", label_smoothing=0.2).mean())


@case
def cross_entropy_of_probabilities() -> Any:
    """Targets that are distributions, as of mixup, with weights and smoothing."""
    return classified(
        lambda out, y: F.cross_entropy(out, (0.7 * F.one_hot(y, 3) + 0.1).to(out.dtype), WEIGHTS, label_smoothing=0.1)
    )


@case
def cross_entropy_as_a_module_of_the_module() -> Any:
    """nn.CrossEntropyLoss with its weights as a buffer."""
    model = Model(lambda self, x: self.layer(x), layer=nn.Linear(4, 3), criterion=nn.CrossEntropyLoss(WEIGHTS))
    return model, lambda module, batch: module.criterion(module(batch[0]), batch[1]), pairs(4)


@case
def negative_log_likelihood() -> Any:
    """nll_loss with weights, over images and with ignored pixels."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.nll_loss(module(x).log_softmax(1), y[:, None].expand(-1, 3, -1), WEIGHTS, ignore_index=2)

    return nn.Conv2d(2, 3, 1), loss, four(lambda: (normal(2, 3, 4), torch.randint(3, (SAMPLES, 4)).clamp_max(2)))


@case
def targets_that_are_all_ignored_in_one_unit() -> Any:
    """A sum over targets divided by at least one: a unit without any has no gradient."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        total = F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")
        return total / (batch[1] != -100).sum().clamp_min(1)

    return nn.Linear(4, 3), loss, [ignored([5, 0, 3, 0, 4, n]) for n in (3, 0, 1, 5)]


@case
def other_losses_for_classes() -> Any:
    """Margins, binary and multilabel losses with weights."""

    def loss(out: Tensor, y: Tensor) -> Tensor:
        hot = F.one_hot(y, 3).to(out.dtype)
        total = F.multi_margin_loss(out, y) + F.multilabel_soft_margin_loss(out, hot, WEIGHTS)
        total = total + F.binary_cross_entropy_with_logits(out, hot, pos_weight=WEIGHTS)
        return total + F.binary_cross_entropy(out.sigmoid(), hot) + F.soft_margin_loss(out, 2 * hot - 1)

    return classified(loss)


@case
def losses_for_regression() -> Any:
    """Absolute, Huber, Poisson, Gaussian and Kullback-Leibler losses."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        out, y = module(batch[0]), batch[1]
        total = F.l1_loss(out, y) + F.smooth_l1_loss(out, y) + F.huber_loss(out, y) + F.poisson_nll_loss(out, y.abs())
        total = total + F.gaussian_nll_loss(out, y, out.exp() + 0.1)
        return total + F.kl_div(out.log_softmax(-1), y.softmax(-1), reduction="batchmean")

    return two_layers(), loss, four(lambda: (normal(4), normal(3)))


@case
def triplets_and_similarities() -> Any:
    """Losses of two or three embeddings of each sample."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        a, b, c = (module(batch[:, i]) for i in range(3))
        same = batch[:, 0, 0].sign()
        total = F.triplet_margin_loss(a, b, c) + F.cosine_embedding_loss(a, b, same)
        return total + F.margin_ranking_loss(a[:, 0], b[:, 0], same, margin=0.2) + F.pairwise_distance(b, c).mean()

    return two_layers(), loss, inputs(3, 4)


@case
def connectionist_temporal_classification() -> Any:
    """CTC with lengths of inputs and targets in the batch."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y, lengths = batch
        scores = module(x).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, y, torch.full((len(x),), 6), lengths)

    def batch() -> Any:
        return normal(6, 3), torch.randint(1, 4, (SAMPLES, 2)), torch.randint(1, 3, (SAMPLES,))

    return nn.Linear(3, 4), loss, four(batch)


@case
def connectionist_temporal_classification_summed() -> Any:
    """CTC as a sum, with impossible targets set to zero."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        scores = module(x).log_softmax(-1).transpose(0, 1)
        size = torch.full((len(x),), 3)
        return F.ctc_loss(scores, y, size, torch.full((len(x),), 2), reduction="sum", zero_infinity=True)

    return nn.Linear(3, 4), loss, four(lambda: (normal(3, 3), torch.randint(1, 4, (SAMPLES, 2))))


@case
def flooded_loss() -> Any:
    """The absolute value of the loss above a level, of which the sign is the unit's own."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return (cross_entropy(module, batch) - 1.1).abs() + 1.1

    return two_layers(), loss, pairs(4)


@case
def root_of_a_mean() -> Any:
    """A loss that is no mean over samples."""
    return two_layers(), lambda module, x: F.mse_loss(module(x), x[:, :3].sign()).sqrt(), inputs(4)


@case
def maximum_over_samples() -> Any:
    """The worst sample of a unit alone has a gradient."""
    return two_layers(), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").max(), pairs(4)


@case
def first_sample_alone() -> Any:
    """Only the first sample of a unit has a gradient."""
    return two_layers(), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")[0], pairs(4)


@case
def better_half_of_the_samples() -> Any:
    """Samples left out by a median of the unit, as in trimmed losses."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
        return (losses * (losses.detach() <= losses.detach().median())).mean()

    return two_layers(), loss, pairs(4)


@case
def samples_weighted_by_a_layer() -> Any:
    """Weights of samples that are learned, and divided by their sum."""

    def loss(module: Any, batch: Any) -> Tensor:
        weights = module[0](batch[0])[:, 0].mul(3).sigmoid()
        return (weights * F.cross_entropy(module(batch[0]), batch[1], reduction="none")).sum() / weights.sum()

    return two_layers(), loss, pairs(4)


@case
def tasks_weighted_by_their_uncertainty() -> Any:
    """Learned weights of two losses, in which no sample takes part alone."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        losses = torch.stack([F.cross_entropy(out, batch[1]), out.square().mean()])
        return (losses * (-module.scales).exp() + module.scales).sum()

    model = Model(lambda self, x: self.layer(x), layer=nn.Linear(4, 3), scales=nn.Parameter(torch.randn(2)))
    return model, loss, pairs(4)


@case
def temperature_of_the_loss_alone() -> Any:
    """A parameter outside any layer that only the loss uses."""
    model = Model(lambda self, x: self.layer(x), layer=nn.Linear(4, 3), temperature=nn.Parameter(torch.randn(())))
    return model, lambda m, x: (m(x) * m.temperature.exp()).square().mean(), inputs(4)


def compared(similarity: Any) -> Any:
    """Return a classifier with a penalty on samples of a unit that are similar."""

    def loss(module: Any, batch: Any) -> Tensor:
        z = module.embed(batch[0])
        near = similarity(F.normalize(z, dim=1)) - 10 * torch.eye(len(z), dtype=z.dtype)
        return F.cross_entropy(module.head(z), batch[1]) + F.relu(near - 0.5).sum() / len(z)

    return Model(lambda self: None, embed=nn.Linear(4, 4), head=nn.Linear(4, 3)), loss, pairs(4)


@case
def compared_by_a_product() -> Any:
    """Samples meet in a matrix product."""
    return compared(lambda z: z @ z.T)


@case
def compared_by_cosine_similarity() -> Any:
    """Samples meet by broadcasting."""
    return compared(lambda z: F.cosine_similarity(z[:, None], z[None], dim=-1))


@case
def compared_by_distance() -> Any:
    """Samples meet in cdist."""
    return compared(lambda z: 1 - torch.cdist(z[None], z[None])[0].pow(2) / 2)


@case
def compared_by_einsum() -> Any:
    """Samples meet in einsum."""
    return compared(lambda z: torch.einsum("id,jd->ij", z, z))


@case
def compared_by_bmm() -> Any:
    """Samples meet in a batched product."""
    return compared(lambda z: torch.bmm(z[None], z.T[None])[0])


@case
def variance_and_covariance_of_the_unit() -> Any:
    """As in VICReg and Barlow Twins: statistics over samples, zero or undefined for one."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        z = module(x)
        centred = z - z.mean(0)
        spread = (centred.square().sum(0) / max(len(z) - 1, 1) + 1e-4).sqrt()
        return F.relu(1 - spread).mean() + (centred.T @ centred).triu(1).square().mean() + 0.1 * z.square().mean()

    return two_layers(), loss, inputs(4)


@case
def images_and_texts_that_belong_together() -> Any:
    """As in CLIP: a symmetric loss with a learned temperature."""

    def loss(module: Any, batch: Any) -> Tensor:
        a, b = (F.normalize(part, dim=1) for part in (module.a(batch[0]), module.b(batch[1])))
        scores = module.scale.exp() * a @ b.T
        return (F.cross_entropy(scores, torch.arange(len(a))) + F.cross_entropy(scores.T, torch.arange(len(a)))) / 2

    parts = {"a": nn.Linear(4, 3), "b": nn.Linear(2, 3), "scale": nn.Parameter(torch.tensor(0.5))}
    return Model(lambda self: None, **parts), loss, four(lambda: (normal(4), normal(2)))


@case
def gathered_log_probabilities() -> Any:
    """gather along the last dimension, counted from the end and from the front."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        out, y = module(batch[0]).log_softmax(-1), batch[1][:, None]
        return -(out.gather(-1, y) + 2 * out.gather(1, y)).mean() - out.take_along_dim(y, dim=-1).exp().mean()

    return two_layers(), loss, pairs(4)


@case
def largest_values() -> Any:
    """topk, sort and kthvalue along the last dimension."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x)
        ordered = out.sort(dim=-1)[0] * torch.arange(3) + out.sort(1, descending=True)[0]
        return out.topk(2, dim=-1)[0].square().mean() + ordered.mean() + out.kthvalue(2, dim=-1)[0].mean()

    return two_layers(), loss, inputs(4)


@case
def running_sums() -> Any:
    """cumsum, cumprod, logcumsumexp, flip and roll along the last dimension."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x)
        total = out.cumsum(-1).square() + out.cumprod(-1) + out.logcumsumexp(-1)
        return (total * out.flip(-1) + out.roll(1, -1) * out).mean()

    return two_layers(), loss, inputs(4)


@case
def generalised_advantages() -> Any:
    """As in PPO: a clipped ratio, advantages normalised over the unit, and an entropy."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, action, old, advantage = batch
        advantage = advantage - advantage.mean()
        scores = module(x).log_softmax(-1)
        ratio = (scores.gather(1, action[:, None])[:, 0] - old).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -gain.mean() + 0.01 * (scores.exp() * scores).sum(-1).mean()

    return two_layers(), loss, four(lambda: (normal(4), labels(), normal() * 0.1 - 1, normal()))


@case
def dice_and_focal_loss() -> Any:
    """As in segmentation: ratios of sums over the unit."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        p, y = module(batch[0]).sigmoid(), batch[1]
        focal = -((1 - p).pow(2) * y * p.log() + p.pow(2) * (1 - y) * (1 - p).log()).mean()
        return focal + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)

    return nn.Conv2d(2, 1, 3, padding=1), loss, four(lambda: (normal(2, 4, 4), (normal(1, 4, 4) > 0).double()))


@case
def optimal_transport_in_a_loop() -> Any:
    """Sinkhorn iterations over the samples of a unit."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        scores = -torch.cdist(module(batch[0]), batch[1])
        for _ in range(3):
            scores = scores - scores.logsumexp(1, keepdim=True)
            scores = scores - scores.logsumexp(0, keepdim=True)
        return (scores.exp() * torch.cdist(module(batch[0]), batch[1])).sum()

    return two_layers(), loss, four(lambda: (normal(4), normal(3)))


@case
def samples_mixed_with_their_neighbours() -> Any:
    """As in mixup with a fixed share: each sample takes a part of the next."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        out = module(0.6 * x + 0.4 * x.roll(1, 0))
        return 0.6 * F.cross_entropy(out, y) + 0.4 * F.cross_entropy(out, y.roll(1, 0))

    return two_layers(), loss, pairs(4)


@case
def scaled_by_the_largest_activation() -> Any:
    """A statistic of the unit without a gradient."""

    def loss(module: Any, batch: Any) -> Tensor:
        h = module[0](batch[0])
        return F.cross_entropy(module[2](h / h.detach().abs().amax()), batch[1])

    return two_layers(), loss, pairs(4)


@case
def loss_of_shape_one() -> Any:
    """A loss of one element that is no scalar."""
    return two_layers(), lambda module, x: module(x).square().mean().reshape(1), inputs(4)


@case
def vmap_in_the_loss() -> Any:
    """The user's own vmap over samples, inside that over units."""

    def loss(module: Any, batch: Any) -> Tensor:
        return torch.func.vmap(lambda x: (module.layer(x).softmax(-1) * x[:3]).sum())(batch).mean()

    return Model(lambda self: None, layer=nn.Linear(4, 3)), loss, inputs(4)


@case
def ensemble_by_functional_call() -> Any:
    """torch.func.functional_call with other parameters computed from the module's, as in MAML."""

    def loss(module: Any, batch: Any) -> Tensor:
        adapted = {name: p * 0.9 + 0.1 for name, p in module.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(module, adapted, (batch[0],)), batch[1])

    return two_layers(), loss, pairs(4)


@case
def distillation_from_a_frozen_teacher() -> Any:
    """A teacher without gradients, in the same module."""

    def loss(module: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = module.teacher(batch[0]).softmax(-1)
        out = module.student(batch[0])
        return F.kl_div(out.log_softmax(-1), wanted, reduction="batchmean") + F.cross_entropy(out, batch[1])

    teacher = nn.Linear(4, 3).requires_grad_(False)
    return Model(lambda self: None, student=nn.Linear(4, 3), teacher=teacher), loss, pairs(4)
