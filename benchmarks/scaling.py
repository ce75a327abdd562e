"""How time and memory grow with units, parameters, samples a unit, the memory budget and ranks: numbers and a figure.

    python benchmarks/scaling.py [--out docs/images/scaling.png]
    python benchmarks/scaling.py --protocol                          the paper's protocol on a WRN-16-2

Every engine is measured in a process of its own, on one thread: the median processor time of a few calls after a first
one, and the highest resident memory during a call above that before. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import status
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from lightning_gradconf import gradient_gram
from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.blockwise import make_plan
from lightning_gradconf.gram.objective import objective, sizes
from lightning_gradconf.gram.ranks.process_group import new_process_group
from lightning_gradconf.gram.select import gram_of_units

ENGINES = ("ghost", "vmap", "loop")
REPEATS = 3
# Memory goes back to the system as soon as it is freed.
ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
POINTS = {
    "units": [{"n": n} for n in (4, 8, 16, 32, 64)],
    "parameters": [{"width": width} for width in (256, 512, 1024)],
    "samples a unit": [{"k": k} for k in (1, 4, 16)],
}
BUDGETS = (1 / 2, 1 / 4, 1 / 8)


def model_of(width: int) -> nn.Sequential:
    """Return an MLP of five layers; 1.1 million parameters at a width of 512."""
    torch.manual_seed(0)
    inner = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *inner, nn.Linear(width, 10))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(action: Callable[[], object]) -> tuple[float, float]:
    """Return seconds of processor time, and megabytes above what was there before, after a first call."""
    action()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return statistics.median(seconds), (status("VmHWM") - before) / 1024


def point(engine: Any, n: int = 32, k: int = 1, width: int = 512, share: float | None = None) -> dict[str, float]:
    """Measure one engine on n units of k samples; ``share`` is the budget as a part of what all gradients take."""
    model = model_of(width)
    p = sum(parameter.numel() for parameter in model.parameters())
    batch = torch.randn(n * k, 64), torch.arange(n * k) % 10

    def ordinary() -> None:
        loss_of(model, batch).backward()
        model.zero_grad()

    budget = None if share is None else int(share * n * p * 4)
    chunk = 1 if engine == "loop" else None
    passes = n if budget is None else make_plan(n, sizes(model.parameters()), budget, chunk).passes

    def engines() -> None:
        gradient_gram(model, loss_of, batch, engine=engine, unit_size=k, memory_budget=budget)

    seconds, megabytes = measured(ordinary if engine == "ordinary" else engines)
    return {"seconds": seconds, "megabytes": megabytes, "parameters": p, "passes": passes}


def on_rank(rank: int, ranks: int, folder: str, engine: str, n: int, share: float | None) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    model = model_of(512)
    p = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(rank)
    units = split((torch.randn(n, 64, generator=generator), torch.arange(n) % 10), 1)
    target, together = objective(model, loss_of), new_process_group(torch.device("cpu"))
    budget = None if share is None else int(share * n * p * 4)
    sent = []
    exchange, gather = dist.all_to_all_single, dist.gather

    def counted_exchange(output: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup) -> None:
        sent.append(mine.nbytes * (ranks - 1) // ranks)  # a rank keeps its own part
        exchange(output, mine, group=group)

    def counted_gather(mine: torch.Tensor, into: Any, *, dst: int, group: dist.ProcessGroup) -> None:
        sent.append(0 if dst == rank else mine.nbytes)
        gather(mine, into, dst=dst, group=group)

    vars(dist).update(all_to_all_single=counted_exchange, gather=counted_gather)
    how = together, target, units, 1, engine
    gram_of_units(*how, memory_budget=budget)  # which proves what it reads
    sent.clear()
    seconds, megabytes = measured(lambda: gram_of_units(*how, memory_budget=budget))
    passes = n if budget is None else make_plan(n, sizes(model.parameters()), budget).passes
    result = {"seconds": seconds, "megabytes": megabytes, "sent": sum(sent) / (REPEATS + 2) / 1e6, "parameters": p}
    Path(folder, f"{rank}.json").write_text(json.dumps(result | {"passes": passes}))
    dist.barrier()
    dist.destroy_process_group()


def over_ranks(ranks: int, engine: str, n: int, share: float | None) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(on_rank, args=(ranks, folder, engine, n, share), nprocs=ranks)
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def protocol() -> None:
    """Two measurements of the paper's protocol, at the start and after an epoch, within a budget of 1 GB."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from examples.paper.models import build
    from lightning_gradconf import GradientConfusionCallback

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("wrn-16-2", (3, 32, 32), 10)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Watch(GradientConfusionCallback):
        start: float | None = None

        def should_measure(self, trainer: pl.Trainer) -> bool:
            gc.collect()
            self.before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            self.start = time.process_time()
            return True

        def on_train_batch_start(self, *args: Any) -> None:
            super().on_train_batch_start(*args)
            self.tell()

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            self.tell()

        def tell(self) -> None:
            if self.start is not None:
                seconds, more = time.process_time() - self.start, (status("VmHWM") - self.before) / 1024
                print(f"measured in {seconds:.1f} s, {more:.0f} MB above what was there before")
            self.start = None

    pl.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    samples = 100 * 128
    data = TensorDataset(torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,)))
    confusion = Watch(every_n_epochs=1, source="fresh", num_units=15, unit_size=128, memory_budget="1GB")
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=4, callbacks=[confusion], logger=False, enable_checkpointing=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    module = Classifier()
    batch = [part[:128] for part in data.tensors]
    seconds, megabytes = measured(lambda: module.training_step(batch, 0).backward())
    module.zero_grad()
    print(f"an ordinary pass of 128 samples: {seconds:.2f} s, {megabytes:.0f} MB")
    trainer.fit(module, DataLoader(data, batch_size=128, shuffle=True))
    assert confusion.last_gram is not None
    print(confusion.last_statistics, tuple(confusion.last_gram.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling.png"))
    parser.add_argument("--protocol", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.protocol:
        protocol()
    elif options.engine:
        print(json.dumps(all_points(options.engine)))
    else:
        everything(options.out)


def fresh(engine: str) -> dict[str, list[dict[str, float]]]:
    """Measure all points of one engine, in a process of its own."""
    command = [sys.executable, __file__, "--engine", engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENV, check=True)
    points: dict[str, list[dict[str, float]]] = json.loads(done.stdout)
    return points


def all_points(engine: str) -> dict[str, list[dict[str, float]]]:
    found = {name: [point(engine, **options) for options in points] for name, points in POINTS.items()}
    if engine in ENGINES[1:]:
        found["budget"] = [point(engine, share=share) for share in (None, *BUDGETS)]
    return found


def row(*cells: object) -> None:
    print(
        "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def everything(out: Path) -> None:
    os.environ |= ENV  # for the processes of ranks
    found = {engine: fresh(engine) for engine in ("ordinary", *ENGINES)}
    for name, points in POINTS.items():
        row(name, *(f"{engine}, {what}" for engine in found for what in ("s", "MB")))
        for i, options in enumerate(points):
            x = next(iter(options.values())) if name != "parameters" else found["loop"][name][i]["parameters"]
            row(x, *(found[engine][name][i][what] for engine in found for what in ("seconds", "megabytes")))
    row("budget", "gradients computed", *(f"{engine}, {what}" for engine in ENGINES[1:] for what in ("s", "MB")))
    for i, share in enumerate((None, *BUDGETS)):
        results = [found[engine]["budget"][i] for engine in ENGINES[1:]]
        passes = [result["passes"] for result in results]
        row(share or "all", passes, *(result[what] for result in results for what in ("seconds", "megabytes")))
    plot(found, out)
    row("ranks", "engine", "units a rank", "budget", "s", "MB a rank", "MB sent a rank", "gradients computed a rank")
    loops = ((1, 32, None), (2, 16, None), (2, 32, None), (2, 16, 1 / 2), (2, 16, 1 / 4))
    ghosts = ((1, 32, None), (2, 16, None), (2, 32, None))
    for engine, (ranks, n, share) in (*product(["loop"], loops), *product(["ghost"], ghosts)):
        results = over_ranks(ranks, engine, n, share)
        most = {key: max(result[key] for result in results) for key in results[0]}
        row(ranks, engine, n, share or "all", most["seconds"], most["megabytes"], most["sent"], int(most["passes"]))


def plot(found: dict[str, dict[str, list[dict[str, float]]]], out: Path) -> None:
    from matplotlib.figure import Figure

    colors = dict(zip(("ordinary", *ENGINES), ("0.5", "tab:green", "tab:orange", "tab:blue"), strict=True))
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(2, 4)
    labels = {"units": "units n", "parameters": "parameters P", "samples a unit": "samples a unit"}
    rows = {"seconds": "processor time, s", "megabytes": "peak memory, MB"}
    for line, (what, label) in enumerate(rows.items()):
        for column, (name, points) in enumerate(POINTS.items()):
            axis = axes[line, column]
            xs: list[float] = [next(iter(options.values())) for options in points]
            if name == "parameters":
                xs = [result["parameters"] for result in found["loop"][name]]
            for engine, color in colors.items():
                title = "ordinary pass" if engine == "ordinary" else engine
                values = [result[what] for result in found[engine][name]]
                axis.loglog(xs, values, "o-", color=color, label=title if line == column == 0 else None, markersize=3)
            axis.set_xticks(xs, [f"{x / 1e6:.2g} M" if x > 1e5 else str(x) for x in xs])
            axis.minorticks_off()
            axis.set_xlabel(labels[name])
            axis.set_ylabel(label)
        axis = axes[line, 3]
        for engine in ENGINES[1:]:
            results = found[engine]["budget"]
            xs = [result["passes"] / 32 for result in results]
            axis.plot(xs, [result[what] for result in results], "o-", color=colors[engine], markersize=3)
        axis.set_xlabel("gradients computed / n")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    for axis, title in zip(axes[0], ("more units", "more parameters", "larger units", "less memory"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
