"""The ghost engine: what would be wrong without its checks, its rules, its memory, and models from elsewhere."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Model, cross_entropy, labels, mean_square, normal

from lightning_gradconf import gradient_gram
from lightning_gradconf.batches.units import split
from lightning_gradconf.gram import loop
from lightning_gradconf.gram.ghost import contraction, nodes, one_pass, rules, trust
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.ghost.contraction import Lookup, Patches, Rows, Workspace, gram_of_sum, whole
from lightning_gradconf.gram.ghost.memory import Memory
from lightning_gradconf.gram.ghost.one_pass import Task
from lightning_gradconf.gram.measurement_mode import MeasuredLayers
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.select import gram_of_units

Grams = dict[str, Tensor]


def error(got: Grams, want: Grams) -> float:
    """Largest error of the total Gram, in units of the norms of the two gradients."""
    assert got.keys() == want.keys()
    got_sum, want_sum = (sum(gram.double() for gram in grams.values()) for grams in (got, want))
    norms = want_sum.diagonal().sqrt()
    return float(((got_sum - want_sum).abs() / norms.outer(norms).clamp_min(1e-300)).max())


def measure(module: nn.Module, loss: Any, batch: Any, engine: str, unit_size: int = 1, memory: Any = None) -> Grams:
    target = objective(module, loss)
    return gram_of_units(target, split(batch, unit_size), unit_size, engine, memory=memory)[0]


def unchecked(module: nn.Module, loss: Any, batch: Any, unit_size: int = 1) -> Grams:
    """What one pass gives if its loss is taken for a mean over units, batch first, that nothing mixes."""
    units = split(batch, unit_size)
    with MeasuredLayers(running_statistics=unit_size == 1, dropout=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "equalise", lambda *_: None)
        patch.setattr(trust, "carries_between_units", lambda *_: None)
        patch.setattr(trust, "pairs_units", lambda *_: None)
        found = one_pass.measure(Task(objective(module, loss), units, unit_size), Memory())
    return {name: gram * len(units) ** 2 for name, gram in found.grams.items()}


TRAPS = {
    "sequence first": ("attention_with_time_first", 1),
    "time first in a recurrent layer": ("recurrent_layer_with_time_first", 1),
    "as many steps as samples": ("as_many_steps_as_samples", 1),
    "sum of losses": ("sum_of_the_losses", 1),
    "targets that are ignored": ("mean_over_tokens_that_are_not_ignored", 1),
    "mean over tokens that are not padding": ("mean_over_tokens_that_are_not_padding", 1),
    "weights of classes": ("mean_weighted_by_class", 1),
    "contrastive loss": ("contrastive_loss", 2),
    "negatives from the batch": ("in_batch_negatives", 2),
    "BatchNorm in training mode": ("batchnorm", 2),
    "batch reordered": ("batch_reordered_in_forward", 1),
    "value read in the loss": ("item_in_the_loss", 1),
    "branch on a computed value": ("data_dependent_branch", 1),
    "buffer that a frozen pass writes": ("frozen_parameter_written_in_forward", 1),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_unchecked_the_gram_is_wrong_and_auto_is_right(trap):
    name, unit_size = TRAPS[trap]
    want = measure(*ZOO[name](), "loop", unit_size)
    try:
        wrong = unchecked(*ZOO[name](), unit_size)
    except RuntimeError as refused:
        assert "branches on values" in str(refused)
    else:
        assert wrong.keys() != want.keys() or error(wrong, want) > 1e-4
    assert error(gradient_gram(*ZOO[name](), unit_size=unit_size), want) < 1e-12


def test_a_parameter_outside_any_module_is_found():
    def loss(module: Any, x: Tensor) -> Tensor:
        return (module(x) * module.temperature.exp()).square().mean()  # used by the loss alone

    model = nn.Linear(4, 3).double()
    model.temperature = nn.Parameter(torch.randn((), dtype=torch.float64))
    x = normal(4)
    assert error(measure(model, loss, x, "ghost"), measure(model, loss, x, "loop")) < 1e-12


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    return normal(5, 4), (torch.arange(5) < torch.tensor(lengths)[:, None]).double()


def masked_mean(module: nn.Module, batch: Any) -> Tensor:
    x, mask = batch
    return (module(x).square().mean(-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("later", [[5, 1, 5, 5, 5, 5], [5, 3, 4, 1, 2, 5], [2, 2, 2, 2, 2, 3]])
def test_padding_that_comes_later_is_noticed(later):
    model, memory = nn.Linear(4, 3).double(), Memory()
    for lengths in ([5] * 6, [5] * 6, later, [4] * 6):
        batch = padded(lengths)
        want = measure(model, masked_mean, batch, "loop")
        assert error(measure(model, masked_mean, batch, "auto", memory=memory), want) < 1e-12


@pytest.mark.parametrize("layout", ["batch first", "time first"])
def test_ignored_targets_that_come_later_are_noticed(layout):
    def loss(module: nn.Module, batch: Any) -> Tensor:
        out, y = module(batch[0]), batch[1]
        if layout == "time first":
            out, y = out.transpose(0, 1), y.T
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    model, memory = nn.Linear(4, 3).double(), Memory()
    for lengths in ([5] * 6, [5, 3, 4, 1, 2, 5], [5, 5, 5, 5, 5, 2]):
        x, mask = padded(lengths)
        batch = x, torch.randint(3, (6, 5)).masked_fill(mask == 0, -100)
        got = measure(model, loss, batch, "auto", memory=memory)
        assert error(got, measure(model, loss, batch, "loop")) < 1e-12


def test_a_factor_that_changes_is_noticed():
    factor = 1.0

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).square().mean() * factor

    model, memory = nn.Linear(4, 3).double(), Memory()
    for value in (1.0, 1.0, 0.5, 3.0):
        factor = value
        x = normal(4)
        assert error(measure(model, loss, x, "ghost", memory=memory), measure(model, loss, x, "loop")) < 1e-12


def test_a_gradient_that_was_zero_at_first_is_checked_when_it_comes():
    """A last layer of zeros hides how the layers below treat the batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh()).mean(0)  # time first

    model = Model(forward, first=nn.Linear(3, 4), last=nn.Linear(4, 3)).double()
    nn.init.zeros_(model.last.weight)
    memory, batch = Memory(), (normal(5, 3), labels())
    assert (
        error(
            measure(model, cross_entropy, batch, "ghost", memory=memory), measure(model, cross_entropy, batch, "loop")
        )
        < 1e-12
    )
    nn.init.normal_(model.last.weight)
    want = measure(model, cross_entropy, batch, "loop")
    got = measure(model, cross_entropy, batch, "ghost", memory=memory)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-14)
    batch = normal(5, 3), labels()
    want = measure(model, cross_entropy, batch, "loop")
    assert error(measure(model, cross_entropy, batch, "ghost", memory=memory), want) < 1e-12


