"""Tiny models, each with one trap for an engine that computes gradients of single samples.

A case is a function that returns ``(module, loss_fn, batch)`` in float64 with 6 samples, so that units of 1, 2 and 3
samples can be made of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]
ZOO: dict[str, Callable[[], Case]] = {}
NO_VMAP: set[str] = set()  # torch.func cannot transform these: auto must notice


def case(function: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(0)
        module, loss_fn, batch = function()
        return module.double(), loss_fn, batch

    ZOO[function.__name__] = seeded
    return seeded


def no_vmap(function: Callable[[], Case]) -> Callable[[], Case]:
    NO_VMAP.add(function.__name__)
    return case(function)


def cross_entropy(module: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(module(x), y)


def mean_square(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).square().mean()


def normal(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64)


def labels(classes: int = 3) -> Tensor:
    return torch.randint(classes, (6,))


class Model(nn.Module):
    """A module whose forward is the function it is given, with the submodules and parameters it is given."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


@case
def mlp() -> Case:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), cross_entropy, (normal(4), labels())


@case
def cnn() -> Case:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    return net, cross_entropy, (normal(2, 6, 6), labels())


@case
def residual_block_with_groupnorm() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.head((h + self.skip(x)).relu().mean((2, 3)))

    parts = {
        "conv1": nn.Conv2d(2, 4, 3, padding=1, bias=False),
        "norm1": nn.GroupNorm(2, 4),
        "conv2": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "norm2": nn.GroupNorm(2, 4),
        "skip": nn.Conv2d(2, 4, 1),
        "head": nn.Linear(4, 3),
    }
    return Model(forward, **parts), cross_entropy, (normal(2, 5, 5), labels())


@case
def grouped_dilated_convolutions() -> Case:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding="same")
    )
    return net, mean_square, normal(4, 5, 5)


@case
def transposed_and_1d_and_3d_convolutions() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        return self.flat(h.flatten(2)).mean((1, 2)) + self.deep(h.unsqueeze(2)).mean((1, 2, 3, 4))

    parts = {
        "up": nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1),
        "flat": nn.Conv1d(3, 2, 5),
        "deep": nn.Conv3d(3, 2, (1, 3, 3)),
    }
    return Model(forward, **parts), mean_square, normal(2, 3, 3)


@case
def batchnorm() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)
    )
    net[1].running_mean.normal_()
    net[5].running_var.uniform_(0.5, 2)
    return net, cross_entropy, (normal(2, 4, 4), labels())


@case
def batchnorm_in_eval_mode() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    net[1].running_mean.normal_()
    net[1].eval()
    return net, cross_entropy, (normal(4), labels())


@case
def instance_norm_that_tracks() -> Case:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.ReLU())
    return net, mean_square, normal(2, 4, 4)


@case
def dropout() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.drop(self.inner(x).relu()), 0.4))  # the functional one is on in eval mode too

    parts = {"inner": nn.Linear(4, 8), "drop": nn.Dropout(0.5), "out": nn.Linear(8, 3)}
    return Model(forward, **parts), cross_entropy, (normal(4), labels())


@case
def embedding() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))

    model = Model(forward, table=nn.Embedding(7, 4, padding_idx=0), head=nn.Linear(4, 3))
    return model, cross_entropy, (torch.randint(7, (6, 5)), labels())


@no_vmap
def sparse_embedding() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))

    model = Model(forward, table=nn.Embedding(7, 4, sparse=True), head=nn.Linear(4, 3))
    return model, cross_entropy, (torch.randint(7, (6, 5)), labels())


@case
def embedding_bag() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.embedding(x, self.bag.weight).sum(1))

    model = Model(forward, bag=nn.EmbeddingBag(7, 4, mode="sum"), head=nn.Linear(4, 3))
    return model, cross_entropy, (torch.randint(7, (6, 5)), labels())


@case
def embedding_bags() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.mean(x) + self.sum(x, per_sample_weights=x.double() / 7))

    bags = {"mean": nn.EmbeddingBag(7, 4, padding_idx=0), "sum": nn.EmbeddingBag(7, 4, mode="sum")}
    return Model(forward, **bags, head=nn.Linear(4, 3)), cross_entropy, (torch.randint(7, (6, 5)), labels())


@case
def bilinear() -> Case:
    model = Model(
        lambda self, x: self.head(self.pair(x[:, :4], x[:, 4:])), pair=nn.Bilinear(4, 2, 5), head=nn.Linear(5, 3)
    )
    return model, cross_entropy, (normal(6), labels())


@no_vmap  # in float64, for which there is no fused kernel
def lstm() -> Case:
    model = Model(
        lambda self, x: self.head(self.rnn(x)[0][:, -1]), rnn=nn.LSTM(3, 4, batch_first=True), head=nn.Linear(4, 3)
    )
    return model, cross_entropy, (normal(5, 3), labels())


