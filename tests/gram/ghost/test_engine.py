"""The ghost engine over several measurements: what it proves, remembers, refuses and releases."""

from __future__ import annotations

import copy
import gc
import logging
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gram.zoo import first
from gram.zoo.registry import Model, cross_entropy, mean_square
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.findings import findings_of
from lightning_gradconf.gram.ghost import checkpoints, engine, factors, functorch, nodes, placement, rules
from lightning_gradconf.gram.ghost.factors import OuterProducts, gram_of_sum
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import _say_once, gram_of_units

Grams = dict[str, Tensor]


def measure(module: nn.Module, loss: Any, batch: Any, name: str = "ghost", unit_size: int = 1) -> Grams:
    ranks = Ranks(torch.device("cpu"))
    return gram_of_units(ranks, objective(module, loss), split(batch, unit_size), unit_size, name)[0]


def used(module: nn.Module, loss: Any, batch: Any, unit_size: int = 1) -> str:
    ranks = Ranks(torch.device("cpu"))
    return gram_of_units(ranks, objective(module, loss), split(batch, unit_size), unit_size)[1]


def error(got: Grams, want: Grams) -> float:
    """Largest error of the total Gram, in units of the norms of the two gradients."""
    assert got.keys() == want.keys()
    got_sum, want_sum = (sum(gram.double() for gram in grams.values()) for grams in (got, want))
    norms = want_sum.diagonal().sqrt()
    return float(((got_sum - want_sum).abs() / norms.outer(norms).clamp_min(1e-300)).max())


# ---- the proof -------------------------------------------------------------------------------------------------------


def wrong_factor(node: Any, slot: int, delta: Tensor, shape: Any, at: Any) -> Any:
    part = RIGHT(node, slot, delta, shape, at)
    return OuterProducts(part.left, part.right * 1.01) if isinstance(part, OuterProducts) else part


def test_a_contraction_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares the factors; that the inner products are theirs is compared too."""
    module, batch = nn.Linear(3, 2), torch.randn(4, 3)
    right = measure(module, mean_square, batch, "loop")
    monkeypatch.setattr("lightning_gradconf.gram.ghost.factors._gram_of_sum", lambda *args: 1.01 * GRAM_OF_SUM(*args))
    with pytest.raises(ArithmeticError, match="are not those of its gradients"):
        measure(module, mean_square, batch)
    assert error(measure(module, mean_square, batch, "auto"), right) < 1e-5


@pytest.mark.parametrize("scale", [1e-18, 1e-19, 1e-20, 1e-21, 1e-22, 1e-24, 1e-30])
def test_gradients_whose_squares_vanish_are_no_error(scale: float) -> None:
    """As of the first layers of a deep network: their inner products are below what float32 can hold."""
    module, batch = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 2)), torch.randn(6, 4)
    assert used(module, lambda module, x: scale * module(x).square().mean(), batch, unit_size=2) == "ghost"


def test_millions_of_entries_are_added_up_as_they_should() -> None:
    """PyTorch's norm of 2^24 entries is wrong by 1e-3 on a CPU."""
    module, batch = nn.Linear(4096, 4096, bias=False), torch.randn(1, 4096) + 0.05 * torch.randn(2, 4096)
    assert used(module, mean_square, batch) == "ghost"


def difference(module: nn.Module, x: Tensor) -> Tensor:
    return 1e6 * (module(x + 1e-4) - module(x)).square().mean()


def test_products_of_what_cancels_in_the_gradients_are_not_believed() -> None:
    """The gradients of two uses are 1e4 times their difference, so their products are 1e8 times what is left."""
    module, batch = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 5)), torch.randn(8, 20)
    with pytest.raises(ArithmeticError, match="lost in rounding"):
        measure(module, difference, batch)
    want = measure(copy.deepcopy(module).double(), difference, batch.double(), "loop")
    assert error(measure(module, difference, batch, "auto"), want) < 0.1


def wrong_order(node: Any, slot: int, delta: Tensor, shape: Any, at: Any) -> Any:
    part = RIGHT(node, slot, delta, shape, at)
    return OuterProducts(part.left.roll(1, 1), part.right.roll(1, 1)) if isinstance(part, OuterProducts) else part


RIGHT = rules.RULES["AddmmBackward0"]
GRAM_OF_SUM = factors._gram_of_sum