@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("lengths", [(5, 6, 5, 12), (6, 5, 4, 24), (1, 5, 6)])
@pytest.mark.parametrize("time_first", [False, True])
def test_as_many_steps_as_samples_may_come_later(time_first, lengths, unit_size):
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.inner(x.transpose(0, 1) if time_first else x) + self.offset
        return self.last((self.norm(h) * self.gain).tanh()).mean(0 if time_first else 1)

    parts = {"inner": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "last": nn.Linear(4, 3)}
    free = {"gain": nn.Parameter(torch.randn(4)), "offset": nn.Parameter(torch.randn(4))}
    model, memory = Model(forward, **parts, **free).double(), Memory()
    for length in lengths:
        batch = normal(length, 4), labels()
        want = measure(model, cross_entropy, batch, "loop", unit_size)
        got = measure(model, cross_entropy, batch, "ghost", unit_size, memory)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-14)
    assert all(route.guess is not None for known in memory.known.values() for route in known.routes.values())


def test_units_that_had_the_same_gradient_at_first_are_told_apart_later():
    """Far from its targets, the L1 loss gives the last bias the same gradient wherever the units lie."""

    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.smooth_l1_loss(module(x.transpose(0, 1).contiguous()), y.transpose(0, 1))  # time first

    model, memory = nn.Linear(4, 3).double(), Memory()
    for distance in (100.0, 0.0, 0.0):
        batch = normal(5, 4), normal(5, 3) + distance
        want = measure(model, loss, batch, "loop")
        got = measure(model, loss, batch, "ghost", memory=memory)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-14)


