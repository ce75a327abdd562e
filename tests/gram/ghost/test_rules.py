"""Rules: what PyTorch saves for them, and what takes their place where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gram.zoo.registry import Model, mean_square
from torch import Tensor, nn

from lightning_gradconf import gradient_gram
from lightning_gradconf.gram.ghost import nodes, rules
from lightning_gradconf.gram.ghost.factors import materialize
from lightning_gradconf.gram.ghost.placement import Placement


def input_gradient(m: Tensor) -> Tensor:
    x = torch.randn(2, 4, 4, requires_grad=True)
    return torch.autograd.grad(F.conv1d(x, m[:, :, None]).square().sum(), x, create_graph=True)[0]


def results() -> dict[str, tuple[Tensor, list[str]]]:
    """One result of every operation with a rule, and what the rule reads."""
    p, x, m = torch.randn(4, requires_grad=True), torch.randn(2, 4, 4), torch.randn(4, 4, requires_grad=True)
    b = torch.randn(2, 4, 4, requires_grad=True)
    index = torch.tensor([0, 1])
    size = ["stride", "padding", "dilation", "groups", "transposed", "output_padding", "input"]
    return {
        "AddBackward0": (x + p, ["alpha"]),
        "AddmmBackward0": (torch.addmm(p, x[0], m), ["mat1", "alpha", "beta"]),
        "BaddbmmBackward0": (torch.baddbmm(b, x, b), ["batch1", "alpha", "beta"]),
        "BmmBackward0": (torch.bmm(x, b), ["self"]),
        "ConvolutionBackward0": (F.conv1d(x, m[:, :, None]), size),
        "ConvolutionBackwardBackward0": (input_gradient(m), [*size[:-1], "grad_output"]),
        "DivBackward0": (p / x, ["self", "other"]),
        "EmbeddingBackward0": (F.embedding(index, m), ["indices", "padding_idx", "scale_grad_by_freq"]),
        "EmbeddingBagBackward0": (
            F.embedding_bag(index[None], m),
            ["indices", "offsets", "mode", "padding_idx", "scale_grad_by_freq", "per_sample_weights"],
        ),
        "ExpandBackward0": (p.expand(2, 4), []),
        "IndexBackward0": (m[index], ["indices"]),
        "IndexSelectBackward0": (m.index_select(0, index), ["dim", "index"]),
        "MmBackward0": (x[0] @ m, ["self"]),
        "MulBackward0": (x * p, ["self"]),
        "MvBackward0": (x[0] @ p, ["self"]),
        "NativeBatchNormBackward0": (
            F.batch_norm(x, torch.zeros(4), torch.ones(4), p),
            ["input", "training", "running_mean", "running_var", "eps", "result1", "result2"],
        ),
        "NativeGroupNormBackward0": (F.group_norm(x, 2, p), ["input", "group", "result1", "result2"]),
        "NativeLayerNormBackward0": (F.layer_norm(x, (4,), p), ["input", "result1", "result2"]),
        "PreluKernelBackward0": (F.prelu(x, p), ["self"]),
        "RepeatBackward0": (p.repeat(2), []),
        "SubBackward0": (x - p, ["alpha"]),
        "TrilinearBackward0": (
            torch._trilinear(x[0], b, x[0], [1, 3], [0], [1, 2], [2, 3]),
            ["i1", "i3", "expand2", "sumdim"],
        ),
        "WhereBackward0": (torch.where(x > 0, x, p), ["condition"]),
    }


@pytest.mark.parametrize("name", sorted(rules.RULES.keys() - {"FusedRmsNormBackward0", "MkldnnRnnLayerBackward0"}))
def test_pytorch_saves_what_the_rules_read(name):
    result, read = results()[name]
    node = result.grad_fn
    assert node.name() == name, f"torch {torch.__version__} calls {name} {node.name()}: rename its rule"
    for attribute in read:
        nodes.saved(node, attribute)  # says which attribute is missing


def test_the_fused_norm_of_other_devices():
    """There is no such node on a CPU, where the norm is composed of others."""
    x, scale, delta = (torch.randn(6, 4, 5).double() for _ in range(3))
    scale = x.square().mean(-1, keepdim=True).rsqrt()

    class Fused:
        _saved_input, _saved_result1 = x, scale

        def name(self) -> str:
            return "FusedRmsNormBackward0"

    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    want = [
        torch.autograd.grad(F.rms_norm(a, (5,), weight, eps=0.0), weight, d)[0] for a, d in zip(x, delta, strict=True)
    ]
    got = rules.factors_of(Fused(), 1, delta, (5,), Placement(6, deltas=(delta,)))
    torch.testing.assert_close(materialize(got), torch.stack(want))


@pytest.mark.parametrize("name", ["AddmmBackward0", "MulBackward0", "ExpandBackward0"])
def test_a_node_without_a_rule_is_differentiated_by_itself(name, monkeypatch):
    model = Model(
        lambda self, x: torch.cat([self.layer(x) * self.gain, self.token.expand(len(x), 2)], 1).tanh(),
        layer=nn.Linear(4, 3), gain=nn.Parameter(torch.randn(3)), token=nn.Parameter(torch.randn(2)),
    ).double()  # fmt: skip
    x = torch.randn(5, 4).double()
    want = gradient_gram(model, mean_square, x, engine="loop")
    monkeypatch.delitem(rules.RULES, name)
    for _ in range(2):  # with a proof, and without
        torch.testing.assert_close(gradient_gram(model, mean_square, x, engine="ghost"), want, rtol=1e-10, atol=1e-12)


def test_the_error_of_a_rule_is_no_missing_rule(monkeypatch):
    def broken(*_):
        raise IndexError("a bug")

    monkeypatch.setitem(rules.RULES, "AddmmBackward0", broken)
    with pytest.raises(IndexError, match="a bug"):
        gradient_gram(nn.Linear(4, 3), mean_square, torch.randn(5, 4), engine="ghost")


@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        lambda: nn.Conv2d(4, 6, 1),
        lambda: nn.Conv3d(4, 4, 2, groups=4),
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
    ],
)
def test_a_gradient_penalty_through_a_convolution_costs_no_pass_for_each_unit(layer, unit_size, monkeypatch):
    def penalty(module, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return g.square().sum()

    layer = layer().double()
    x = torch.randn(4, 4, *[5] * (layer.weight.dim() - 2), dtype=torch.float64)
    monkeypatch.setattr(rules, "_by_backward", lambda *_: pytest.fail("the node is called for each unit"))
    got = gradient_gram(layer, penalty, x, unit_size=unit_size, engine="ghost")
    torch.testing.assert_close(got, gradient_gram(layer, penalty, x, unit_size=unit_size, engine="loop"))


def test_a_convolution_that_is_called_by_names_is_measured():
    layer, x = nn.Conv1d(2, 3, 2).double(), torch.randn(4, 2, 5, dtype=torch.float64)

    def loss(module, x):
        return F.conv1d(input=x, weight=module.weight, bias=module.bias).square().sum()

    torch.testing.assert_close(*(gradient_gram(layer, loss, x, engine=engine) for engine in ("ghost", "loop")))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_casts_for_what_becomes_another_operation_under_vmap(kind):
    """A convolution and a PReLU behind a linear layer, which is cast."""

    def loss(module, x):
        with torch.autocast("cpu", kind):
            return module(x).float().square().mean()

    layers = nn.Linear(4, 24), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 5, 2), nn.PReLU(), nn.ConvTranspose2d(5, 4, 2)
    module, x = nn.Sequential(*layers), torch.randn(6, 4)
    got, want = (gradient_gram(module, loss, x, engine=engine) for engine in ("ghost", "loop"))
    scale = sum(gram.diagonal() for gram in want.values()).max()
    assert all(float((got[name] - want[name]).abs().max()) < 0.05 * scale for name in want)
