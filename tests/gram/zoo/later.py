"""What changes between measurements: an engine that was right at first must notice, or be right by construction."""

from __future__ import annotations

from collections.abc import Callable
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
    mean_square,
    normal,
    pairs,
    two_layers,
    until,
    words,
)
from torch import Tensor, nn


def epoch(module: Any, measurement: int) -> None:
    """Count epochs: the third measurement is in the first that differs."""
    module.epoch = max(measurement - 1, 0)


def lengths(*of_each: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Return batches of sequences with the masks of their lengths."""
    return [(normal(5, 4), until(each).double()) for each in of_each]


FULL = [5] * SAMPLES


@case
def padding_that_comes_later() -> Any:
    """Nothing is padded at first, then some units, then all alike."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, mask = batch
        return (module(x).square().mean(-1) * mask).sum() / mask.sum()

    return nn.Linear(4, 3), loss, lengths(FULL, FULL, [5, 1, 5, 5, 5, 5], [2, 2, 2, 2, 2, 3])


@case
def ignored_targets_that_come_later() -> Any:
    """All targets count at first."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    of_each = (FULL, FULL, [5, 3, 4, 1, 2, 5], [5, 5, 5, 5, 5, 2])
    return (
        nn.Linear(4, 3),
        loss,
        [(normal(5, 4), torch.ones(6, 5).long().masked_fill(~until(n), -100)) for n in of_each],
    )


@case
def ignored_targets_that_come_later_time_first() -> Any:
    """The same with samples on dimension 1."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]).transpose(0, 1).flatten(0, 1), batch[1].T.flatten())

    of_each = (FULL, FULL, [5, 3, 4, 1, 2, 5], [5, 5, 5, 5, 5, 2])
    return (
        nn.Linear(4, 3),
        loss,
        [(normal(5, 4), torch.ones(6, 5).long().masked_fill(~until(n), -100)) for n in of_each],
    )


@case
def factor_that_changes() -> Any:
    """The loss is scaled by a number that is annealed."""

    def loss(module: Any, x: Tensor) -> Tensor:
        return module(x).square().mean() * (1.0, 1.0, 0.5, 3.0)[module.measurement]

    def before(module: Any, measurement: int) -> None:
        module.measurement = measurement

    return nn.Linear(4, 3), loss, inputs(4), before


@case
def last_layer_of_zeros_at_first() -> Any:
    """The layers below have no gradient at first, so nothing is known of them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh()).mean(0)

    def before(module: Any, measurement: int) -> None:
        nn.init.normal_(module.last.weight, std=float(measurement > 1))

    return Model(forward, first=nn.Linear(3, 4), last=nn.Linear(4, 3)), cross_entropy, pairs(5, 3), before


@case
def relu_that_is_dead_at_first() -> Any:
    """Units of a hidden layer get no gradient until they are pushed up."""

    def before(module: Any, measurement: int) -> None:
        nn.init.constant_(module[0].bias, -100.0 if measurement < 2 else 0.5)

    return two_layers(nn.ReLU()), cross_entropy, pairs(4), before


def of_lengths(time_first: bool, *steps: int) -> Any:
    """Return a network over sequences of so many steps at each measurement."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.inner(x.transpose(0, 1) if time_first else x) + self.offset
        return self.last((self.norm(h) * self.gain).tanh()).mean(0 if time_first else 1)

    parts = {"inner": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "last": nn.Linear(4, 3)}
    free = {"gain": nn.Parameter(torch.randn(4)), "offset": nn.Parameter(torch.randn(4))}
    return Model(forward, **parts, **free), cross_entropy, [(normal(length, 4), labels()) for length in steps]


@case
def as_many_steps_as_samples_later() -> Any:
    """As many steps as samples, and twice as many, after the units were found elsewhere."""
    return of_lengths(False, 5, 6, 5, 12)


@case
def as_many_steps_as_samples_later_time_first() -> Any:
    """The same with samples on dimension 1."""
    return of_lengths(True, 5, 6, 5, 12)


@case
def as_many_steps_as_samples_at_first_time_first() -> Any:
    """As many steps as samples when places are looked for, and a single step later."""
    return of_lengths(True, 6, 5, 1, 24)


@case
def steps_of_units_at_first() -> Any:
    """As many steps as units of two and of three samples."""
    return of_lengths(True, 3, 2, 6, 4)


@case
def gradients_that_were_the_same_at_first() -> Any:
    """Far from its targets the L1 loss gives the bias the same gradient wherever units lie."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.smooth_l1_loss(module(x.transpose(0, 1).contiguous()), y.transpose(0, 1))

    return nn.Linear(4, 3), loss, [(normal(5, 4), normal(5, 3) + far) for far in (100.0, 100.0, 0.0, 0.0)]


@case
def deltas_of_one_at_first() -> Any:
    """Nearly all deltas are one, and which is not depends on the measurement."""

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x.transpose(0, 1).contiguous())
        return F.smooth_l1_loss(out, torch.ones_like(out), beta=0.5)

    def batch(step: int) -> Tensor:
        x = 10 + normal(6, 3)
        x[0, step] = 1.2
        return x

    def before(module: Any, measurement: int) -> None:
        nn.init.eye_(module.weight)
        nn.init.zeros_(module.bias)

    return nn.Linear(3, 3), loss, [batch(step) for step in (0, 2, 5, 3)], before


@case
def order_that_was_the_identity_at_first() -> Any:
    """Samples are sorted on the way, and come sorted at first."""

    def forward(self: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.last(self.inner(x[order]).tanh()[order.argsort()])

    batches = [(x[x[:, 0].argsort()] if i < 2 else x, y) for i, (x, y) in enumerate(pairs(4))]
    return Model(forward, inner=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, batches


def mixed(mix: Callable[[Tensor], Tensor], early: bool = False) -> Any:
    """Return a network in which the samples of a unit are mixed from the third measurement on."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(mix(x) if early and self.epoch else x).tanh()
        return self.last(mix(h) if self.epoch and not early else h)

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, pairs(4), epoch


@case
def mean_subtracted_later() -> Any:
    """The mean over samples is subtracted."""
    return mixed(lambda h: h - h.mean(0))


@case
def flipped_later() -> Any:
    """Samples take a part of others."""
    return mixed(lambda h: 0.7 * h + 0.3 * h.flip(0))


@case
def divided_by_the_norm_later() -> Any:
    """Everything is divided by the norm of the unit."""
    return mixed(lambda h: h / h.norm())


@case
def softmax_over_samples_later() -> Any:
    """Inputs are weighted over samples."""
    return mixed(lambda x: x * F.softmax(x, dim=0), early=True)


@case
def normalised_over_samples_later() -> Any:
    """Inputs are normalised over samples."""
    return mixed(lambda x: F.normalize(x, dim=0), early=True)


@case
def averaged_by_a_matrix_later() -> Any:
    """Inputs are averaged over samples by a product."""
    return mixed(lambda x: torch.full((len(x), len(x)), 1 / len(x), dtype=x.dtype) @ x, early=True)


@case
def gate_that_opens() -> Any:
    """The graph is the same, and a parameter decides whether samples mix."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.gate * (h.mean(0) - h))

    def before(module: Any, measurement: int) -> None:
        nn.init.constant_(module.gate, 0.7 * (measurement > 1))

    parts = {"first": nn.Linear(4, 5), "last": nn.Linear(5, 3), "gate": nn.Parameter(torch.zeros(()))}
    return Model(forward, **parts), cross_entropy, pairs(4), before


@case
def loss_with_a_switch() -> Any:
    """Another loss after a warm-up, with another graph."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        return F.cross_entropy(out, batch[1]) + (out.square().mean() if module.epoch else 0)

    return two_layers(), loss, pairs(4), epoch


@case
def pairs_that_come_close_later() -> Any:
    """A penalty on samples that are close, which none are at first."""

    def loss(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        return F.cross_entropy(out, batch[1]) + (0.1 - (out[:, None] - out).square().sum(-1)).relu().triu(1).sum()

    batches = pairs(4)
    for x, _ in batches[2:]:
        x[1::2] = x[::2] + 1e-3
    return two_layers(), loss, batches


@case
def penalty_that_leaves_no_batch_in_the_first_graph() -> Any:
    """One class at first and a penalty: the part of the graph that only samples take part in is small."""
    weight = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)

    def loss(module: Any, batch: Any) -> Tensor:
        penalty = 1e-2 * sum(p.square().sum() for p in module.parameters())
        return F.cross_entropy(module(batch[0]), batch[1], weight=weight) + penalty

    batches = pairs(4)
    batches[0][1].fill_(1)
    batches[1][1].fill_(1)
    return two_layers(), loss, batches


@case
def frozen_parts_that_change() -> Any:
    """A layer is frozen, and thawed again."""

    def before(module: Any, measurement: int) -> None:
        module[0].requires_grad_(measurement % 2 == 0)

    return two_layers(), cross_entropy, pairs(4), before


@case
def layer_thawed_later() -> Any:
    """Finetuning begins with the head alone."""

    def before(module: Any, measurement: int) -> None:
        module[0].requires_grad_(measurement > 1)

    return two_layers(), cross_entropy, pairs(4), before


@case
def batchnorm_that_trains_later() -> Any:
    """Statistics are frozen at first."""

    def before(module: Any, measurement: int) -> None:
        module[1].train(measurement > 1)

    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return net, cross_entropy, pairs(2, 4, 4), before


@case
def batchnorm_that_freezes_later() -> Any:
    """Statistics are frozen at the end."""

    def before(module: Any, measurement: int) -> None:
        module[1].train(measurement < 2)

    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return net, cross_entropy, pairs(4), before


@case
def table_that_becomes_tied() -> Any:
    """Two weights become one."""

    def before(module: Any, measurement: int) -> None:
        if measurement == 2:
            module.head.weight = module.table.weight

    model = Model(
        lambda self, x: self.head(self.table(x).tanh()).mean(1),
        table=nn.Embedding(7, 4),
        head=nn.Linear(4, 7, bias=False),
    )
    return model, cross_entropy, four(lambda: (words(), labels(7))), before


@case
def layer_that_is_replaced() -> Any:
    """A head for other classes takes the place of the first."""

    def before(module: Any, measurement: int) -> None:
        if measurement == 2:
            module[2] = nn.Linear(5, 4).double()

    return two_layers(), cross_entropy, pairs(4), before


@case
def layers_that_are_added() -> Any:
    """As in progressive growing: one more layer at each measurement."""

    def before(module: Any, measurement: int) -> None:
        if measurement > 1:
            module.append(nn.Linear(4, 4).double())

    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()), mean_square, inputs(4), before


