"""What a forward pass writes: buffers, batches, attributes, and tensors made on the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from gram.zoo.registry import (
    Model,
    case,
    cross_entropy,
    inputs,
    mean_square,
    pairs,
    two_layers,
)
from torch import Tensor, nn


@case
def batchnorm() -> Any:
    """Units of one sample use running statistics, larger ones their own."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)
    )
    net[1].running_mean.normal_()
    net[5].running_var.uniform_(0.5, 2)
    return net, cross_entropy, pairs(2, 4, 4)


@case
def batchnorm_in_eval_mode() -> Any:
    """One layer in eval mode while the others train."""
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    net[1].running_mean.normal_()
    net[1].eval()
    return net, cross_entropy, pairs(4)


@case
def buffer_written_in_forward() -> Any:
    """A buffer written in place and used: each unit starts from the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.layer(x) * self.count

    model = Model(forward, layer=nn.Linear(4, 3))
    model.register_buffer("count", torch.tensor(1.0))
    return model, mean_square, inputs(4)


@case
def frozen_parameter_written_in_forward() -> Any:
    """A frozen parameter takes a value of the unit's own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.mul_(0.9).add_(self.layer.weight.mean() + x.mean())
        return self.layer(x) * self.teacher

    return Model(forward, layer=nn.Linear(4, 3), teacher=nn.Parameter(torch.ones(3), False)), mean_square, inputs(4)


@case
def batch_written_in_forward() -> Any:
    """The batch is written in place."""
    return Model(lambda self, x: self.layer(x.mul_(2.0)), layer=nn.Linear(4, 3)), mean_square, inputs(4)


def normalised(norm: Any) -> Any:
    """Return a convolution with ``norm(module, activations)`` behind it, and buffers for it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(norm(self, self.conv(x)).relu().flatten(1))

    model = Model(forward, conv=nn.Conv2d(2, 3, 3), head=nn.Linear(12, 3), weight=nn.Parameter(torch.ones(3)))
    model.bias = nn.Parameter(torch.zeros(3))
    model.register_buffer("mean", torch.randn(3))
    model.register_buffer("var", torch.rand(3) + 0.5)
    return model, cross_entropy, pairs(2, 4, 4)


@case
def batchnorm_as_a_function() -> Any:
    """F.batch_norm with running statistics in training mode."""
    return normalised(lambda self, h: F.batch_norm(h, self.mean, self.var, self.weight, self.bias, self.training))


@case
def batchnorm_as_a_function_in_eval_mode() -> Any:
    """F.batch_norm with running statistics that are used."""
    return normalised(lambda self, h: F.batch_norm(h, self.mean, self.var, self.weight, self.bias, training=False))


@case
def batchnorm_without_running_statistics() -> Any:
    """F.batch_norm without buffers: statistics of the unit, also of one sample, over its pixels."""
    return normalised(lambda self, h: F.batch_norm(h, None, None, self.weight, self.bias, training=True))


@case
def batchnorm_layer_that_does_not_track() -> Any:
    """A layer without buffers, which uses the statistics of the unit in every mode."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3)
    )
    return net, cross_entropy, pairs(2, 4, 4)


@case
def batchnorm_with_a_cumulative_average() -> Any:
    """momentum=None: the layer counts its batches."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(12, 3))
    return net, cross_entropy, pairs(2, 4, 4)


@case
def batchnorm_without_parameters() -> Any:
    """affine=False."""
    net = nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    return net, cross_entropy, pairs(2, 3, 3, 3)


@case
def instance_norm_without_statistics() -> Any:
    """InstanceNorm as a layer and as a function."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.instance_norm(self.norm(self.conv(x)).relu(), weight=self.weight)

    parts = {
        "conv": nn.Conv1d(2, 3, 2),
        "norm": nn.InstanceNorm1d(3, affine=True),
        "weight": nn.Parameter(torch.ones(3)),
    }
    return Model(forward, **parts), mean_square, inputs(2, 5)


@case
def spectral_norm_that_trains() -> Any:
    """A power iteration in each forward pass writes buffers, which each unit starts from anew."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def moving_average_in_a_buffer() -> Any:
    """A buffer takes a share of each unit's mean, and is used."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.layer(x)
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * h.mean(0))
        return h - self.average

    model = Model(forward, layer=nn.Linear(4, 3))
    model.register_buffer("average", torch.zeros(3))
    return model, cross_entropy, pairs(4)


