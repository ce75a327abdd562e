"""Parameters that are shared, transformed, frozen, or met in several ways."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from gram.zoo.registry import (
    Model,
    case,
    cross_entropy,
    four,
    inputs,
    mean_square,
    pairs,
    texts,
    two_layers,
    words,
)
from torch import Tensor, nn
from torch.nn.utils import prune


@case
def tied_embedding_and_head() -> Any:
    """One table at both ends, of which the gradients add up."""
    model = Model(
        lambda self, x: self.head(self.table(x).tanh()), table=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False)
    )
    model.head.weight = model.table.weight

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(module(x[:, :-1]).transpose(1, 2), x[:, 1:])

    return model, loss, four(words)


@case
def weight_shared_by_two_layers() -> Any:
    """Two names of one weight."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net, mean_square, inputs(4)


@case
def frozen_parameters() -> Any:
    """A frozen layer below one that trains, and a frozen bias."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net, cross_entropy, pairs(4)


@case
def parameter_used_twice() -> Any:
    """One parameter in two operations of different kinds."""
    model = Model(lambda self, x: (x * self.scale).tanh() @ self.scale, scale=nn.Parameter(torch.randn(4)))
    return model, mean_square, inputs(4)


@case
def module_called_twice() -> Any:
    """One layer called twice in a forward pass."""
    model = Model(lambda self, x: self.layer(self.layer(x).tanh()), layer=nn.Linear(4, 4))
    return model, mean_square, inputs(4)


@case
def functional_use_of_a_childs_weight() -> Any:
    """A weight used by its layer and by a function."""
    model = Model(lambda self, x: F.linear(self.layer(x).tanh(), self.layer.weight), layer=nn.Linear(4, 4))
    return model, mean_square, inputs(4)


@case
def parameters_as_keys() -> Any:
    """A rate for each parameter, in a dictionary of the parameters themselves."""

    def forward(self: Any, x: Tensor) -> Tensor:
        penalty = sum(self.rates[p] * p.square().sum() for p in self.parameters())
        return self.layer(x) + penalty

    model = Model(forward, layer=nn.Linear(4, 3))
    model.rates = {p: 0.1 * (i + 1) for i, p in enumerate(model.parameters())}
    return model, mean_square, inputs(4)


@case
def weight_norm() -> Any:
    """A weight that is computed from two parameters before it meets the data."""
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    return net, cross_entropy, pairs(4)


@case
def spectral_norm() -> Any:
    """A weight divided by its largest singular value."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)).eval()
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def low_rank_adapter() -> Any:
    """A product of two parameters added to a frozen weight."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down)

    base = nn.Linear(4, 3, bias=False).requires_grad_(False)
    parts = {"base": base, "up": nn.Parameter(torch.randn(3, 2)), "down": nn.Parameter(torch.randn(2, 4))}
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def shared_embedding_and_position_bias() -> Any:
    """As in T5: one table for encoder, decoder and head, and a bias of attention that is looked up by distance."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h, y = self.table(x), self.table(x.flip(1))
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        q, k = self.q(self.gain * h * scale), self.k(y)
        distance = torch.arange(5)[:, None] - torch.arange(5) + 4
        bias = self.bias(distance).permute(2, 0, 1)
        weights = ((q @ k.mT)[:, None] + bias).softmax(-1).mean(1)
        return (weights @ y @ self.table.weight.T).mean(1)

    parts = {"table": nn.Embedding(7, 4), "bias": nn.Embedding(9, 2), "gain": nn.Parameter(torch.randn(4))}
    model = Model(forward, **parts, q=nn.Linear(4, 4, bias=False), k=nn.Linear(4, 4, bias=False))
    return model, cross_entropy, texts(classes=7)


@case
def complex_parameter() -> Any:
    """A complex parameter, whose inner products are those of real and imaginary parts."""
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    model = Model(lambda self, x: (x.to(torch.complex128) @ self.weight).abs(), weight=weight)
    model.double = lambda: model  # complex parameters have no double()
    return model, mean_square, inputs(4)


@case
def weight_norm_of_the_old_kind() -> Any:
    """A hook before the forward pass computes the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), cross_entropy, pairs(4)


@case
def orthogonal_weight() -> Any:
    """A weight that is a matrix exponential."""
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)), cross_entropy, pairs(4)


@case
def pruned_weight() -> Any:
    """A weight times a mask, by a hook before the forward pass."""
    net = two_layers()
    prune.random_unstructured(net[0], "weight", amount=0.5)
    return net, cross_entropy, pairs(4)


@case
def weight_standardised() -> Any:
    """Convolutions with standardised weights, as in NFNets."""

    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True) * self.gain
        return self.head(F.conv2d(x, w, self.conv.bias).relu().mean((2, 3)))

    parts = {"conv": nn.Conv2d(2, 4, 3), "gain": nn.Parameter(torch.randn(4, 1, 1, 1)), "head": nn.Linear(4, 3)}
    return Model(forward, **parts), cross_entropy, pairs(2, 5, 5)


@case
def weights_quantised_with_a_straight_gradient() -> Any:
    """Rounded in the forward pass, and not in the backward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.layer.weight
        return F.linear(x, w + ((w * 8).round() / 8 - w).detach(), self.layer.bias)

    return Model(forward, layer=nn.Linear(4, 3)), cross_entropy, pairs(4)