def test_an_order_that_was_the_identity_at_first_is_noticed():
    model, loss, (x, y) = ZOO["batch_reordered_in_forward"]()
    memory = Memory()
    x = x[x[:, 0].argsort()]
    for batch in ((x, y), (x[[0, 2, 1, 3, 4, 5]], y)):
        got = measure(model, loss, batch, "auto", memory=memory)
        assert error(got, measure(model, loss, batch, "loop")) < 1e-12


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def of_each(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def flooding(module: nn.Module, batch: Any, at: float) -> Tensor:
    return (cross_entropy(module, batch) - at).abs() + at


def weights_that_are_learned(module: nn.Module, batch: Any, at: float) -> Tensor:
    with torch.no_grad():
        module.gate.fill_(at)
    weights = (module[0](batch[0])[:, 0] * module.gate).sigmoid()
    return (weights * of_each(module, batch)).sum() / weights.sum()


def samples_mixed_before(module: nn.Module, batch: Any, at: float) -> Tensor:
    return cross_entropy(module, ((1 - at) * batch[0] + at * batch[0].roll(1, 0), batch[1]))


def samples_mixed_after_a_while(module: nn.Module, batch: Any, at: float) -> Tensor:
    return samples_mixed_before(module, batch, at) if at else cross_entropy(module, batch)


def clipped_by_the_largest(module: nn.Module, batch: Any, at: float) -> Tensor:
    h = module[0](batch[0])
    return F.cross_entropy(module[2](h / h.detach().abs().amax().clamp_min(100 - 100 * at)), batch[1])


def gate_to_the_mean(module: nn.Module, batch: Any, at: float) -> Tensor:
    with torch.no_grad():
        module.gate.fill_(at)
    h = module[0](batch[0]).tanh()
    return F.cross_entropy(module[2](h + module.gate * (h.mean(0) - h)), batch[1])


LATER: dict[str, tuple[Callable[..., Tensor], float]] = {
    "flooding": (flooding, 1.1),
    "learned weights": (weights_that_are_learned, 3.0),
    "samples mixed": (samples_mixed_before, 0.4),
    "samples mixed after a while": (samples_mixed_after_a_while, 0.4),
    "statistic of the batch": (clipped_by_the_largest, 1.0),
    "gate": (gate_to_the_mean, 0.7),
}


@pytest.mark.parametrize("name", LATER)
def test_units_that_mix_only_later(name):
    """At first all gradients are right in one pass, and the nodes of the graph never change."""
    loss, later = LATER[name]
    torch.manual_seed(0)
    model, memory = two_layers(), Memory()
    if name in ("gate", "learned weights"):
        model.gate = nn.Parameter(torch.zeros((), dtype=torch.float64))
    for setting in (0.0, 0.0, later, later):
        batch = normal(4), labels()
        now = partial(loss, at=setting)
        want = measure(model, now, batch, "loop")
        got, engine = gram_of_units(objective(model, now), split(batch, 1), 1, memory=memory)
        assert error(got, want) < 1e-12
        assert (engine == "ghost") == (setting == 0)


def root_of_a_mean(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) - x[:, :3].sign()).square().mean() ** 0.5


def test_a_root_of_a_mean_is_noticed_when_units_differ():
    model, memory = nn.Linear(4, 3).double(), Memory()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for _ in range(2):
        x = normal(4)
        want = measure(model, root_of_a_mean, x, "loop")
        assert error(measure(model, root_of_a_mean, x, "auto", memory=memory), want) < 1e-12
        nn.init.normal_(model.weight)