@case
def buffer_replaced_in_forward() -> Any:
    """A buffer gets a new tensor of each unit's own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.scale = 0.5 * self.scale + 0.5 * x.detach().abs().mean()
        return self.layer(x) / self.scale

    model = Model(forward, layer=nn.Linear(4, 3))
    model.register_buffer("scale", torch.tensor(1.0))
    return model, cross_entropy, pairs(4)


@case
def queue_of_negatives() -> Any:
    """As in MoCo: a queue that the unit is written into at a pointer."""

    def loss(module: Any, x: Tensor) -> Tensor:
        z = F.normalize(module.layer(x), dim=1)
        found = F.cross_entropy(
            torch.cat([(z * z.detach()).sum(1, keepdim=True), z @ module.queue.clone().T], 1), x[:, 0].long() * 0
        )
        start = int(module.pointer)
        module.queue[start : start + len(z)] = z.detach()
        module.pointer[0] = (start + len(z)) % 6
        return found

    model = Model(lambda self: None, layer=nn.Linear(4, 3))
    model.register_buffer("queue", F.normalize(torch.randn(6, 3), dim=1))
    model.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
    return model, loss, inputs(4)


@case
def queue_beside_a_moving_average() -> Any:
    """As in MoCo: a queue that units are written into, and frozen parameters that follow the others, all at once."""

    def loss(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch._foreach_mul_([*module.key.parameters()], 0.9)
            torch._foreach_add_([*module.key.parameters()], [p.detach() for p in module.layer.parameters()], alpha=0.1)
        z, key = F.normalize(module.layer(x), dim=1), module.key(x)
        found = F.cross_entropy(z @ torch.cat([key, module.queue.clone()]).T, torch.arange(len(x)))
        module.queue[: len(x)] = key
        return found

    model = Model(lambda self: None, layer=nn.Linear(4, 3), key=nn.Linear(4, 3).requires_grad_(False))
    model.register_buffer("queue", torch.randn(6, 3))
    return model, loss, inputs(4)


@case
def center_set_by_data() -> Any:
    """As in DINO: a buffer gets new values through ``data``, and the batch is read through it."""

    def loss(module: Any, x: Tensor) -> Tensor:
        h = module(x.data)
        module.center.data = 0.9 * module.center + 0.1 * h.detach().mean(0)
        return (h - module.center).square().mean() + (h * x.data.mean(1, keepdim=True)).mean()

    model = Model(lambda self, x: self.layer(x), layer=nn.Linear(4, 3))
    model.register_buffer("center", torch.zeros(3))
    return model, loss, inputs(4)


@case
def target_network_by_moving_average() -> Any:
    """As in BYOL: frozen parameters follow the others in the step."""

    def loss(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, other in zip(module.target.parameters(), module.online.parameters(), strict=True):
                mine.mul_(0.9).add_(0.1 * other)
            wanted = module.target(x)
        return F.mse_loss(module.online(x.flip(1)), wanted)

    target = nn.Linear(4, 3).requires_grad_(False)
    return Model(lambda self: None, online=nn.Linear(4, 3), target=target), loss, inputs(4)


@case
def target_network_written_by_data() -> Any:
    """The same through ``data``, which counts no version, as in most code for moving averages."""

    def loss(module: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            module.target.weight.data = module.target.weight.data * 0.9 + module.online.weight.data * 0.1
            module.target.bias.data.lerp_(module.online.bias.data, 0.1)
            wanted = module.target(x)
        return F.mse_loss(module.online(x.flip(1)), wanted)

    target = nn.Linear(4, 3).requires_grad_(False)
    return Model(lambda self: None, online=nn.Linear(4, 3), target=target), loss, inputs(4)


def written(make: Any) -> Any:
    """Return a loss over a tensor that ``make(features)`` gives and features are written into."""

    def loss(module: Any, x: Tensor) -> Tensor:
        h = module(x)
        out = make(h)
        out[:, 0] = h[:, 1]
        out[:, 1:] += h[:, :2]
        out[..., 2].mul_(2)
        return out.square().mean()

    return two_layers(), loss, inputs(4)


@case
def written_into_zeros() -> Any:
    """torch.zeros of a shape."""
    return written(lambda h: torch.zeros(len(h), 3, dtype=h.dtype))


@case
def written_into_empty() -> Any:
    """torch.empty, filled in place."""
    return written(lambda h: torch.empty(len(h), 3, dtype=h.dtype).fill_(0.3))


@case
def written_into_new_zeros() -> Any:
    """A method of another tensor."""
    return written(lambda h: h.new_zeros(h.shape))


@case
def written_into_ones_like() -> Any:
    """torch.ones_like of the batch."""
    return written(torch.ones_like)


@case
def written_into_full_and_arange() -> Any:
    """torch.full and arange."""
    return written(lambda h: torch.full((len(h), 3), 0.5, dtype=h.dtype) + torch.arange(3))


@case
def written_into_a_constant() -> Any:
    """A tensor outside of the module is copied and written into."""
    constant = torch.randn(3, dtype=torch.float64)
    return written(lambda h: constant.clone().expand(len(h), 3).clone())


@case
def one_hot_by_scatter() -> Any:
    """Zeros that a class is scattered into, as losses of segmentation do."""

    def loss(module: Any, batch: Any) -> Tensor:
        probabilities = module(batch[0]).softmax(1)
        one_hot = torch.zeros(probabilities.shape, dtype=probabilities.dtype)
        one_hot = one_hot.scatter_(1, batch[1][:, None], value=1)
        return 1 - (2 * (probabilities * one_hot).sum(0) / (probabilities + one_hot).sum(0)).mean()

    return two_layers(), loss, pairs(4)


@case
def written_by_other_operations_in_place() -> Any:
    """Operations that write units into zeros, each of which vmap refuses in words of its own."""

    def loss(module: Any, x: Tensor) -> Tensor:
        h = module(x)
        zeros = lambda: torch.zeros(h.shape, dtype=h.dtype)  # noqa: E731
        first = torch.zeros(len(h), dtype=torch.long)
        written = (
            zeros().copy_(h),
            zeros().lerp_(h, 0.5),
            zeros().index_add_(1, h.detach().argmax(1)[:1], h[:, :1]),
            zeros().index_put_((torch.arange(len(h)), first), h[:, 0]),
            zeros().addcmul_(h, h).clamp_(min=h.detach()),
        )
        return sum((1 + h * part).square().mean() for part in written)  # type: ignore[return-value]

    return two_layers(), loss, inputs(4)


@case
def codebook_by_moving_average() -> Any:
    """As in VQ-VAE: codes in a buffer move to what is assigned to them, by lerp_."""

    def loss(module: Any, x: Tensor) -> Tensor:
        z = module(x)
        codes = module.codes.clone()
        one_hot = F.one_hot(torch.cdist(z.detach(), codes).argmin(1), len(codes)).to(z.dtype)
        module.codes.lerp_(one_hot.T @ z.detach(), 0.1)
        return F.mse_loss(z, one_hot @ codes) + (z @ module.codes.T).square().mean()

    model = Model(lambda self, x: self.layer(x), layer=nn.Linear(4, 3))
    model.register_buffer("codes", torch.randn(5, 3))
    return model, loss, inputs(4)


@case
def operations_in_place() -> Any:
    """Activations changed in place."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).add_(0.1).mul_(2)
        h[:, 0] += self.gain[0]
        h[:, 1:3].sub_(self.gain[1:3])
        return self.last(F.relu_(h.masked_fill_(h > 2, 1.0)))

    parts = {"first": nn.Linear(4, 5), "gain": nn.Parameter(torch.randn(5)), "last": nn.Linear(5, 3)}
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def counter_that_scales() -> Any:
    """A number of Python counts forward passes, and is used: each unit starts from the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls

    model = Model(forward, layer=nn.Linear(4, 3))
    model.calls = 0
    return model, mean_square, inputs(4)


@case
def cache_on_the_module() -> Any:
    """An attribute holds a tensor of the last forward pass, which the loss reads."""

    def forward(self: Any, x: Tensor) -> Tensor:
        self.hidden = self.first(x).tanh()
        return self.last(self.hidden)

    def loss(module: Any, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + 0.1 * module.hidden.square().mean()

    return Model(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), loss, pairs(4)


@case
def positions_cached_at_first_use() -> Any:
    """A table of positions made in the first forward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(self, "table", None) is None or len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1], dtype=x.dtype)[:, None].sin()
        return self.layer(x + self.table).mean(1)

    return Model(forward, layer=nn.Linear(4, 3)), cross_entropy, pairs(5, 4)


@case
def modes_switched_in_the_loss() -> Any:
    """eval() and train() within the step, as for a teacher or a perceptual loss."""

    def loss(module: Any, batch: Any) -> Tensor:
        module.norm.eval()
        quiet = module(batch[0])
        module.norm.train()
        return F.cross_entropy(quiet, batch[1])

    model = Model(lambda self, x: self.head(self.norm(self.conv(x)).flatten(1)), conv=nn.Conv2d(2, 3, 3))
    model.norm, model.head = nn.BatchNorm2d(3), nn.Linear(12, 3)
    return model, loss, pairs(2, 4, 4)


@case
def generator_frozen_in_the_step() -> Any:
    """As toggle_optimizer does: requires_grad is switched off and on again."""

    def loss(module: Any, batch: Any) -> Tensor:
        for p in module.first.parameters():
            p.requires_grad_(False)
        found = F.cross_entropy(module.last(module.first(batch[0]).tanh()), batch[1])
        for p in module.first.parameters():
            p.requires_grad_(True)
        return found

    return Model(lambda self: None, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), loss, pairs(4)
