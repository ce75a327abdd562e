"""Gradients that do not fit a memory budget: the same Gram, block by block, within that budget."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from gram.zoo import first
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback, gradient_gram
from lightning_gradconf.batches.units import split
from lightning_gradconf.gram import blockwise as blocks
from lightning_gradconf.gram import memory_budget as budget
from lightning_gradconf.gram.blockwise import Plan, blockwise, make_plan
from lightning_gradconf.gram.ghost import functorch, rules
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.memory_budget import units_at_once
from lightning_gradconf.gram.objective import objective, sizes
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import gram_of_units

RANKS = Ranks(torch.device("cpu"))
N = 12


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(1), dtype=dtype), torch.arange(N) % 3


def gradient_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def budget_for(module: nn.Module, gradients: float) -> int:
    return int(gradients * gradient_bytes(module)) + max(p.nbytes for p in module.parameters())


# ---- the plan --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(n=st.integers(2, 200), room=st.integers(2, 250), at_once=st.none() | st.integers(1, 40))
def test_plans_fit_and_cover_every_pair_once(n, room, at_once):
    made = make_plan(n, [60, 40], room * 100 + 60, at_once)
    if made.block < n:
        assert made.block + made.chunk + (made.chunk > 1) <= room
        assert made.block % made.chunk == 0
    counts = torch.zeros(n, n)
    computed = []

    def ones(start, stop):
        computed.append(stop - start)
        return {"p": torch.ones(stop - start, 1)}

    counts = blockwise(n, ones, made)["p"]
    assert torch.equal(counts, torch.ones(n, n)), "each pair once"
    assert sum(computed) == made.passes and max(computed) == made.chunk
    assert (made.passes == n) == (made.block >= n)


def test_a_budget_for_less_than_two_gradients_says_what_would_do():
    words = r"budget of 0\.0025 MB has no room for two gradients of 0\.001 MB.* allow 0\.0026 MB.*parameters=.*ghost"
    with pytest.raises(ValueError, match=words):
        make_plan(10, [400, 600], 2500)
    assert make_plan(10, [400, 600], 2600) == Plan(1, 1, 55)
    with pytest.raises(ValueError, match="no room for two gradients"):
        gradient_gram(mlp(), loss, batch(), engine="loop", memory_budget=100)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(5, 5), ("5", 5), ("5 B", 5), ("2GB", 2 * 10**9), ("1.5gib", 3 * 2**29), ("500 MB", 5 * 10**8), ("1 KiB", 1024)],
)
def test_budgets_are_read(given, expected):
    assert budget.bytes_of(given) == expected


@pytest.mark.parametrize("given", ["2 apples", "", "-1GB", "GB", "0", 0, -3, True, 1.5, "1 ib", "1e3"])
def test_what_is_no_budget_is_named(given):
    with pytest.raises(ValueError, match=r"memory_budget=.* is no amount of memory; .*'2GB'"):
        budget.bytes_of(given)


def test_without_a_budget_half_of_the_free_memory_is_taken(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(budget, "_free_lately", lambda period: 1000)
    assert budget.bytes_for_gradients(None, 1, cpu) == 256 + 128, "in coarse steps"
    assert budget.bytes_for_gradients(None, 1, cpu, ranks=2) == 128 + 64
    assert budget.bytes_for_gradients(None, 900, cpu) == 900, "two gradients are tried in any case"
    assert budget.bytes_for_gradients("1MB", 1, cpu) == 10**6
    monkeypatch.setattr(budget, "_free_lately", lambda period: None)
    assert budget.bytes_for_gradients(None, 1, cpu) == budget.UNBOUNDED


def test_free_memory_is_asked_once_in_a_while(monkeypatch):
    answers = [5000, 6000]
    monkeypatch.setattr(budget, "_free_of_machine", lambda: answers.pop(0))
    budget._free_lately.cache_clear()
    try:
        assert [budget._free_lately(period) for period in (1, 1, 2)] == [5000, 5000, 6000]
    finally:
        budget._free_lately.cache_clear()


def test_free_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path):
    free = budget._free_of_machine()
    assert free is None or free > 1 << 20
    for name, content in {"max": "5000", "current": "2000", "none": "max"}.items():
        (tmp_path / name).write_text(content)
    limited, unlimited = (tmp_path / "max", tmp_path / "current"), (tmp_path / "none", tmp_path / "current")
    monkeypatch.setattr(budget, "_CONTAINER", (limited, unlimited))
    assert budget._free_of_machine() == 3000
    monkeypatch.setattr(budget, "_CONTAINER", (unlimited,))
    assert (budget._free_of_machine() or 1 << 30) > 1 << 20


# ---- the Gram --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [2, 3, 5, 9, 11.9])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_blocks_change_nothing(engine, gradients, dtype, tolerance):
    module = mlp(dtype)
    whole = gradient_gram(module, loss, batch(dtype), engine=engine)
    calls = []

    def counted(module, batch):
        calls.append(1)
        return loss(module, batch)

    blocked = gradient_gram(module, counted, batch(dtype), engine=engine, memory_budget=budget_for(module, gradients))
    assert len(calls) > (N if engine == "loop" else 1), "some gradients are computed again"
    assert blocked.keys() == whole.keys()
    scale = sum(whole.values()).diagonal().max()
    for name, gram in blocked.items():
        torch.testing.assert_close(gram / scale, whole[name] / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_what_is_computed_again_meets_the_same_random_numbers(engine):
    """A rank-one loss whose gradient is the mask: the Gram of a unit with itself tells one mask from two."""
    module = nn.Linear(64, 1, bias=False, dtype=torch.float64)

    def masked(module, x):
        return (module.weight * F.dropout(x, 0.5)).sum() * 0.5

    x = torch.ones(N, 64, dtype=torch.float64)
    grams = gradient_gram(module, masked, x, engine=engine, dropout=True, memory_budget=budget_for(module, 5))
    gram = grams["weight"]
    assert len({float(v) for v in gram[0]}) > 3, "each unit has a mask of its own"
    assert torch.linalg.eigvalsh(gram).min() > -1e-9, "the masks of one unit are one mask"
    again = gradient_gram(module, masked, x, engine="loop", dropout=True)["weight"]
    if engine == "loop":
        torch.manual_seed(3)
        first = gradient_gram(module, masked, x, engine="loop", dropout=True)["weight"]
        torch.manual_seed(3)
        blocked = gradient_gram(module, masked, x, engine="loop", dropout=True, memory_budget=budget_for(module, 5))
        torch.testing.assert_close(blocked["weight"], first, rtol=1e-12, atol=1e-12)
        assert again.shape == first.shape


def test_a_loss_that_is_another_each_time_is_refused():
    generator = torch.Generator().manual_seed(0)

    def noisy(module, batch):
        noise = torch.randn(batch[0].shape, generator=generator, dtype=batch[0].dtype)
        return loss(module, (batch[0] + noise, batch[1]))

    with pytest.raises(RuntimeError, match=r"changed when it was computed again.*raise memory_budget"):
        gradient_gram(mlp(), noisy, batch(), engine="loop", memory_budget=budget_for(mlp(), 4))


def test_what_is_not_finite_is_no_change():
    x, y = batch()
    x[3] = torch.nan
    gram = gradient_gram(mlp(), loss, (x, y), engine="loop", memory_budget=budget_for(mlp(), 4))["0.weight"]
    assert gram[3].isnan().all() and gram[0, 1].isfinite()


def test_the_plan_is_announced_once(caplog):
    blocks._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_gradconf"):
        for _ in range(2):
            gradient_gram(mlp(), loss, batch(), engine="loop", memory_budget=budget_for(mlp(), 5))
    (record,) = caplog.records
    assert "12 gradients of 0.000528 MB do not fit the memory budget: 4 are held at a time" in record.getMessage()
    assert "1.0 extra passes" in record.getMessage()


# ---- passes of several units -----------------------------------------------------------------------------------------


def test_what_a_unit_keeps_is_its_activations():
    module = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh()).double()
    target = objective(module, lambda module, x: module(x).sum())
    assert budget._kept(target, batch()[0][:3]) == 3 * (5 + 7) * 8, "input and output, not the weight"


def test_what_a_loss_keeps_that_runs_a_backward_pass_itself_is_counted_too():
    def force(module, x):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        return gradient.square().mean()

    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    assert budget._kept(objective(module, force), torch.randn(1, 5)) >= (5 + 7 + 3) * 4


def test_units_go_together_as_far_as_an_ordinary_pass_and_the_budget_allow():
    x, y = batch()
    units = [(x[i : i + 3], y[i : i + 3]) for i in range(0, N, 3)]
    target = objective(mlp(), loss)
    kept = budget._kept(target, units[0])
    for usual, room, expected in [
        (N, 1, 4),  # no more samples than an ordinary pass has
        (None, 1, 4),
        (3, budget.UNBOUNDED, 4),  # nothing is known of the memory
        (3, 1, 1),
        (6, 1, 2),
        (3, 4 * 2 * kept, 2),  # in a quarter of the budget
        (3, 4 * 3 * kept - 1, 2),
        (3, 1 << 30, 4),
    ]:
        assert units_at_once(target, units, 3, usual, room) == expected


@pytest.mark.parametrize(("together", "used"), [(6, "ghost"), (5, "vmap"), (4, "vmap"), (1, "loop")])
def test_auto_takes_the_engine_whose_passes_fit(together, used):
    x, y = batch()
    units = [(x[i : i + 2], y[i : i + 2]) for i in range(0, N, 2)]
    target = objective(mlp(), loss)
    with MeasurementMode(running_statistics=False, dropout=False):
        room = max(4 * together * budget._kept(target, units[0]), blocks.min_budget(sizes(mlp().parameters())))
    grams, name = gram_of_units(RANKS, target, units, 2, memory_budget=room, train_batch_size=2)
    assert name == used
    whole, _ = gram_of_units(RANKS, target, units, 2, "loop")
    torch.testing.assert_close(grams, whole, rtol=1e-12, atol=1e-12)


def test_auto_leaves_single_units_to_the_loop(monkeypatch):
    """In blocks torch.func would batch nothing, and the loop is the faster one."""
    monkeypatch.setattr(functorch, "MISSING", "the ghost engine is not available")
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = batch()
    units = [(x[i : i + 2], y[i : i + 2]) for i in range(0, N, 2)]
    target = objective(module, loss)
    whole, first = gram_of_units(RANKS, target, units, 2)
    grams, then = gram_of_units(RANKS, target, units, 2, memory_budget=budget_for(module, 4))
    assert (first, then) == ("vmap", "loop")
    torch.testing.assert_close(grams, whole, rtol=1e-12, atol=1e-12)


def test_gradients_that_ghost_has_to_form_stay_within_the_budget(monkeypatch):
    """Of parameters that are transformed before they meet the data, and of those without a rule."""
    transformed, bilinear = first("low_rank_adapter"), first("bilinear")
    monkeypatch.delitem(rules.RULES, "TrilinearBackward0")
    for (module, loss_fn, batch), formed, other in [
        (transformed, 3 * 2 + 2 * 4 + 3 * 4, "vmap"),  # both factors, and the matrix that they make
        (bilinear, 5 * 4 * 2, "loop"),  # as torch.func would have to go unit by unit
    ]:
        target, units = objective(module, loss_fn), split(batch, 1)
        whole, _ = gram_of_units(RANKS, target, units, 1, "loop")
        for room, used in ((6 * formed * 8, "ghost"), (6 * formed * 8 - 1, other)):
            grams, name = gram_of_units(RANKS, target, units, 1, memory_budget=room)
            assert name == used
            torch.testing.assert_close(grams, whole, rtol=1e-10, atol=1e-12)


# ---- the callback ----------------------------------------------------------------------------------------------------

PAPER = {"every_n_epochs": 1, "source": "fresh", "num_units": 100, "unit_size": 128}


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def measured(net: nn.Module, data: TensorDataset, batch_size: int, **confusion: Any) -> GradientConfusionCallback:
    callback = GradientConfusionCallback(**(PAPER | confusion))
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Classifier(net), DataLoader(data, batch_size=batch_size, shuffle=True))
    return callback


def test_the_papers_protocol_on_the_digits():
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    callback = measured(net, data, 128, memory_budget="100KB")
    assert callback.last_gram.shape == (14, 14), "1797 samples without replacement are 14 units of 128"
    assert callback.last_step == 1
    assert callback.last_gram.isfinite().all()


def test_the_protocol_on_a_wide_resnet():
    """With BatchNorm in training mode, whose units cannot go through one pass, and a tenth of the samples."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from paper.models import build

    net = build("wrn-16-2", (3, 32, 32), 10, channels=4)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(80, 3, 32, 32, generator=generator), torch.randint(10, (80,), generator=generator))
    size = gradient_bytes(net)
    callback = measured(net, data, 8, num_units=10, unit_size=8, memory_budget=4 * size)
    assert callback.last_gram.shape == (10, 10)
    unbounded = measured(net, data, 8, num_units=10, unit_size=8)
    assert unbounded.last_gram.shape == (10, 10)