def test_a_sum_over_targets_is_noticed_when_units_have_more_or_less_of_them():
    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(module(x).flatten(0, 1), y.flatten(), reduction="sum") / (y != -100).sum().clamp_min(1)

    model, memory = nn.Linear(4, 3).double(), Memory()
    for lengths in ([4] * 6, [5, 3, 4, 4, 3, 5]):  # as many in all
        x, mask = padded(lengths)
        batch = x, torch.randint(3, (6, 5)).masked_fill(mask == 0, -100)
        want = measure(model, loss, batch, "loop")
        assert error(measure(model, loss, batch, "auto", memory=memory), want) < 1e-12


LEFT_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "all but the worst": lambda losses: losses.max(),
    "all but the first": lambda losses: losses[0],
    "the better half": lambda losses: (losses * (losses.detach() >= losses.detach().median())).mean(),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_units_that_the_loss_of_all_leaves_out(name):
    model, batch = two_layers(), (normal(4), labels())

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return LEFT_OUT[name](of_each(module, batch))

    assert error(gradient_gram(model, loss, batch), measure(model, loss, batch, "loop")) < 1e-12


CUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "slice": lambda x, lengths: x[:, : lengths.max()],
    "narrow": lambda x, lengths: x.narrow(1, 0, lengths.max()),
    "arange": lambda x, lengths: x.index_select(1, torch.arange(lengths.max())),
    "list": lambda x, lengths: x[:, : max(lengths)],
}


@pytest.mark.parametrize("cut", CUTS)
def test_lengths_that_differ_later_are_noticed(cut):
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return module(CUTS[cut](batch["x"], batch["lengths"])).square().mean()

    model, memory = nn.Linear(4, 3).double(), Memory()
    for lengths in ([5] * 6, [5, 1, 3, 2, 4, 5]):
        batch = {"x": normal(5, 4), "lengths": lengths if cut == "list" else torch.tensor(lengths)}
        want = measure(model, loss, batch, "loop")
        assert error(measure(model, loss, batch, "auto", memory=memory), want) < 1e-12


PAIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "differences": lambda z: (0.1 - (z[:, None] - z).square().sum(-1)).relu().sum(),
    "products": lambda z: ((F.normalize(z, dim=1) @ F.normalize(z, dim=1).T) - 0.9999).relu().triu(1).sum(),
    "distances": lambda z: (0.1 - torch.cdist(z, z)).relu().sum(),
}


@pytest.mark.parametrize("width", [3, 6])
@pytest.mark.parametrize("pairs", PAIRS)
def test_a_penalty_on_pairs_that_are_close_is_noticed_before_any_is(pairs, width):
    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        out = module(x)
        return F.cross_entropy(out, y) + PAIRS[pairs](out)

    torch.manual_seed(0)
    model, batch = nn.Linear(4, width).double(), (normal(4) * torch.arange(1, 7)[:, None], labels())
    for i, j in combinations(range(6), 2):
        x, memory = batch[0].clone(), Memory()
        measure(model, loss, batch, "auto", memory=memory)
        x[i] = x[j] + 1e-3
        want = measure(model, loss, (x, batch[1]), "loop")
        assert error(measure(model, loss, (x, batch[1]), "auto", memory=memory), want) < 1e-12


def test_a_unit_whose_targets_are_all_ignored_has_no_gradient():
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())

    model, (x, mask) = nn.Linear(4, 3).double(), padded([5, 0, 3, 4, 1, 5])
    batch = x, torch.randint(3, (6, 5)).masked_fill(mask == 0, -100)
    got = measure(model, loss, batch, "ghost")
    assert error(got, measure(model, loss, batch, "loop")) < 1e-12


def test_what_is_computed_for_a_metric_costs_no_check(monkeypatch):
    def loss(module: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        out = module(x.flip(1).flatten(1))
        module.hits = (out.argmax(1) == y).double().mean()
        return F.cross_entropy(out, y)

    model, batch, memory = two_layers(), (normal(2, 2), labels()), Memory()
    measure(model, loss, batch, "ghost", memory=memory)
    monkeypatch.setattr(loop, "unit_gradients", None)
    measure(model, loss, batch, "ghost", memory=memory)


def test_frozen_parts_may_change_between_measurements():
    model, memory = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), Memory()
    batch = normal(4), labels()
    for trained in (True, False, True):
        model[0].requires_grad_(trained)
        want = measure(model, cross_entropy, batch, "loop")
        assert error(measure(model, cross_entropy, batch, "ghost", memory=memory), want) < 1e-12