@pytest.mark.parametrize("wrong", [wrong_factor, wrong_order])
def test_a_wrong_rule_is_noticed_said_once_and_measured_by_the_others(wrong, monkeypatch, caplog):
    monkeypatch.setitem(rules.RULES, "AddmmBackward0", wrong)
    model, loss, batch = first("mlp")
    with pytest.raises(RuntimeError, match=r"weighted sum of gradients is wrong.* of '\d\.weight' by"):
        measure(model, loss, batch)
    model, loss, batch = first("mlp")
    want = measure(model, loss, batch, "loop")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lightning_gradconf"):
        for _ in range(3):
            assert error(measure(model, loss, batch, "auto"), want) < 1e-12
    (record,) = caplog.records
    assert "torch.func is not used for Sequential" in record.getMessage()


def test_the_sum_of_all_gradients_would_prove_nothing(monkeypatch):
    """Units in a wrong order have the same sum, so weights must differ."""
    monkeypatch.setitem(rules.RULES, "AddmmBackward0", wrong_order)
    monkeypatch.setattr(engine, "random_weights", lambda like, seed: torch.ones_like(like))
    monkeypatch.setattr(engine, "disagreement", lambda *_: {})
    model, loss, batch = first("mlp")
    assert error(measure(model, loss, batch), measure(model, loss, batch, "loop")) > 0.1


def test_a_unit_alone_is_compared_with_what_vmap_makes_of_it(monkeypatch):
    """A Function that vmap would get wrong shares its fault with the weighted sum, but not with plain autograd."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient

        @staticmethod
        def vmap(info, in_dims, x):
            return Wrong.apply(x) * 2, in_dims[0]

    model = Model(lambda self, x: Wrong.apply(self.layer(x)), layer=nn.Linear(4, 3)).double()
    x = torch.randn(5, 4).double()
    with pytest.raises(RuntimeError, match="a unit by itself has another gradient"):
        measure(model, mean_square, x)
    assert error(measure(model, mean_square, x, "auto"), measure(model, mean_square, x, "loop")) < 1e-12


def test_proofs_come_at_powers_of_two_and_with_new_graphs(monkeypatch):
    proofs: list[int] = []
    proved = engine._Measurement._proved
    monkeypatch.setattr(engine._Measurement, "_proved", lambda self, *a: proofs.append(number) or proved(self, *a))
    model, loss, (x, y) = first("mlp")
    for number in range(1, 10):
        some = slice(0, 5 if number == 7 else 6)
        measure(model, loss, (x[some], y[some]))
    assert proofs == [1, 2, 4, 7, 8]


def test_a_gradient_that_was_zero_is_proved_when_it_comes(monkeypatch):
    """Units are looked for in the wrong place until a proof says otherwise."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.inner(x).transpose(0, 1)  # time first
        return (self.outer(h) * self.scale).mean(0)

    parts = {"inner": nn.Linear(4, 5), "outer": nn.Linear(5, 3)}
    model = Model(forward, **parts, scale=torch.zeros(())).double()
    x = torch.randn(6, 6, 4).double()
    for scale in (0.0, 0.0, 0.0, 1.0, 1.0):
        model.scale = torch.tensor(scale).double()
        got, want = (measure(model, mean_square, x, name) for name in ("ghost", "loop"))
        assert error(got, want) < 1e-12


def test_places_that_the_data_do_not_tell_apart_cost_no_proof_each_time(monkeypatch):
    """With 32 units of 65 tokens, of which the first alone counts, two places fit: row 65 i is in unit i for both."""
    proofs: list[int] = []
    proved = engine._Measurement._proved
    monkeypatch.setattr(engine._Measurement, "_proved", lambda self, *a: proofs.append(1) or proved(self, *a))
    model = Model(lambda self, x: self.layer(x)[:, 0], layer=nn.Linear(4, 3)).double()
    x = torch.randn(32, 65, 4).double()
    for _ in range(7):
        assert error(measure(model, mean_square, x), measure(model, mean_square, x, "loop")) < 1e-12
    assert len(proofs) == 3

    everything = Model(lambda self, x: self.layer(x).mean(1) + self.layer(x)[:, 0], layer=nn.Linear(4, 3)).double()
    assert error(measure(everything, mean_square, x), measure(everything, mean_square, x, "loop")) < 1e-12


def test_units_that_are_innermost_are_found():
    """A user's own vmap-like layout: units end up behind time in a matrix product."""
    model = Model(lambda self, x: torch.einsum("nti,oi->tno", x, self.weight), weight=nn.Parameter(torch.randn(3, 4)))
    model.double()
    x = torch.randn(6, 6, 4).double()
    for _ in range(2):
        assert error(measure(model, mean_square, x), measure(model, mean_square, x, "loop")) < 1e-12


