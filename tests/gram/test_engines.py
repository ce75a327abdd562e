"""The factors that ranks exchange, and the contract of `gradient_gram` beside its numbers."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from gram.oracle import as_measured, oracle
from gram.zoo import SINGLE, ZOO
from gram.zoo.engines import EXCEPTIONS, NOT_YET
from gram.zoo.registry import Model, cross_entropy
from torch import nn

from lightning_gradconf import gradient_gram
from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.findings import findings_of
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.factors import gram_of_sum
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.select import _say_once

# `mean_of_torchmetrics` needs the answers of its metric, which `gram_of_units` gives.
WITHOUT_FACTORS = {*EXCEPTIONS, *NOT_YET, *SINGLE, "mean_of_torchmetrics"}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # PyTorch, of a list of slices
@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in WITHOUT_FACTORS])
def test_factors_kept_by_ghost_make_the_gram_of_the_loop(name, unit_size):
    case = ZOO[name]()
    case.before(case.module, 0)
    module, loss_fn, batch = case[0], case[1], case.batches[0]
    with as_measured(unit_size):
        want = oracle(module, loss_fn, batch, unit_size)
    scale = sum(want.values()).diagonal().max().clamp_min(1e-300)
    target, units = objective(module, loss_fn), split(batch, unit_size)
    mode, findings = MeasurementMode(running_statistics=unit_size == 1, dropout=False), findings_of(module, loss_fn)
    for _ in range(3):  # two with a proof, and one without
        with untouched(module):
            factors = ghost.unit_factors(target, units, mode, findings)
            assert list(factors) == list(target.parameters), "in one order on all ranks"
            with torch.no_grad():
                grams = {name: gram_of_sum(parts, Workspace()) for name, parts in factors.items()}
            for key, gram in grams.items():
                torch.testing.assert_close(gram / scale, want[key].expand_as(gram) / scale, rtol=0, atol=1e-12)


# ---- the contract of gradient_gram beside its numbers ----------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


BATCH = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("dtype", "gram_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.05),
    ],
)
def test_precision_of_the_gram(engine, dtype, gram_dtype, tolerance):
    x, y = BATCH
    module = mlp()
    want = sum(gradient_gram(copy.deepcopy(module).double(), cross_entropy, (x.double(), y), engine="loop").values())
    got = sum(gradient_gram(module.to(dtype), cross_entropy, (x.to(dtype), y), engine=engine).values())
    assert got.dtype == gram_dtype
    scale = float(want.diagonal().max())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_module_is_left_as_it_was(engine):
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    module[0].weight.grad = torch.ones(5, 4)
    fired = []
    module[0].weight.register_hook(fired.append)
    before = copy.deepcopy(module.state_dict())
    rng = torch.get_rng_state()
    gradient_gram(module, cross_entropy, BATCH, engine=engine, unit_size=2, dropout=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(module[0].weight.grad, torch.ones(5, 4)) and module[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), rng)
    assert module.training and not fired


def test_batch_is_not_written_to():
    x = BATCH[0].clone()
    gradient_gram(mlp(), lambda module, x: module(x.mul_(2)).sum(), x, engine="loop")
    assert torch.equal(x, BATCH[0])


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("*", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ("*.bias", {"0.bias", "2.bias"}),
        (["0.*", "2.bias"], {"0.weight", "0.bias", "2.bias"}),
    ],
)
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_parameters_by_pattern(engine, patterns, names):
    grams = gradient_gram(mlp(), cross_entropy, BATCH, engine=engine, parameters=patterns)
    everything = gradient_gram(mlp(), cross_entropy, BATCH, engine="loop")
    assert set(grams) == names
    torch.testing.assert_close(grams, {name: everything[name] for name in grams}, rtol=1e-5, atol=1e-7)


def test_a_pattern_that_matches_nothing_names_what_there_is():
    with pytest.raises(ValueError, match=r"parameters='encoder\*' matches none of the 4 .*'0\.weight', '0\.bias'"):
        gradient_gram(mlp(), cross_entropy, BATCH, parameters="encoder*")


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda module, batch: module(batch[0]), r"one floating-point number, found torch\.float32 \(1, 3\)"),
        (lambda module, batch: module(batch[0]).argmax(), "found torch.int64"),
        (lambda module, batch: module(batch[0]).sum().item(), "found float"),
        (lambda module, batch: module(batch[0]).sum().detach(), "does not depend on any parameter"),
    ],
)
@pytest.mark.parametrize("engine", ["loop", "auto"])
def test_what_is_no_loss_is_refused(engine, loss_fn, words):
    with pytest.raises(ValueError, match=words):
        gradient_gram(mlp(), loss_fn, BATCH, engine=engine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unit_size": 4}, "6 samples does not divide into units of unit_size=4"),
        ({"unit_size": 0}, "unit_size=0"),
        ({"engine": "fast"}, "engine='fast'"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        gradient_gram(mlp(), cross_entropy, BATCH, **options)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter of Sequential requires grad"):
        gradient_gram(mlp().requires_grad_(False), cross_entropy, BATCH)
    with pytest.raises(ValueError, match="'weight' is not initialised yet; run one batch"):
        gradient_gram(nn.LazyLinear(3), cross_entropy, BATCH)


def test_falling_back_says_why_once(caplog):
    def forward(self, x):
        h = self.layer(x)
        h.register_hook(lambda gradient: gradient.clamp(-0.3, 0.3))
        return h * float(x.sum())

    module, loss_fn, batch = Model(forward, layer=nn.Linear(4, 3)), cross_entropy, BATCH
    _say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        for _ in range(2):
            gradient_gram(module, loss_fn, batch)
    (record,) = caplog.records
    assert "register_hook" in record.getMessage() and "engine='loop'" in record.getMessage()


def test_an_error_of_the_users_is_raised_as_it_is_and_nothing_is_said(caplog):
    def broken(module, batch):
        raise KeyError("mine")

    _say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_gradconf"), pytest.raises(KeyError, match="mine"):
        gradient_gram(mlp(), broken, BATCH)
    assert not caplog.records


class Freezes(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held[0].requires_grad_(False)  # as `toggle_optimizer` does for the parameters of another optimizer
        return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Linear, Freezes])
@pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "ghost"])
def test_parameters_kept_in_a_list_are_found_or_it_is_said_that_they_are_not(engine, kind):
    model = kind(4, 3).double()
    model.held = [model.bias, model.weight]

    def loss(module, batch):
        return cross_entropy(module, batch) + sum(p.pow(3).sum() for p in module.held)

    batch = BATCH[0].double(), BATCH[1]
    if engine == "vmap" or (engine == "ghost" and kind is Freezes):
        with pytest.raises(RuntimeError, match=r"takes \w+ from somewhere else|requires_grad_"):
            gradient_gram(model, loss, batch, engine=engine)
        return
    got = gradient_gram(model, loss, batch, engine=engine)
    rows = []
    for x, y in zip(batch[0].split(1), batch[1].split(1), strict=True):
        twin = nn.Linear(4, 3).double()
        twin.load_state_dict(model.state_dict())
        twin.held = [twin.weight] if kind is Freezes else [twin.bias, twin.weight]
        rows.append(torch.autograd.grad(loss(twin, (x, y)), [twin.weight, twin.bias]))
    for name, column in zip(("weight", "bias"), zip(*rows, strict=True), strict=True):
        flat = torch.stack([g.flatten() for g in column])
        torch.testing.assert_close(got[name], flat @ flat.T)


def test_samples_of_a_detector():
    """Images of different sizes in lists: no engine but the loop can take them, and auto does."""
    model = Model(lambda self, images: torch.stack([self.layer(i.mean((1, 2))) for i in images]), layer=nn.Linear(3, 2))

    def loss(module, batch):
        images, targets = batch
        return (module(images) - torch.stack([t["box"] for t in targets])).square().mean()

    images = [torch.randn(3, 4 + i, 5) for i in range(4)]
    targets = [{"box": torch.randn(2)} for _ in range(4)]
    got = gradient_gram(model, loss, (images, targets))
    rows = []
    for image, target in zip(images, targets, strict=True):
        grads = torch.autograd.grad(loss(model, ([image], [target])), list(model.parameters()))
        rows.append(grads)
    for name, column in zip(("layer.weight", "layer.bias"), zip(*rows, strict=True), strict=True):
        flat = torch.stack([g.flatten() for g in column])
        torch.testing.assert_close(got[name], flat @ flat.T, rtol=1e-5, atol=1e-7)