@no_vmap  # in float64, for which there is no fused kernel
def bidirectional_gru_with_dropout() -> Case:
    rnn = nn.GRU(3, 4, num_layers=2, bidirectional=True, dropout=0.5)
    model = Model(lambda self, x: self.head(self.rnn(x.transpose(0, 1))[0].mean(0)), rnn=rnn, head=nn.Linear(8, 3))
    return model, cross_entropy, (normal(5, 3), labels())


@case
def transformer_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.3, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Model(lambda self, x: self.enc(x).mean(1), enc=encoder), cross_entropy, (normal(5, 4), labels())


@case
def attention_with_time_first() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].mean(0)

    return Model(forward, attention=nn.MultiheadAttention(4, 2, dropout=0.2)), cross_entropy, (normal(5, 4), labels())


@case
def scaled_dot_product_attention_with_dropout() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, None, 0.3, True).mean(1)

    return Model(forward, qkv=nn.Linear(4, 12)), cross_entropy, (normal(5, 4), labels())


@case
def position_embedding_without_batch() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head((self.tokens(x) + self.positions(torch.arange(x.shape[1]))).tanh()).mean(1)

    model = Model(forward, tokens=nn.Embedding(7, 4), positions=nn.Embedding(5, 4), head=nn.Linear(4, 3))
    return model, cross_entropy, (torch.randint(7, (6, 5)), labels())


@case
def tied_embedding_and_head() -> Case:
    model = Model(
        lambda self, x: self.head(self.table(x).tanh()), table=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False)
    )
    model.head.weight = model.table.weight

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(module(x[:, :-1]).transpose(1, 2), x[:, 1:])

    return model, loss, torch.randint(7, (6, 5))


@case
def weight_shared_by_two_layers() -> Case:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net, mean_square, normal(4)


@case
def unused_parameter() -> Case:
    model = Model(lambda self, x: self.used(x), used=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    return model, cross_entropy, (normal(4), labels())


@case
def frozen_parameters() -> Case:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net, cross_entropy, (normal(4), labels())


@case
def parameter_used_twice() -> Case:
    model = Model(lambda self, x: (x * self.scale).tanh() @ self.scale, scale=nn.Parameter(torch.randn(4)))
    return model, mean_square, normal(4)


@case
def module_called_twice() -> Case:
    model = Model(lambda self, x: self.layer(self.layer(x).tanh()), layer=nn.Linear(4, 4))
    return model, mean_square, normal(4)


@case
def functional_use_of_a_childs_weight() -> Case:
    model = Model(lambda self, x: F.linear(self.layer(x).tanh(), self.layer.weight), layer=nn.Linear(4, 4))
    return model, mean_square, normal(4)


@case
def free_parameters() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), 1, -1)
        return self.head(torch.cat([token, x * self.gain], 1).tanh()).mean(1) + self.offset

    parts = {
        "token": nn.Parameter(torch.randn(1, 1, 4)),
        "gain": nn.Parameter(torch.randn(4)),
        "offset": nn.Parameter(torch.randn(())),
        "head": nn.Linear(4, 3),
    }
    return Model(forward, **parts), cross_entropy, (normal(5, 4), labels())


@case
def weight_norm() -> Case:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    return net, cross_entropy, (normal(4), labels())


@case
def low_rank_adapter() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down)

    base = nn.Linear(4, 3, bias=False).requires_grad_(False)
    parts = {"base": base, "up": nn.Parameter(torch.randn(3, 2)), "down": nn.Parameter(torch.randn(2, 4))}
    return Model(forward, **parts), cross_entropy, (normal(4), labels())


@case
def two_inputs_and_a_dict_output() -> Case:
    def forward(self: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"logits": self.left(batch["x"]) + self.right(batch["more"]["z"]), "aux": self.right(batch["more"]["z"])}

    def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        out = module(batch)
        return F.cross_entropy(out["logits"], batch["y"]) + batch["weight"] * out["aux"].square().mean()

    model = Model(forward, left=nn.Linear(4, 3), right=nn.Linear(2, 3))
    weight = torch.tensor(0.5, dtype=torch.float64)
    return model, loss, {"x": normal(4), "more": {"z": normal(2)}, "y": labels(), "weight": weight, "name": "trap"}


@case
def list_output_of_scalars_to_grids() -> Case:
    model = Model(lambda self, x: [self.layer(x), self.layer(x).mean(1), x[:, None, None] * 1.0], layer=nn.Linear(4, 3))
    return model, lambda module, x: sum(out.square().mean() for out in module(x)[:2]), normal(4)