def test_calibration_is_remembered(monkeypatch):
    model, loss, batch = ZOO["mlp"]()
    memory = Memory()
    measure(model, loss, batch, "ghost", memory=memory)
    monkeypatch.setattr(loop, "unit_gradients", None)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    got = measure(model, loss, batch, "ghost", memory=memory)
    monkeypatch.undo()
    assert error(got, measure(model, loss, batch, "loop")) < 1e-12


def test_a_bias_lies_where_the_weight_does():
    """Nearly all deltas are one, so that of the bias alone the first batch does not tell where the units lie."""
    model, memory = nn.Linear(3, 3).double(), Memory()
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x.transpose(0, 1).contiguous())
        return F.smooth_l1_loss(out, torch.ones_like(out), beta=0.5)

    for step in (0, 2):
        x = 10 + normal(4, 3)[:3]
        x[0, step] = 1.2
        got, want = (measure(model, loss, x, engine, memory=memory) for engine in ("ghost", "loop"))
        assert error(got, want) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "weight_norm", "recurrent_layer_with_time_first"])
def test_no_graph_outlives_its_measurement(name):
    model, loss, batch = ZOO[name]()
    memory = Memory()

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    measure(model, loss, batch, "ghost", memory=memory)
    before = tensors()
    for _ in range(3):
        measure(model, loss, batch, "ghost", memory=memory)
    assert tensors() == before


def test_a_refusal_is_remembered_and_said_once(caplog):
    model, loss, batch = ZOO["contrastive_loss"]()
    memory = Memory()
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        for _ in range(2):
            measure(model, loss, batch, "auto", 2, memory)
    assert memory.refused is not None
    assert sum("mixes units" in record.message for record in caplog.records) <= 1
    with pytest.raises(RuntimeError, match="mixes units"):
        measure(model, loss, batch, "ghost", 2, memory)


def test_only_the_parameters_without_a_rule_take_another_way(monkeypatch):
    model, loss, batch = ZOO["mlp"]()
    monkeypatch.delitem(rules.RULES, "AddmmBackward0")
    with pytest.raises(RuntimeError, match="there is no rule for AddmmBackward0"):
        measure(model, loss, batch, "ghost")
    model = Model(
        lambda self, x: self.c(self.a(x).tanh() * self.b),
        a=nn.Bilinear(1, 1, 1, bias=False),
        b=nn.Parameter(torch.randn(4)),
        c=nn.Linear(4, 3),
    )
    monkeypatch.undo()
    monkeypatch.delitem(rules.RULES, "TrilinearBackward0")
    model.function = lambda self, x: self.c(self.a(x[:, :1], x[:, 1:2]).tanh() * self.b)
    model = model.double()
    batch, asked = (normal(4), labels()), []
    others = ghost._by_others
    monkeypatch.setattr(ghost, "_by_others", lambda o, u: asked.append([*o.parameters]) or others(o, u))
    assert error(measure(model, cross_entropy, batch, "ghost"), measure(model, cross_entropy, batch, "loop")) < 1e-12
    assert asked == [["a.weight"]]


