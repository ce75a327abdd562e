"""DDP and FSDP2: all pairs across ranks, the same decisions on all, and no trace."""

from __future__ import annotations

import json
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from gram.zoo import first
from torch import distributed as dist
from torch import nn

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram import loop
from lightning_gradconf.gram.blockwise import Plan
from lightning_gradconf.gram.ghost.factors import gram_of_sum
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks import data_parallel as distributed
from lightning_gradconf.gram.ranks import factor_exchange as factors
from lightning_gradconf.gram.ranks.process_group import Ranks, new_process_group
from lightning_gradconf.gram.select import gram_of_units

HERE = Path(__file__).parent


# ---- the Gram of rows that lie on several ranks ----------------------------------------------------------------------


PLANS = [Plan(block=3, chunk=3, passes=3), Plan(3, 1, 3), Plan(1, 1, 6), Plan(2, 1, 4), Plan(2, 2, 4)]


def join(rank: int, ranks: int, backend: str, store: str) -> Ranks:
    torch.set_num_threads(1)
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    return new_process_group(device)


def gram_on_rank(rank: int, ranks: int, backend: str, store: str, out: str) -> None:
    together = join(rank, ranks, backend, store)
    mine = {name: part[rank * 3 : rank * 3 + 3].to(together.device) for name, part in rows_of_all(ranks).items()}
    computed: list[dict[str, torch.Tensor]] = []

    def compute(start: int, stop: int) -> dict[str, torch.Tensor]:
        computed.append({name: part[start:stop].clone() for name, part in mine.items()})
        return computed[-1]

    sent = []
    exchange = dist.all_to_all_single

    def counted(out: torch.Tensor, given: torch.Tensor, group: dist.ProcessGroup) -> None:
        assert group is together.group is not dist.group.WORLD, "apart from what training sends"
        sent.append(given.nbytes)
        exchange(out, given, group=group)

    dist.all_to_all_single = counted
    results = []
    for made in PLANS:
        sent.clear()
        grams = distributed.contract(together, 3, compute, made, size=1)
        results.append((grams, sum(sent), max(sent)))
    dist.all_to_all_single = exchange
    decisions = [together.minimum(rank)]
    for failing in range(ranks + 1):
        try:
            together.run_on_all_ranks(lambda failing=failing: 1 / (rank - failing))
            decisions.append("went on")
        except (ZeroDivisionError, RuntimeError) as error:
            decisions.append(type(error).__name__)
    torch.save((results, decisions, computed), f"{out}/{rank}.pt")
    together.leave()
    dist.destroy_process_group()


SIZES = {"one": 1, "odd": 7, "even": 12, "wide": 500_000}


def rows_of_all(ranks: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(3 * ranks, size, generator=generator) for name, size in SIZES.items()}
    return rows | {"double": torch.randn(3 * ranks, 5, generator=generator).double()}