def test_results_without_units_are_recognised_whatever_their_sizes():
    """Positions as many as units, looked up and multiplied before they meet the data."""

    def forward(self: Any, x: Tensor) -> Tensor:
        positions = self.positions(torch.arange(6)) * torch.linspace(0, 1, 6).double()[:, None]
        return self.head((x + positions).tanh())

    model = Model(forward, positions=nn.Embedding(6, 4), head=nn.Linear(4, 3)).double()
    x = torch.randn(6, 6, 4).double()
    for _ in range(2):
        assert error(measure(model, mean_square, x), measure(model, mean_square, x, "loop")) < 1e-12


# ---- units that go different ways ------------------------------------------------------------------------------------


def branches(ways: int) -> tuple[nn.Module, Callable[..., Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.layer(x)
        return h * (1 + int(x[:, 0].max() % ways))

    x = torch.randn(9, 4).double()
    x[:, 0] = torch.arange(9).double()
    return Model(forward, layer=nn.Linear(4, 3)).double(), mean_square, x


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_units_that_go_a_few_ways_are_measured_in_a_pass_each(ways):
    for _ in range(2):
        model, loss, x = branches(ways)
        assert error(measure(model, loss, x), measure(model, loss, x, "loop")) < 1e-12


def test_units_that_all_go_different_ways_are_left_to_the_loop(caplog):
    model, loss, x = branches(9)
    _say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        assert used(model, loss, x) == "loop"
    assert "more than 4 different ways" in caplog.text


def test_a_cache_outside_of_the_module_holds_no_tensor_of_vmap():
    @cache
    def causal(length: int) -> Tensor:
        mask = torch.zeros(length, length)
        mask[torch.ones(length, length).triu(1).bool()] = -torch.inf
        return mask

    def loss(module: nn.Module, batch: Any) -> Tensor:
        tokens, length = batch[0], int(batch[1].max())
        shifted = torch.zeros(len(tokens), length, dtype=torch.long)
        shifted[:, 1:] = tokens[:, : length - 1]  # units are written here, and never into the mask
        h = module.embedding(shifted)
        h = (h @ h.transpose(1, 2) + causal(length)).softmax(-1) @ h
        return F.cross_entropy(module.head(h).transpose(1, 2), tokens[:, :length])

    torch.manual_seed(0)
    module = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    tokens, lengths = torch.randint(0, 9, (6, 6)), torch.tensor([6, 6, 5, 5, 4, 4])
    for _ in range(2):  # the lengths of a measurement are the values that Python reads
        assert used(module, loss, (tokens, lengths)) == "ghost"
        for i in (0, 2, 4):
            loss(module, (tokens[i : i + 2], lengths[i : i + 2])).backward()
        lengths = lengths - 1
    assert error(measure(module, loss, (tokens, lengths)), measure(module, loss, (tokens, lengths), "loop")) < 1e-5


def test_tensors_that_a_class_keeps_are_ordinary_ones_afterwards():
    class Net(nn.Module):
        kept: list[Tensor] = []  # noqa: RUF012  # of the class, so that no measurement puts it back

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

    def loss(module: Any, x: Tensor) -> Tensor:
        out = module.layer(x)
        found = out.square().mean()
        module.kept += [found.detach(), found, out.argmax(1)[0]]
        return found

    torch.manual_seed(0)
    module, x = Net(), torch.randn(5, 4)
    assert used(module, loss, x) == "ghost"
    detached, whole, chosen = Net.kept[3:6]  # after the three of a unit alone
    want = module.layer(x[:1])
    torch.testing.assert_close(torch.stack([detached, whole]), want.square().mean().detach().expand(2))
    assert torch.stack([chosen]).tolist() == want.argmax(1).tolist()


def test_units_of_two_shapes_share_two_passes():
    model = Model(lambda self, x: self.layer(x).mean(1), layer=nn.Linear(4, 3)).double()
    units = [torch.randn(1, length, 4).double() for length in (3, 5, 3, 5, 5)]
    ranks, target = Ranks(torch.device("cpu")), objective(model, mean_square)
    got, name = gram_of_units(ranks, target, units, 1)
    assert name == "ghost"
    assert error(got, gram_of_units(ranks, target, units, 1, "loop")[0]) < 1e-12


@pytest.mark.parametrize("ways", [1, 3])
def test_factors_are_in_the_order_of_the_units(ways):
    model, loss, x = branches(ways)
    want = measure(model, loss, x, "loop")
    target, mode = objective(model, loss), MeasurementMode(running_statistics=True, dropout=False)
    for _ in range(2):
        factors = engine.unit_factors(target, split(x, 1), mode, findings_of(model, loss))
        assert list(factors) == list(target.parameters), "in one order on all ranks"
        grams = {name: gram_of_sum(parts, findings_of(model, loss).workspace) for name, parts in factors.items()}
        assert error(grams, want) < 1e-12


def test_a_number_that_is_only_stored_costs_nothing():
    seen: list[Any] = []

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        value = module(x).square().mean()
        seen.append(value.item())
        seen.append(f"{value.item():.3f} {value:.3f} {value}")
        seen.append(round(2 * value.item() + 1, 3))
        return value

    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    assert used(model, loss, x) == "ghost"
    assert isinstance(seen[1], str)


def test_a_number_that_is_computed_with_is_that_of_each_unit():
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        value = module(x).square().mean()
        return value / (1 + value.item()) + value * (value.item() ** 2 - 3.0)

    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    assert used(model, loss, x) == "ghost"
    assert error(measure(model, loss, x), measure(model, loss, x, "loop")) < 1e-12


def test_a_number_that_is_compared_sends_units_different_ways():
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        value = module(x).square().mean()
        return value if value.item() > 0.5 else 2 * value

    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    assert used(model, loss, x) == "ghost"
    assert error(measure(model, loss, x), measure(model, loss, x, "loop")) < 1e-12


# ---- what it keeps, and what it gives up -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "weight_norm", "recurrent_layer_with_time_first"])
def test_no_graph_outlives_its_measurement(name):
    model, loss, batch = first(name)

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    for _ in range(4):
        measure(model, loss, batch)
    before = tensors()
    for _ in range(3):
        measure(model, loss, batch)
    assert tensors() == before


def test_findings_go_with_their_module():
    model, loss, batch = first("mlp")
    measure(model, loss, batch)
    assert findings_of(model, loss).graphs
    reference = __import__("weakref").ref(findings_of(model, loss))
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("attribute", ["_saved_mat1", "_saved_stride", "_input_metadata"])
def test_an_attribute_that_pytorch_renamed_costs_speed_only(attribute, monkeypatch):
    def renamed(node: Any, name: str) -> Any:
        if name == attribute:
            raise NotImplementedError(f"{node.name()} has no attribute {name}")
        return getattr(node, name)

    monkeypatch.setattr(nodes, "_attribute", renamed)
    model, loss, batch = first("cnn")
    assert error(measure(model, loss, batch, "auto"), measure(model, loss, batch, "loop")) < 1e-12


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="does not tell which hooks a saved tensor has")
def test_a_release_that_renames_what_runs_around_checkpoints(monkeypatch):
    """Without its name, a checkpoint would run the module itself again in the backward pass, and count its batches."""
    monkeypatch.setattr(checkpoints, "_GENERATORS", ())
    norm = nn.BatchNorm1d(4)

    def loss(module, x):
        return checkpoint(module, x, use_reentrant=False).square().mean()

    with pytest.raises(NotImplementedError, match="other names for what runs around a checkpoint"):
        measure(nn.Sequential(nn.Linear(4, 4), norm), loss, torch.randn(6, 4), unit_size=2)
    assert norm.num_batches_tracked == 0


def test_functorch_has_the_names_that_are_read():
    assert functorch.MISSING is None, functorch.MISSING


def test_without_them_the_other_engines_measure(monkeypatch, caplog):
    monkeypatch.setattr(functorch, "MISSING", "torch 9 has renamed what the ghost engine reads of functorch")
    _say_once.cache_clear()
    model, loss, batch = first("mlp")
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        assert used(model, loss, batch) == "vmap"
    assert "torch 9 has renamed" in caplog.text


def test_gradients_that_are_not_finite_prove_nothing_and_are_no_refusal():
    model, loss, (x, y) = first("mlp")
    broken = x.clone()
    broken[2] = float("nan")
    for batch in ((broken, y), (x, y), (broken, y)):
        got, want = (sum(measure(model, loss, batch, name).values()) for name in ("auto", "loop"))
        torch.testing.assert_close(got, want, equal_nan=True)
    assert findings_of(model, loss).refused is None and used(model, loss, (x, y)) == "ghost"


def test_gradients_in_float32_are_within_its_precision():
    for name in ("mlp", "cnn", "residual_block_with_groupnorm", "transformer_encoder", "transformer"):
        model, loss, batch = first(name)
        want = measure(model, loss, batch, "loop")
        x, *others = batch if isinstance(batch, tuple) else (batch,)
        narrow = (x.float(), *others) if others else x.float()
        assert error(measure(model.float(), loss, narrow), want) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    model, _, (x, y) = first("mlp")

    def loss(module: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return cross_entropy(module, batch)

    batch = x.float(), y
    got = measure(model.float(), loss, batch)
    assert all(gram.dtype == torch.float32 for gram in got.values())
    assert error(got, measure(model, loss, batch, "loop")) < 2e-2


@pytest.mark.parametrize("seed", [10, 14, 15, 18])
def test_units_that_are_alike_are_told_apart_in_half_precision(seed):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.states, self.head = nn.Linear(8, 8), nn.GRU(8, 8, 2, batch_first=True), nn.Linear(8, 9)

    def loss(module: Any, batch: Any) -> Tensor:
        states, _ = module.states(module.first(batch[0]))
        return F.cross_entropy(module.head(states).flatten(0, 1), batch[1].flatten())

    torch.manual_seed(seed)
    module = Net().bfloat16()
    x = (torch.randn(1, 4, 8) + 0.3 * torch.randn(5, 4, 8)).bfloat16()
    y = torch.randint(0, 9, (1, 4)).expand(5, 4).clone()
    got = measure(module, loss, (x, y))
    want = measure(module.float(), loss, (x.float(), y), "loop")
    assert error(got, want) < 0.02


def test_a_loss_that_draws_gets_numbers_of_its_own_for_each_unit():
    model = Model(lambda self, x: self.layer(x + torch.randn_like(x)), layer=nn.Linear(4, 3)).double()
    gram = sum(measure(model, mean_square, torch.zeros(6, 4).double()).values())
    assert len({round(float(value), 9) for value in gram.diagonal()}) == 6


@pytest.mark.parametrize(
    "draw",
    [
        lambda self: random.random(),
        lambda self: np.random.rand(),
        lambda self: self.own.random(),
        lambda self: self.own_numpy["deep"].random(),
        lambda self: self.own_state.rand(),
    ],
    ids=["Python", "NumPy", "own of Python", "own of NumPy", "own state of NumPy"],
)
def test_numbers_that_python_draws_are_each_units_own(draw, caplog):
    _say_once.cache_clear()
    model = Model(lambda self, x: self.layer(x) * (1 + draw(self)), layer=nn.Linear(4, 3)).double()
    model.own, model.own_numpy = random.Random(1), {"deep": np.random.default_rng(1)}
    model.own_state = np.random.RandomState(1)
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        assert used(model, mean_square, torch.ones(6, 4).double()) == "loop"
    assert "random numbers from Python or NumPy" in caplog.text


def test_with_dropout_each_unit_has_masks_of_its_own():
    model = nn.Linear(64, 1, bias=False).double()

    def masked(module: nn.Module, x: Tensor) -> Tensor:
        return (module.weight * F.dropout(x, 0.5)).sum() * 0.5

    target, units = objective(model, masked), split(torch.ones(6, 64).double(), 1)
    grams, name = gram_of_units(Ranks(torch.device("cpu")), target, units, 1, dropout=True)
    assert name == "ghost"
    assert len({float(value) for value in grams["weight"][0]}) > 3


def test_a_refusal_for_lack_of_places_names_the_node(monkeypatch):
    monkeypatch.setattr(placement.Placement, "_outer", lambda *_: [])
    with pytest.raises(NotImplementedError, match=r"Backward\d: no dimension of \(6.*\) holds 6 units"):
        measure(*first("mlp"))


def test_a_penalty_on_the_weights_forms_no_gradients():
    """Each unit's share of it is a multiple of one direction, whatever the number of units."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 4).double()

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        penalty = sum(p.pow(3).sum() for p in module.parameters())
        return module(x).square().mean() * (1 + penalty) + 0.1 * penalty

    target, units, least = objective(model, loss), split(x, 1), 8 * (2 * 43 + 20)  # room for two gradients
    want = measure(model, loss, x, "loop")
    for _ in range(3):
        grams, name = gram_of_units(Ranks(torch.device("cpu")), target, units, 1, memory_budget=least)
        assert name == "ghost"
        assert error(grams, want) < 1e-12