def test_a_parameter_without_a_rule_takes_nothing_from_those_it_shares_a_term_with(monkeypatch):
    def loss(module: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(module, batch) + 0.1 * sum(p.square().sum() for p in module.parameters())

    monkeypatch.delitem(rules.RULES, "MulBackward0")
    parts = {"inner": nn.Linear(4, 5), "gain": nn.Parameter(torch.randn(5)), "head": nn.Linear(5, 3)}
    model = Model(lambda self, x: self.head(self.inner(x).tanh() * self.gain), **parts).double()
    memory = Memory()
    for _ in range(2):
        batch = normal(4), labels()
        got = measure(model, loss, batch, "ghost", memory=memory)
        assert error(got, measure(model, loss, batch, "loop")) < 1e-12


@pytest.mark.parametrize("attribute", ["_saved_mat1", "_saved_stride", "_input_metadata"])
def test_an_attribute_that_pytorch_renamed_costs_speed_only(attribute, monkeypatch):
    def renamed(node: Any, name: str) -> Any:
        if name == attribute:
            raise NotImplementedError(f"{node.name()} has no attribute {name}")
        return getattr(node, name)

    monkeypatch.setattr(nodes, "_attribute", renamed)
    model, loss, batch = ZOO["cnn"]()
    assert error(measure(model, loss, batch, "auto"), measure(model, loss, batch, "loop")) < 1e-12


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
    got = rules.contribution(Fused(), 1, delta, (5,), rules.Units(6, 1))
    torch.testing.assert_close(whole(got), torch.stack(want))


def test_the_error_of_a_rule_is_no_missing_rule(monkeypatch):
    def broken(*_: Any) -> Any:
        raise IndexError("a bug")

    monkeypatch.setitem(rules.RULES, "AddmmBackward0", broken)
    with pytest.raises(IndexError, match="a bug"):
        measure(*ZOO["mlp"](), "ghost")


@given(
    dims=st.integers(1, 3),
    geometry=st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
    samples=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_form_of_every_convolution(dims, geometry, groups, transposed, samples, seed):
    torch.manual_seed(seed)
    kernel, stride, padding, dilation = geometry
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    layer = kind(4, 8, kernel, stride, padding, groups=groups, dilation=dilation).double()
    x = torch.randn(3 * samples, 4, *([6, 5, 5][:dims]), dtype=torch.float64)
    weight, forms = layer.weight, []
    out = layer(x)
    if out.numel() == 0:
        return
    delta = torch.randn_like(out)
    want = [
        torch.autograd.grad(layer(a), weight, d)[0].flatten()
        for a, d in zip(x.split(samples), delta.split(samples), strict=True)
    ]
    gram = torch.stack(want) @ torch.stack(want).T
    spatial = [[value] * dims for value in (stride, padding, dilation)]
    part = Patches(x, delta, weight.detach(), 3, *spatial, transposed, [0] * dims, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "cheapest", lambda work, key, forms_: forms.append(forms_) or gram)
        part.gram(Workspace())
    assert set(forms[0]) >= {"unit"} | ({"taps", "shifted", "folded"} if groups == 1 and not transposed else set())
    for name, (_, form) in forms[0].items():
        torch.testing.assert_close(form(), gram, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(whole(part), torch.stack(want))


@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_both_forms_of_rows(groups, n, rows, p, q):
    part = Rows(torch.randn(groups, n, rows, p).double(), torch.randn(groups, n, rows, q).double())
    gradients = torch.einsum("gnrp,gnrq->ngpq", part.left, part.right).flatten(1)
    want = gradients @ gradients.T
    torch.testing.assert_close(part._pairs(Workspace()), want)
    torch.testing.assert_close(gram_of_sum([part], Workspace()), want)
    torch.testing.assert_close(whole(part), gradients)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows_that_were_looked_up(n, rows, words, q, seed):
    torch.manual_seed(seed)
    part = Lookup(torch.randint(words, (n, rows)), torch.randn(n, rows, q).double(), words)
    table = torch.zeros(n, words, q).double()
    for unit in range(n):
        for row in range(rows):
            table[unit, part.index[unit, row]] += part.values[unit, row]
    want = table.flatten(1) @ table.flatten(1).T
    torch.testing.assert_close(whole(part), table.flatten(1))
    torch.testing.assert_close(part.gram(Workspace()), want)
    with pytest.MonkeyPatch.context() as patch:  # the way for words that most units share
        patch.setattr(contraction, "_BLOCK", n * words)  # a few columns at a time
        patch.setattr(Lookup, "_is_sparse", lambda *_: False)
        torch.testing.assert_close(part.gram(Workspace()), want)
        patch.setattr(Lookup, "_is_sparse", lambda *_: True)
        torch.testing.assert_close(part.gram(Workspace()), want)


def test_a_form_that_is_far_slower_is_timed_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(contraction.time, "perf_counter", lambda: now[0])
    ran: list[str] = []

    def form(name: str, *seconds: float) -> tuple[float, Callable[[], Tensor]]:
        def run() -> Tensor:
            now[0] += seconds[ran.count(name)]
            ran.append(name)
            return torch.zeros(2, 2)

        return 1e9, run

    work = Workspace()
    forms = {"slow": form("slow", 0.5, 0.0), "new": form("new", 0.012, 0.001), "fast": form("fast", 0.004, 0.003, 0.0)}
    contraction.cheapest(work, "shape", forms)
    assert ran == ["slow", "new", "fast", "new", "fast"]
    assert work.fastest == {"shape": "new"}


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "lstm": lambda: (nn.LSTM(3, 4, batch_first=True), torch.randn(6, 5, 3)),
    "stacked bidirectional lstm": lambda: (nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(6, 5, 3)),
    "lstm without biases": lambda: (nn.LSTM(3, 4, bias=False, batch_first=True), torch.randn(6, 5, 3)),
    "lstm with as many steps as samples": lambda: (nn.LSTM(3, 4, batch_first=True), torch.randn(6, 6, 3)),
    "gru": lambda: (nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), torch.randn(6, 5, 3)),
}


@pytest.mark.parametrize("state", [False, True], ids=["outputs", "last state"])
@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers_in_float32(name, state, monkeypatch):
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    first = layer.batch_first

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        out, last = module(x if first else x.transpose(0, 1))
        if state:
            return (last[0] if isinstance(last, tuple) else last).transpose(0, 1).square().mean()
        return out.square().mean()

    asked: list[Any] = []
    monkeypatch.setattr(ghost, "_by_others", lambda o, u: asked.append(o))
    got = measure(layer, loss, x, "ghost")
    assert not asked
    assert error(got, measure(layer.double(), loss, x.double(), "loop")) < 1e-5


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("states", [False, True], ids=["outputs", "states"])
def test_below_a_fused_lstm_gradients_come_from_its_gates(states, unit_size, monkeypatch):
    """Its first states, its input and what goes around it all have parameters below."""
    torch.manual_seed(0)

    def forward(self: Any, x: Tensor) -> Tensor:
        first = self.first(x.mean(1)).unflatten(1, (8, 4)).transpose(0, 1).contiguous()
        below = self.below(x)
        out, (state, cell) = self.rnn(below, (first[:4], 3 * first[4:]))
        seen = torch.cat([state, cell]).transpose(0, 1) if states else out
        return torch.cat([seen.flatten(1), below.flatten(1)], 1)

    rnn = nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    model, memory = Model(forward, first=nn.Linear(3, 32), below=nn.Linear(3, 3), rnn=rnn), Memory()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    x = torch.randn(6, 5, 3)
    asked: list[Any] = []
    monkeypatch.setattr(ghost, "_by_others", lambda o, u: asked.append(o))
    got = measure(model, loss, x, "ghost", unit_size, memory)
    assert not asked
    with Operations() as ran:
        one_pass.measure(Task(objective(model, loss), split(x, unit_size), unit_size), memory)
    assert "aten::mkldnn_rnn_layer" in ran.names
    assert "aten::mkldnn_rnn_layer_backward" not in ran.names
    want = measure(model.double(), loss, x.double(), "loop", unit_size)
    for name in want:
        assert error({name: got[name]}, {name: want[name]}) < 1e-5, name


def test_weight_and_bias_share_the_products_of_their_deltas():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 100))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    x = torch.randn(8, 300)
    with Operations() as ran:
        one_pass.measure(Task(objective(model, loss), split(x, 1), 1), Memory())
    assert ran.names.count("aten::mm") == 1 + 2 * 2  # a delta, and the products of each layer's deltas and inputs


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual_block_with_groupnorm", "transformer_encoder", "transformer"])
def test_in_float32_within_its_precision(name):
    model, loss, batch = ZOO[name]()
    want = measure(model, loss, batch, "loop")
    x, *rest = batch if isinstance(batch, tuple) else (batch,)
    batch = (x.float(), *rest) if rest else x.float()
    assert error(measure(model.float(), loss, batch, "ghost"), want) < 1e-5