ON_GPUS = pytest.param(
    torch.cuda.device_count(), "nccl", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


@pytest.mark.parametrize(("ranks", "backend"), [(2, "gloo"), (3, "gloo"), ON_GPUS])
def test_gram_over_ranks_is_that_of_all_rows(ranks, backend, tmp_path):
    mp.spawn(gram_on_rank, args=(ranks, backend, str(tmp_path / "store"), str(tmp_path)), nprocs=ranks)
    outcomes = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(ranks)]
    for rank, (results, decisions, computed) in enumerate(outcomes):
        for i, (made, (grams, sent, most)) in enumerate(zip(PLANS, results, strict=True)):
            for name, part in rows_of_all(ranks).items():
                assert grams[name].dtype == part.dtype
                want = part.double() @ part.double().T
                torch.testing.assert_close(grams[name].double(), want, rtol=0, atol=1e-5 * float(want.diagonal().max()))
                assert torch.equal(grams[name], outcomes[0][0][i][0][name]), "bitwise the same on all ranks"
            padded = sum(-(-size // ranks) * ranks * 4 for size in SIZES.values()) + -(-5 // ranks) * ranks * 8
            assert made.passes * padded <= sent <= made.passes * (padded + 100), "each gradient is sent once"
            assert most <= 1 << 20, "in slices"
        assert all(rows == {} for rows in computed), "gradients are released as they are contracted"
        failed = ["ZeroDivisionError" if failing == rank else "RuntimeError" for failing in range(ranks)]
        assert decisions == [0, *failed, "went on"]


MODELS = (
    *("transformer_encoder", "grouped_dilated_convolutions", "experts_in_one_tensor", "tied_embedding_and_head"),
    *("lstm", "low_rank_adapter", "batchnorm"),
)


def engines_on_rank(rank: int, ranks: int, store: str, out: str) -> None:
    together = join(rank, ranks, "gloo", store)
    results: dict[str, Any] = {}
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("lightning_gradconf").setLevel(logging.INFO)
    logging.getLogger("lightning_gradconf").addHandler(said)

    def measure(key: str, module: nn.Module, loss_fn: Any, units: list[Any]) -> None:
        target = objective(module, loss_fn)
        grams, used = gram_of_units(together, target, units, 1)
        why = [record.getMessage() for record in said.buffer]
        said.flush()
        with MeasurementMode(running_statistics=True, dropout=False):
            results[key] = grams, used, loop.unit_gradients(target, units), why

    for name in MODELS:
        module, loss_fn, batch = first(name)
        units = split(batch, 1)
        measure(name, module, loss_fn, units[rank * (len(units) // ranks) :][: len(units) // ranks])
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    tokens = torch.arange(4 * (5 + rank)).view(4, -1) % 7  # sequences of 5 on one rank, and of 6 on the other
    square = lambda module, x: module(x).square().mean()  # noqa: E731
    measure("other lengths", words, square, split(tokens, 1))
    again = lambda module, x: square(module, x) + (rank * module[1](module[0].weight[x])).mean()  # noqa: E731
    measure("other uses", words, again if rank else square, split(tokens, 1))
    factors.gram_of_sum = (lambda *_: 1 / 0) if rank == 1 else gram_of_sum
    measure("broken on rank 1", words, square, split(tokens, 1))
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_engines_across_ranks_are_one_process_with_all_units(tmp_path):
    mp.spawn(engines_on_rank, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert "ZeroDivisionError" in other["broken on rank 1"][3][0] and "another rank" in one["broken on rank 1"][3][0]
    for name, (grams, used, rows, why) in one.items():
        assert used == other[name][1] == ("vmap" if name == "broken on rank 1" else "ghost"), name
        assert bool(why) == (used == "vmap"), "a fall-back is said, with its reason"
        together = {key: torch.cat([row, other[name][2][key]]) for key, row in rows.items()}
        scale = torch.cat(list(together.values()), 1).square().sum(1).max()
        for key, gram in grams.items():
            torch.testing.assert_close(gram / scale, together[key] @ together[key].T / scale, rtol=0, atol=1e-12)
            assert torch.equal(gram, other[name][0][key])


def collectives_on_rank(rank: int, ranks: int, store: str, out: str) -> None:
    together = join(rank, ranks, "gloo", store)
    torch.manual_seed(0)
    module, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    x[:, 0] = torch.tensor([-1, 1, -1, 1] if rank == 0 else [1, 1, 1, 1])

    def loss_fn(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        loss = module(x).square().mean()
        if (x[:, 0] > 0).any():  # on one rank, units go two ways
            loss = 2 * loss
        total = loss.detach().clone()
        dist.all_reduce(total)
        return loss

    target, units = objective(module, loss_fn), split(x, 1)
    used = [gram_of_units(together, target, units, 1)[1] for _ in range(3)]
    torch.save(used, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_a_loss_that_talks_to_other_ranks_is_run_once_for_each_unit(tmp_path):
    mp.spawn(collectives_on_rank, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [["loop"] * 3] * 2


def test_alone_nothing_is_exchanged():
    alone = Ranks(torch.device("cpu"))
    assert (alone.size, alone.rank) == (1, 0)
    assert alone.minimum(3) == 3
    assert alone.gather([1, 2]) == [1, 2]
    assert alone.run_on_all_ranks(lambda: "done") == "done"
    with pytest.raises(KeyError, match="mine"):
        alone.run_on_all_ranks(lambda: {}["mine"])
    alone.leave()


# ---- whole runs ------------------------------------------------------------------------------------------------------

KEPT = ["weights", "gradients", "optimizer", "rng", "logged", "steps"]
EVERY = {"every_n_train_steps": 1}
OPTIONS = {
    "plain": {},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "buckets as gradients": {"gradient_as_bucket_view": True},
}
STAGES = ["isolation", "sampling", "preparation", "plan", "forward", "block", "statistics"]
# Room for 3 of the 4 gradients: two are held, and the other two computed again.
BLOCKS = {"engine": "loop", "memory_budget": 1500}
RUNS = {
    **{f"{name}, without": {"options": options} for name, options in OPTIONS.items()},
    **{
        f"{name}, with": {"options": options, "confusion": {"every_n_train_steps": 2, "source": source}}
        for (name, options), source in zip(OPTIONS.items(), ["current", "fresh", "fixed", "current"], strict=True)
    },
    "again, without": {},
    "accumulation, without": {"accumulate": 2},
    "accumulation, with": {"accumulate": 2, "confusion": EVERY | {"unit_size": "batch", "num_units": 2}},
    "manual, without": {"manual": True},
    "manual, with": {"manual": True, "confusion": EVERY},
    "three ranks": {
        "devices": 3, "samples": 22, "confusion": {"unit_size": 2, "every_n_epochs": 1, "num_units": 3},
    },
    "in blocks": {"confusion": EVERY | BLOCKS | {"labels": 1, "top_pairs": 3}},
    **{f"broken {stage}": {"confusion": EVERY | BLOCKS, "fail": stage} for stage in STAGES},
    **{
        f"smaller batches on one rank, {word}": {"noise": False, "smaller": True} | confusion
        for word, confusion in {
            "without": {},
            "with": {"confusion": EVERY},
        }.items()
    },
}  # fmt: skip
# Lightning starts the ranks of FSDP by running the script again, so that there is one run in a script.
FSDP = {
    f"fsdp, accumulate {accumulate}, {word}": {"strategy": "fsdp2", "accumulate": accumulate} | confusion
    for accumulate in (1, 2)
    for word, confusion in {
        "without": {},
        "with": {"confusion": EVERY | {"unit_size": accumulate}},
    }.items()
} | {"fsdp, broken": {"strategy": "fsdp2", "confusion": EVERY, "fail": "sharded forward"}}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What each rank of each run left."""
    out = tmp_path_factory.mktemp("runs")
    for i, runs in enumerate([RUNS, *({name: options} for name, options in FSDP.items())]):
        (out / f"{i}.json").write_text(json.dumps(runs))
        command = [sys.executable, str(HERE / "ddp_run.py"), str(out / f"{i}.json"), str(out)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env, cwd=out)
        assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: [json.loads(path.read_text()) for path in sorted((out / name).glob("rank*.json"))]


def assert_no_trace(plain: list[dict], measured: list[dict]) -> None:
    assert len(plain) == len(measured) == 2
    for rank, (one, other) in enumerate(zip(plain, measured, strict=True)):
        assert [key for key in KEPT if one[key] != other[key]] == [], f"rank {rank}"


def test_runs_repeat(left):
    assert_no_trace(left("plain, without"), left("again, without"))


@pytest.mark.parametrize("name", OPTIONS)
def test_ddp_runs_are_bitwise_the_runs_without(name, left):
    measured = left(f"{name}, with")
    assert_no_trace(left(f"{name}, without"), measured)
    for rank in measured:
        assert rank["warnings"] == []
        assert rank["statistics"] == measured[0]["statistics"], "bitwise the same on all ranks"
    assert [step for step, _ in measured[0]["ours"]] == [0, 1, 3, 5]
    # Both ranks' batches of 4; or all of the dataset, of which each rank has one half.
    assert len(measured[0]["gram"]) == (24 if name in ("unused parameters", "static graph") else 8)


def test_manual_optimization_and_metrics_that_synchronise(left):
    measured = left("manual, with")
    assert_no_trace(left("manual, without"), measured)
    for rank in measured:
        assert rank["warnings"] == []
        assert rank["statistics"] == measured[0]["statistics"], "bitwise the same on all ranks"
        assert len(rank["gram"]) == 8
    assert [step for step, _ in measured[0]["ours"]] == [0, 1, 2, 3, 4, 5]


def test_accumulation_and_batches_as_units(left):
    measured = left("accumulation, with")
    assert_no_trace(left("accumulation, without"), measured)
    assert len(measured[0]["gram"]) == 4
    assert measured[0]["ours"]


def test_uneven_batches_on_three_ranks(left):
    measured = left("three ranks")
    assert len(measured) == 3
    assert len(measured[0]["gram"]) == 9
    assert all(rank["statistics"] == measured[0]["statistics"] for rank in measured)


def test_a_rank_with_smaller_batches(left):
    """The units of all are then as many as its own."""
    measured = left("smaller batches on one rank, with")
    assert_no_trace(left("smaller batches on one rank, without"), measured)
    for rank in measured:
        assert rank["warnings"] == []
        assert rank["passes"] == [0, 1, 2, 3, 4, 5]
        assert len(rank["gram"]) == 2 * 3 and rank["statistics"] == measured[0]["statistics"]


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_failing_leaves_all_training(stage, left):
    measured = left(f"broken {stage}")
    assert_no_trace(left("plain, without"), measured)
    assert any("broken on rank 1" in message for message in measured[1]["warnings"])
    if stage != "statistics":  # which is after all ranks agreed that they have a Gram
        assert any("another rank could not measure" in message for message in measured[0]["warnings"])
        assert "gram" not in measured[0]


def test_runs_in_blocks_are_the_runs_without(left):
    measured = left("in blocks")
    assert_no_trace(left("plain, without"), measured)
    assert measured[0]["warnings"] == [] and len(measured[0]["gram"]) == 8


def test_pairs_are_told_by_rank_and_the_same_on_all(left):
    measured = left("in blocks")
    assert measured[0]["pairs"] == measured[1]["pairs"]
    assert {"within_class_cosine", "between_class_cosine"} <= measured[0]["statistics"].keys()
    gram = torch.tensor(measured[0]["gram"])
    cosines = gram / torch.outer(gram.diagonal().sqrt(), gram.diagonal().sqrt())
    lowest = cosines[tuple(torch.triu_indices(8, 8, offset=1))].sort().values[:3]
    for (cosine, units, origins, labels), value in zip(measured[0]["pairs"], lowest, strict=True):
        assert cosine == pytest.approx(float(value), abs=1e-6) == pytest.approx(float(cosines[tuple(units)]), abs=1e-6)
        assert origins == [f"rank {unit // 4}, batch 2, sample {unit % 4}" for unit in units]
        assert len(labels) == 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fsdp_runs_are_bitwise_the_runs_without(accumulate, left):
    measured = left(f"fsdp, accumulate {accumulate}, with")
    assert_no_trace(left(f"fsdp, accumulate {accumulate}, without"), measured)
    assert len(measured[0]["gram"]) == 4 // accumulate, "units of that many samples of each rank"
    for rank in measured:
        assert rank["warnings"] == []
        assert rank["statistics"] == measured[0]["statistics"], "bitwise the same on all ranks"
        assert [step for step, _ in rank["ours"]] == list(range(6 if accumulate == 1 else 4))
        assert rank["said"] == []


def test_one_rank_failing_leaves_all_fsdp_training(left):
    measured = left("fsdp, broken")
    assert_no_trace(left("fsdp, accumulate 1, without"), measured)
    assert any("broken on rank 1" in message for message in measured[1]["warnings"])
    assert any("another rank could not measure" in message for message in measured[0]["warnings"])
    assert "gram" not in measured[0]