@case
def expert_that_is_idle_at_first() -> Any:
    """An expert gets a weight of zero until later, and has no gradient before."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.first(x) + (0.0 if self.epoch == 0 else 0.5) * self.second(x.flip(1))

    return Model(forward, first=nn.Linear(4, 3), second=nn.Linear(4, 3)), cross_entropy, pairs(4), epoch


@case
def root_of_a_mean_later() -> Any:
    """Parameters are zero at first, and all units have the same loss."""

    def before(module: Any, measurement: int) -> None:
        nn.init.normal_(module.weight, std=float(measurement > 1))
        nn.init.zeros_(module.bias)

    return nn.Linear(4, 3), lambda m, x: (m(x) - x[:, :3].sign()).square().mean() ** 0.5, inputs(4), before


@case
def sum_over_targets_that_are_as_many_in_all() -> Any:
    """As many targets in all, and more or fewer in each unit."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        total = F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")
        return total / (batch[1] != -100).sum().clamp_min(1)

    of_each = ([4] * 6, [4] * 6, [5, 3, 4, 4, 3, 5], [1, 5, 5, 5, 5, 3])
    return (
        nn.Linear(4, 3),
        loss,
        [(normal(5, 4), torch.ones(6, 5).long().masked_fill(~until(n), -100)) for n in of_each],
    )