def residual_block(channels: int, out: int, stride: int) -> nn.Module:
    return Model(
        lambda self, x: (self.body(x) + self.skip(x)).relu(),
        body=nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out),
        ),
        skip=nn.Conv2d(channels, out, 1, stride, bias=False),
    )  # fmt: skip


@pytest.mark.slow
def test_a_resnet_in_float32_is_as_exact_as_the_loop():
    """ResNet-18 of half its width: so deep that the loop itself is far from float64."""
    torch.manual_seed(0)
    widths = [32, 32, 32, 64, 64, 128, 128, 256, 256]
    blocks = (residual_block(a, b, 1 + (b > a)) for a, b in pairwise(widths))
    net = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), *blocks)
    model = Model(lambda self, x: self.head(self.net(x).mean((2, 3))), net=net, head=nn.Linear(256, 10))
    batch = torch.randn(6, 3, 32, 32), torch.randint(10, (6,))
    got, own = (measure(model, cross_entropy, batch, engine) for engine in ("ghost", "loop"))
    want = measure(model.double(), cross_entropy, (batch[0].double(), batch[1]), "loop")
    assert error(got, want) < 2 * error(own, want)


def test_under_autocast():
    model, _, (x, y) = ZOO["mlp"]()

    def loss(module: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(module, batch)

    batch = x.float(), y
    got = measure(model.float(), loss, batch, "ghost")
    assert all(gram.dtype == torch.float32 for gram in got.values())
    assert error(got, measure(model, loss, batch, "loop")) < 2e-2


def test_random_forward_passes_take_another_way():
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))

    model = Model(forward, layer=nn.Linear(4, 3)).double()
    with pytest.raises(RuntimeError, match="mixes units"):
        measure(model, mean_square, normal(4), "ghost")