@pytest.mark.parametrize("given", ["lots", 0, -5, "3 apples"])
def test_the_callback_names_a_budget_that_is_none(given):
    with pytest.raises(ValueError, match="memory_budget="):
        GradientConfusionCallback(memory_budget=given)


# ---- the peak, each in a process of its own --------------------------------------------------------------------------

WIDTH, UNITS = 384, 32
SHARES = [1 / 10, 1 / 4, 1 / 2]


def peaks(method: str) -> None:
    """Print the bytes of all gradients, and the highest resident memory of each measurement above that before it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inner = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), *inner, nn.Linear(WIDTH, 10))
    data = torch.randn(UNITS, 64), torch.arange(UNITS) % 10
    everything = UNITS * gradient_bytes(model)
    print(everything)
    for share in (SHARES[-1], *SHARES):  # what the first measurement loads counts as there before
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        if method == "ordinary":
            loss(model, data).backward()
            model.zero_grad()
        else:
            gradient_gram(model, loss, data, engine=method, memory_budget=int(share * everything))
        print(resident("VmHWM") - before)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@pytest.fixture(scope="module")
def peaks_of():
    def measure(method: str) -> list[int]:
        # Memory goes back to the system when it is freed, large or small, and there is one heap.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return [int(line) for line in done.stdout.split()]

    return cache(measure)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc, which is Linux")
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_peak_memory_is_within_the_budget_and_one_ordinary_pass(engine, share, peaks_of):
    everything, _, *highest = peaks_of(engine)
    _, _, *ordinary = peaks_of("ordinary")
    allowed = share * everything
    assert highest[SHARES.index(share)] <= allowed + min(ordinary)
    assert highest[SHARES.index(share)] >= 0.6 * allowed, "and the budget is used"


if __name__ == "__main__":
    peaks(sys.argv[1])