@case
def lengths_that_differ_later() -> Any:
    """Sequences are cut to the longest, and all are as long at first."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, mask = batch
        return module(x[:, : int(mask.sum(1).max())]).square().mean()

    return nn.Linear(4, 3), loss, lengths(FULL, FULL, [5, 5, 3, 3, 3, 3], [4, 4, 4, 4, 2, 2])


@case
def hook_that_comes_later() -> Any:
    """A hook on a tensor from the third measurement on."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.epoch and h.requires_grad:
            h.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
        return self.last(h)

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, pairs(4), epoch


@case
def hook_of_a_module_that_comes_later() -> Any:
    """A full backward hook is registered between measurements."""

    def before(module: Any, measurement: int) -> None:
        if measurement == 2:
            module[1].register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5,))

    return two_layers(), cross_entropy, pairs(4), before


@case
def shapes_that_change() -> Any:
    """Images of another size at each measurement."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    return net, cross_entropy, [(normal(2, size, size), labels()) for size in (4, 6, 3, 4)]


@case
def weights_that_are_learned() -> Any:
    """Weights of samples are alike at first, and then far apart."""

    def loss(module: Any, batch: Any) -> Tensor:
        weights = (module.layers[0](batch[0])[:, 0] * module.gate).sigmoid()
        return (weights * F.cross_entropy(module.layers(batch[0]), batch[1], reduction="none")).sum() / weights.sum()

    def before(module: Any, measurement: int) -> None:
        nn.init.constant_(module.gate, 3.0 * (measurement > 1))

    return Model(lambda self: None, layers=two_layers(), gate=nn.Parameter(torch.zeros(()))), loss, pairs(4), before


@case
def parameters_of_another_type_later() -> Any:
    """A layer is moved to float32 and back, as a part of it was cast by hand."""

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0].to(module[0].weight.dtype)).double(), batch[1])

    return two_layers(), loss, pairs(4)


@case
def same_sample_in_every_unit() -> Any:
    """All units are alike at first: no place can be told from another."""
    batches = pairs(4)
    for x, y in batches[:2]:
        x[:], y[:] = x[0], y[0]
    model = Model(lambda self, x: self.layer(x.transpose(0, 1)).mean(0), layer=nn.Linear(4, 3))
    return model, cross_entropy, [(x[:, None].repeat(1, 6, 1), y) for x, y in batches]