def test_gradients_that_are_not_finite_are_left_to_the_loop():
    model, loss, (x, y) = ZOO["mlp"]()
    memory = Memory()
    measure(model, loss, (x, y), "ghost", memory=memory)
    x[2] = float("nan")
    got = sum(measure(model, loss, (x, y), "auto", memory=memory).values())
    want = sum(measure(model, loss, (x, y), "loop").values())
    torch.testing.assert_close(got, want, equal_nan=True)
    assert memory.refused is None


def hugging_face() -> dict[str, Callable[[Any], tuple[Any, Callable[..., Any]]]]:
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
    }
    t5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}

    def tokens(n: int = 6) -> Any:
        ids = torch.randint(3, 40, (n, 7))
        return {"input_ids": ids, "labels": ids.clone()}

    def classes() -> Any:
        return {"input_ids": torch.randint(3, 40, (6, 7)), "labels": torch.randint(2, (6,))}

    return {
        "gpt2": lambda t: (t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)), tokens),
        "bert": lambda t: (t.BertForSequenceClassification(t.BertConfig(**small)), classes),
        "vit": lambda t: (
            t.ViTForImageClassification(t.ViTConfig(**small, image_size=8, patch_size=4, num_labels=3)),
            lambda: {"pixel_values": torch.randn(6, 3, 8, 8, dtype=torch.float64), "labels": torch.randint(3, (6,))},
        ),
        "t5": lambda t: (
            t.T5ForConditionalGeneration(t.T5Config(**t5, decoder_start_token_id=0)),
            tokens,
        ),
        "llama": lambda t: (t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=1)), tokens),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "t5", "llama"])
def test_hugging_face(name, padding):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, data = hugging_face()[name](transformers)
    batch = data()
    if padding and "input_ids" in batch:
        mask = (torch.arange(7) < torch.tensor([7, 4, 5, 7, 2, 6])[:, None]).long()
        batch["attention_mask"] = mask
        if batch["labels"].dim() == 2:
            batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    model = model.double().train()

    def loss(module: Any, batch: Any) -> Tensor:
        return module(**batch).loss

    memory = Memory()
    want = measure(model, loss, batch, "loop")
    for _ in range(2):
        # These compute norms or the loss in float32, whatever the model's precision.
        assert error(measure(model, loss, batch, "ghost", memory=memory), want) < 1e-6
    assert all(route.guess is not None for known in memory.known.values() for route in known.routes.values())