@no_vmap
def data_dependent_branch() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h.relu() if h.sum() > 0 else h.tanh()

    return Model(forward, layer=nn.Linear(4, 3)), cross_entropy, (normal(4), labels())


@no_vmap
def item_in_the_loss() -> Case:
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x).square().mean()
        return out / (1 + out.item())

    return nn.Linear(4, 3), loss, normal(4)


def checkpointed(use_reentrant: bool) -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(checkpoint(self.inner, h, use_reentrant=use_reentrant))

    inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
    model = Model(forward, first=nn.Linear(4, 5), inner=inner, last=nn.Linear(5, 3))
    return model, cross_entropy, (normal(4), labels())


@no_vmap
def checkpoint_without_reentry() -> Case:
    return checkpointed(use_reentrant=False)


@no_vmap
def checkpoint_with_reentry() -> Case:
    return checkpointed(use_reentrant=True)


class Cube(torch.autograd.Function):
    """A custom function of the old kind, without what torch.func needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


@no_vmap
def custom_autograd_function() -> Case:
    return Model(lambda self, x: Cube.apply(self.layer(x)), layer=nn.Linear(4, 3)), mean_square, normal(4)


@no_vmap
def counter_and_list_in_forward() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls.append(self.layer(x).mean().item())
        return self.layer(x)

    return Model(forward, layer=nn.Linear(4, 3), calls=[]), mean_square, normal(4)


@case
def buffer_written_in_forward() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.layer(x) * self.count

    model = Model(forward, layer=nn.Linear(4, 3))
    model.register_buffer("count", torch.tensor(1.0))
    return model, mean_square, normal(4)


@no_vmap
def frozen_parameter_written_in_forward() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.mul_(0.9).add_(self.layer.weight.mean() + x.mean())
        return self.layer(x) * self.teacher

    return Model(forward, layer=nn.Linear(4, 3), teacher=nn.Parameter(torch.ones(3), False)), mean_square, normal(4)


@case
def batch_written_in_forward() -> Case:
    return Model(lambda self, x: self.layer(x.mul_(2.0)), layer=nn.Linear(4, 3)), mean_square, normal(4)


@case
def complex_parameter() -> Case:
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    model = Model(lambda self, x: (x.to(torch.complex128) @ self.weight).abs(), weight=weight)
    model.double = lambda: model  # complex parameters have no double()
    return model, mean_square, normal(4)


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    source: str = "unit test"


@case
def dataclass_batch() -> Case:
    def loss(module: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(module(batch.x), batch.y)

    return nn.Linear(4, 3), loss, Pair(normal(4), labels())


@case
def contrastive_loss() -> Case:
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        z = F.normalize(module(x), dim=1)
        return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(x)))

    return nn.Linear(4, 3), loss, normal(4)


@case
def sum_of_the_losses() -> Case:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")

    return nn.Linear(4, 3), loss, (normal(4), labels())


@case
def mean_over_tokens_that_are_not_ignored() -> Case:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-100)

    targets = torch.randint(3, (6, 5)).masked_fill(torch.arange(5) > torch.tensor([4, 1, 2, 0, 3, 2])[:, None], -100)
    return nn.Linear(4, 3), loss, (normal(5, 4), targets)


@case
def mean_over_tokens_that_are_not_padding() -> Case:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, mask = batch
        return (module(x).square().mean(-1) * mask).sum() / mask.sum()

    mask = (torch.arange(5) <= torch.tensor([4, 1, 2, 0, 3, 2])[:, None]).double()
    return nn.Linear(4, 3), loss, (normal(5, 4), mask)


@case
def mean_weighted_by_class() -> Case:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))

    return nn.Linear(4, 3), loss, (normal(4), labels())


@case
def in_batch_negatives() -> Case:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        question, answer = batch
        scores = module.question(question) @ module.answer(answer).T
        return F.cross_entropy(scores, torch.arange(len(question)))

    model = Model(lambda self: None, question=nn.Linear(4, 3), answer=nn.Linear(5, 3))
    return model, loss, (normal(4), normal(5))


@case
def penalty_on_the_weights() -> Case:
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1]) + 0.1 * sum(p.square().sum() for p in module.parameters())

    return nn.Linear(4, 3), loss, (normal(4), labels())


@case
def batch_reordered_in_forward() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.last(self.inner(x[order]).tanh()[order.argsort()])

    model = Model(forward, inner=nn.Linear(4, 5), last=nn.Linear(5, 3))
    return model, cross_entropy, (normal(4), labels())


@no_vmap  # in float64, for which there is no fused kernel
def recurrent_layer_with_time_first() -> Case:
    model = Model(
        lambda self, x: self.head(self.rnn(x.transpose(0, 1))[0]).mean(0), rnn=nn.RNN(3, 4), head=nn.Linear(4, 3)
    )
    return model, cross_entropy, (normal(5, 3), labels())


@case
def as_many_steps_as_samples() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(h).transpose(0, 1).tanh()).mean(0)

    parts = {"tokens": nn.Embedding(7, 4), "positions": nn.Embedding(6, 4), "norm": nn.LayerNorm(4)}
    return Model(forward, **parts, head=nn.Linear(4, 3)), cross_entropy, (torch.randint(7, (6, 6)), labels())


@case
def transformer() -> Case:
    model = nn.Transformer(4, 2, 1, 1, dim_feedforward=8, dropout=0.1, batch_first=True)
    return Model(lambda self, x: self.t(x, x[:, :3]).mean(1), t=model), cross_entropy, (normal(5, 4), labels())


@case
def transformer_with_time_first() -> Case:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True", UserWarning)
        model = nn.Transformer(4, 2, 1, 1, dim_feedforward=8, dropout=0.1)

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.t(x, x[:3]).mean(0)

    return Model(forward, t=model), cross_entropy, (normal(5, 4), labels())


@case
def shared_embedding_and_position_bias() -> Case:
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
    return model, cross_entropy, (torch.randint(7, (6, 5)), torch.randint(7, (6,)))


@case
def inverted_bottleneck() -> Case:
    """As in MobileNet: a convolution of single channels between two of single pixels."""
    block = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.PReLU(6),
        nn.Conv2d(6, 4, 1),
        nn.Hardswish(),
    )
    return (
        nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        cross_entropy,
        (normal(3, 5, 5), labels()),
    )


@case
def deeply_nested() -> Case:
    net: nn.Module = nn.Linear(4, 4)
    for _ in range(3):
        net = nn.Sequential(net, nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 4))))
    return net, mean_square, normal(4)


@case
def norms_of_every_kind() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(self.rms(self.group(x).transpose(1, 2)))[..., :3].mean(1)

    parts = {"group": nn.GroupNorm(2, 4), "rms": nn.RMSNorm(4), "layer": nn.LayerNorm((5, 4))}
    return Model(forward, **parts), cross_entropy, (normal(4, 5), labels())


@case
def spectral_norm() -> Case:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)).eval()
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), cross_entropy, (normal(4), labels())


@case
def experts_in_one_tensor() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.einsum(
            "be,beo->bo", self.gate(x).softmax(-1), torch.einsum("bi,eio->beo", x, self.experts) + self.bias
        )

    parts = {
        "gate": nn.Linear(4, 2),
        "experts": nn.Parameter(torch.randn(2, 4, 3)),
        "bias": nn.Parameter(torch.randn(2, 3)),
    }
    return Model(forward, **parts), cross_entropy, (normal(4), labels())


@no_vmap
def experts_chosen_by_the_data() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for e, expert in enumerate((self.first, self.second)):
            out = out.index_add(0, (chosen == e).nonzero()[:, 0], expert(x[chosen == e]))
        return out + self.gate(x).mean(-1, keepdim=True)

    parts = {"gate": nn.Linear(4, 2), "first": nn.Linear(4, 3), "second": nn.Linear(4, 3)}
    return Model(forward, **parts), cross_entropy, (normal(4), labels())


def oracle(module: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, unit_size: int) -> dict[str, Tensor]:
    """Plain float64 loop: a fresh copy of the module for each unit, ``backward()``, every pair by hand."""
    gradients = []
    for i in range(6 // unit_size):
        twin = copy.deepcopy(module)
        for part in twin.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
            if isinstance(part, nn.RNNBase | nn.MultiheadAttention):
                part.dropout = 0.0
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and unit_size == 1:
                part.eval()
        loss_fn(twin, by_hand(batch, slice(i * unit_size, (i + 1) * unit_size))).backward()
        zero = torch.zeros((), dtype=torch.float64)
        gradients.append({n: zero if p.grad is None else p.grad.to_dense() for n, p in twin.named_parameters()})
    return {
        name: torch.stack([torch.stack([(g[name].conj() * h[name]).real.sum() for h in gradients]) for g in gradients])
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def by_hand(batch: Any, samples: slice) -> Any:
    """The samples of the zoo's batches, in the few shapes that they have."""
    if isinstance(batch, Tensor):
        return batch[samples].clone() if batch.dim() else batch
    if isinstance(batch, tuple):
        return tuple(by_hand(part, samples) for part in batch)
    if isinstance(batch, dict):
        return {key: by_hand(part, samples) for key, part in batch.items()}
    if isinstance(batch, Pair):
        return Pair(batch.x[samples], batch.y[samples])
    return batch