@case
def weights_made_by_a_network() -> Any:
    """A hypernetwork makes a weight of each sample's own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weights = self.maker(x).view(len(x), 3, 4)
        return torch.einsum("bij,bj->bi", weights, self.below(x))

    return Model(forward, maker=nn.Linear(4, 12), below=nn.Linear(4, 4)), cross_entropy, pairs(4)


@case
def weights_interpolated_from_two() -> Any:
    """A weight between two, by a third parameter."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, torch.lerp(self.a, self.b, self.at.sigmoid()))

    parts = {
        "a": nn.Parameter(torch.randn(3, 4)),
        "b": nn.Parameter(torch.randn(3, 4)),
        "at": nn.Parameter(torch.zeros(())),
    }
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def parameters_in_one_vector() -> Any:
    """A flat parameter, cut into weight and bias by views."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight, bias = self.flat.split([12, 3])
        return F.linear(x, weight.view(3, 4), bias)

    return Model(forward, flat=nn.Parameter(torch.randn(15))), cross_entropy, pairs(4)


@case
def weight_transposed_permuted_and_sliced() -> Any:
    """Views of a parameter in several operations."""

    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.w
        return x @ w.T[:, :3] + x[:, :2] @ w[1:3, :3] + (x @ w.permute(1, 0).reshape(4, 4))[:, 1:] + w.diagonal()[:3]

    return Model(forward, w=nn.Parameter(torch.randn(4, 4))), cross_entropy, pairs(4)


@case
def penalties_on_lists_of_parameters() -> Any:
    """Absolute values, a norm, and an orthogonality that weights alone take part in."""

    def loss(module: Any, batch: Any) -> Tensor:
        weights = [p for name, p in module.named_parameters() if "weight" in name]
        total = sum(w.abs().sum() for w in weights) + torch.cat([w.flatten() for w in weights]).norm()
        gram = module[0].weight.T @ module[0].weight
        return cross_entropy(module, batch) + 0.1 * total + (gram - torch.eye(4, dtype=gram.dtype)).square().sum()

    return two_layers(), loss, pairs(4)


@case
def penalty_on_a_shared_weight() -> Any:
    """A tied table, in a penalty too."""
    model = Model(
        lambda self, x: self.head(self.table(x).tanh()).mean(1), table=nn.Embedding(7, 4), head=nn.Linear(4, 7)
    )
    model.head.weight = model.table.weight
    return model, lambda m, b: cross_entropy(m, b) + 0.1 * m.table.weight.square().mean(), texts(classes=7)


@case
def parameters_kept_in_a_list() -> Any:
    """Parameters that the module finds in a list of Python beside its own names."""

    def loss(module: Any, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + sum(p.pow(3).sum() for p in module.held)

    model = nn.Linear(4, 3)
    model.held = [model.bias, model.weight]
    return model, loss, pairs(4)


@case
def complex_layers() -> Any:
    """A linear layer of complex numbers with a bias, and a real layer behind it."""
    model = Model(
        lambda self, x: self.head(self.layer(x.to(torch.complex128)).abs()),
        layer=nn.Linear(4, 5, dtype=torch.complex128),
        head=nn.Linear(5, 3, dtype=torch.float64),
    )
    return model, cross_entropy, pairs(4)


@case
def backbone_without_gradients() -> Any:
    """A part of the forward pass under no_grad, and another detached."""

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.backbone(x)
        return self.head(h.tanh()) + self.side(self.head(h).detach())

    parts = {"backbone": nn.Linear(4, 5), "head": nn.Linear(5, 3), "side": nn.Linear(3, 3)}
    return Model(forward, **parts), cross_entropy, pairs(4)


@case
def adversarial_and_gradient_reversal() -> Any:
    """A Function that turns gradients around, as in DANN, between two heads."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.task(h) + self.domain(Reversed.apply(h, 0.5))

    return Model(forward, body=nn.Linear(4, 5), task=nn.Linear(5, 3), domain=nn.Linear(5, 3)), cross_entropy, pairs(4)


class Reversed(torch.autograd.Function):
    """A gradient times a negative number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        """Return the input."""
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient, turned around."""
        return -ctx.by * grad, None
