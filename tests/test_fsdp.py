"""FSDP2: units over all ranks, contracted shard by shard, equal what the module that is not sharded gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks import sharded
from lightning_gradconf.gram.ranks.process_group import new_process_group

UNITS, RANKS, WIDTH = 5, 2, 6


class Transformer(nn.Module):
    """Odd sizes, so that shards differ; a parameter of no layer, one without a gradient, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.position = nn.Parameter(torch.randn(4, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 9, dropout=0.4, batch_first=True)
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.embed(self.frozen(x)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mean(1)))


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer().double()


def unit(i: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * i + rank)
    return torch.randn(size, 4, 3, generator=generator).double(), torch.randint(3, (size,), generator=generator)


def loss(module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def expected(size: int, patterns: str = "*") -> dict[str, torch.Tensor]:
    """Plain autograd on the whole module: the mean of the ranks' losses, for each unit."""
    module = model()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
        if isinstance(part, nn.BatchNorm1d) and size == 1:
            part.eval()
    named = objective(module, loss, patterns).parameters
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    for i in range(UNITS):
        total = sum(loss(module, unit(i, rank, size)) for rank in range(RANKS)) / RANKS
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        for (name, p), gradient in zip(named.items(), gradients, strict=True):
            rows[name].append((torch.zeros_like(p) if gradient is None else gradient).flatten())
    return {name: torch.stack(row) @ torch.stack(row).T for name, row in rows.items()}


def shard(module: Transformer, policy: dict[str, torch.dtype] | None = None) -> Transformer:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {} if policy is None else {"mp_policy": MixedPrecisionPolicy(**policy)}
    for layer in module.layers:
        fully_shard(layer, **options)
    return fully_shard(module, **options)


BUDGETS = (None, "8KB", "13KB")


def on_rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    together = new_process_group(torch.device("cpu"))
    results: dict[str, object] = {}

    def grams(module, size=2, patterns="*", **options):
        target = objective(module, loss, patterns)
        units = [unit(i, rank, size) for i in range(UNITS)]
        return sharded.gram_of_units(together, target, units, size, **({"dropout": False} | options))

    module = shard(model())
    results["reason"] = sharded.reason_not_to_measure(module)
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    held = {name: p.grad for name, p in module.named_parameters()}
    weights = {name: p.to_local().clone() for name, p in module.named_parameters()}
    for size in (1, 2):
        results[f"units of {size}"] = grams(module, size)
    results["pattern"] = grams(module, patterns="layers.1.*")
    done = []
    for budget in BUDGETS:
        done.clear()
        results[f"within {budget}"] = grams(
            module, memory_budget=budget, progress=lambda now, total: done.append((now, total))
        )
        results[f"passes within {budget}"] = done[-1]
    torch.manual_seed(rank)
    first = grams(module, dropout=True)
    torch.manual_seed(rank)
    again = grams(module, dropout=True, memory_budget="8KB")
    results["dropout"] = (first, again)
    results["gradients kept"] = all(p.grad is held[name] for name, p in module.named_parameters())
    results["weights kept"] = all(torch.equal(p.to_local(), weights[name]) for name, p in module.named_parameters())
    results["buffers kept"] = all(
        torch.equal(buffer, dict(model().named_buffers())[name]) for name, buffer in module.named_buffers()
    )

    def failing(module, batch):
        value = loss(module, batch)
        if rank == 1 and batch[0][0, 0, 0] == unit(3, 1, 2)[0][0, 0, 0]:
            raise ZeroDivisionError("on rank 1")
        return value

    try:
        target = objective(module, failing)
        sharded.gram_of_units(together, target, [unit(i, rank, 2) for i in range(UNITS)], 2, dropout=False)
    except (ZeroDivisionError, RuntimeError) as error:
        results["failure"] = f"{type(error).__name__}: {error}"
    try:
        grams(module, memory_budget=5 if rank else None)
    except (ValueError, RuntimeError) as error:
        results["budget"] = f"{type(error).__name__}: {error}"
    results["after failures"] = grams(module)
    module.eval()
    with torch.no_grad():  # after which the weights are left gathered
        module(unit(0, rank, 2)[0])
    module.train()
    sharded.reshard(module)
    results["after evaluation"] = grams(module)
    low = shard(model().float(), {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32})
    half = objective(low, lambda module, batch: loss(module, (batch[0].bfloat16(), batch[1])))
    units = [unit(i, rank, 16) for i in range(UNITS)]  # statistics of two samples would magnify the rounding
    results["bfloat16"] = sharded.gram_of_units(together, half, units, 16, dropout=False)
    partly = model()
    for layer in partly.layers:
        from torch.distributed.fsdp import fully_shard

        fully_shard(layer)
    results["partly"] = sharded.reason_not_to_measure(partly)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp")
    mp.spawn(on_rank, args=(str(out / "store"), str(out)), nprocs=RANKS)
    return [torch.load(out / f"{rank}.pt") for rank in range(RANKS)]


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(got) == list(want)
    scale = sum(want.values()).diagonal().max()
    for name, gram in got.items():
        torch.testing.assert_close(gram.double() / scale, want[name] / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("case", "size", "patterns"),
    [
        ("units of 1", 1, "*"),
        ("units of 2", 2, "*"),
        ("pattern", 2, "layers.1.*"),
        *((f"within {budget}", 2, "*") for budget in BUDGETS),
        ("after failures", 2, "*"),
        ("after evaluation", 2, "*"),
    ],
)
def test_gram_is_that_of_the_whole_module(case, size, patterns, on_ranks):
    for rank in on_ranks:
        assert_equal(rank[case], expected(size, patterns), 1e-12)
        assert all(torch.equal(gram, on_ranks[0][case][name]) for name, gram in rank[case].items()), "on all ranks"


def test_budgets_hold_blocks_of_shards(on_ranks):
    passes = [on_ranks[0][f"passes within {budget}"] for budget in BUDGETS]
    assert passes[0] == (UNITS, UNITS)
    assert passes[1][1] > passes[2][1] > UNITS
    assert all(done == total for done, total in passes)


def test_masks_are_the_same_when_gradients_are_computed_again(on_ranks):
    for rank in on_ranks:
        once, again = rank["dropout"]
        assert_equal(again, once, 1e-12)
        assert not torch.allclose(once["head.weight"], expected(2)["head.weight"], rtol=1e-3)


def test_nothing_is_left_behind(on_ranks):
    for rank in on_ranks:
        assert rank["gradients kept"] and rank["weights kept"] and rank["buffers kept"]


def test_a_rank_that_fails_takes_all_with_it(on_ranks):
    assert on_ranks[1]["failure"] == "ZeroDivisionError: on rank 1"
    assert "another rank could not measure" in on_ranks[0]["failure"]
    for rank in on_ranks:
        assert "no room for two gradients" in rank["budget"]


def test_reduced_precision_is_that_of_the_policy(on_ranks):
    assert_equal(on_ranks[0]["bfloat16"], expected(16), 0.05)
    assert all(gram.dtype == torch.float32 for gram in on_ranks[0]["bfloat16"].values())


def test_what_cannot_be_read_is_named(on_ranks):
    assert on_ranks[0]["reason"] is None
    assert "parameter 'position' is not sharded by fully_shard" in on_ranks[0]["partly"]
