"""Time of a measurement on two ranks over that of one ordinary forward and backward pass of a rank's samples.

    python benchmarks/ranks.py [--workloads mlp gpt] [--ranks 2] [--rounds 3]

gloo processes with one thread each, on as many cores; the Gram is that of all ranks' units.
The first measurement, which proves what it reads, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from speed import MAIN, ordinary
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from workloads import build

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks.process_group import new_process_group
from lightning_gradconf.gram.select import gram_of_units

ENGINES = ("ghost", "vmap")


def measure(rank: int, ranks: int, store: str, workloads: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    together = new_process_group(torch.device("cpu"))
    for name in workloads:
        work = build(name)
        target, units = objective(work.model, work.loss), split(work.batch, work.unit_size)

        measured = partial(gram_of_units, together, target, units, work.unit_size)
        engines = {engine: partial(measured, engine) for engine in ENGINES}
        methods: dict[str, Callable[[], object]] = {"ordinary": ordinary(work), **engines}
        times: dict[str, list[float]] = {method: [] for method in methods}
        for i in range(rounds + 1):
            for method, run in methods.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                if i:
                    times[method].append(time.perf_counter() - start)
        if rank == 0:
            medians = {method: statistics.median(of) for method, of in times.items()}
            ratios = "  ".join(f"{method} {medians[method] / medians['ordinary']:.2f}" for method in methods)
            print(f"{name:10s} ordinary {1000 * medians['ordinary']:.0f} ms  {ratios}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(MAIN))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)  # measurements 2, 4 and 8 have proofs, the median has none
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        spawn(measure, (options.ranks, store, options.workloads, options.rounds), nprocs=options.ranks)


if __name__ == "__main__":
    main()
