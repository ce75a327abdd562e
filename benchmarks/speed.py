"""Time of each engine over that of one ordinary forward and backward pass of the same samples.

    python benchmarks/speed.py [--workloads mlp gpt] [--engines ghost vmap loop] [--rounds 7] [--threads 1]

All methods take turns in one process, so that a busy machine slows them alike; the numbers are medians. Peers are
timed if they are installed. The first measurement, which calibrates, is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from workloads import WORKLOADS, Workload, build

from lightning_gradconf.engines import gram_of_units
from lightning_gradconf.engines.ghost import Memory
from lightning_gradconf.engines.objective import objective
from lightning_gradconf.units import split

MAIN = ("mlp", "cnn", "resnet18", "gpt", "lstm", "encoder")


def ordinary(work: Workload) -> Callable[[], None]:
    def step() -> None:
        work.loss(work.model, work.batch).backward()
        work.model.zero_grad()

    return step


def engine(work: Workload, name: str) -> Callable[[], dict[str, Tensor]]:
    target, memory = objective(work.model, work.loss), Memory()
    units = split(work.batch, work.unit_size)

    def measure() -> dict[str, Tensor]:
        return gram_of_units(target, units, work.unit_size, name, memory=memory)[0]

    return measure


def torchjd(work: Workload) -> Callable[[], Tensor]:
    from torchjd.autogram import Engine

    autogram = Engine(work.model, batch_dim=0)

    def measure() -> Tensor:
        x, y = work.batch
        out = work.model(x)
        losses = torch.nn.functional.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="none")
        return autogram.compute_gramian(losses.view(len(x), -1).mean(1))

    return measure


def opacus(work: Workload) -> Callable[[], Tensor]:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(work.model)

    def measure() -> Tensor:
        work.loss(wrapped, work.batch).backward()
        rows = [p.grad_sample.flatten(1) for p in wrapped.parameters()]
        gram: Tensor = sum(row @ row.T for row in rows)
        wrapped.zero_grad()
        return gram

    return measure


def backpack(work: Workload) -> Callable[[], Tensor]:
    import backpack as library
    from backpack.extensions import BatchGrad

    model, cross_entropy = library.extend(work.model), library.extend(torch.nn.CrossEntropyLoss())

    def measure() -> Tensor:
        with library.backpack(BatchGrad()):
            cross_entropy(model(work.batch[0]), work.batch[1]).backward()
        rows = [p.grad_batch.flatten(1) for p in model.parameters()]
        gram: Tensor = sum(row @ row.T for row in rows)
        model.zero_grad()
        return gram

    return measure


PEERS = {"torchjd": torchjd, "opacus": opacus, "backpack": backpack}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name: str, methods: list[str], rounds: int) -> dict[str, float | str]:
    """Return the median time of each method over that of the ordinary pass, and of the first call of ``ghost``."""
    functions: dict[str, Callable[[], object]] = {"ordinary": ordinary(build(name))}
    ratios: dict[str, float | str] = {}
    first = {}
    for method in methods:
        try:
            work = build(name)
            functions[method] = PEERS[method](work) if method in PEERS else engine(work, method)
            first[method] = seconds(functions[method])
        except Exception as error:
            functions.pop(method, None)
            ratios[method] = type(error).__name__
    times: dict[str, list[float]] = {method: [] for method in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for method, function in functions.items():
            times[method].append(seconds(function))
    medians = {method: statistics.median(samples) for method, samples in times.items()}
    base = medians.pop("ordinary")
    ratios["ordinary, ms"] = 1000 * base
    ratios |= {method: median / base for method, median in medians.items()}
    if "ghost" in first:
        ratios["ghost, first"] = first["ghost"] / base
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(MAIN), choices=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", default=["ghost", "vmap", "loop"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = [*options.engines, *(peer for peer in PEERS if find_spec(peer))]
    columns = ["ordinary, ms", *methods, *(["ghost, first"] if "ghost" in methods else [])]
    print("| workload | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in options.workloads:
        row = compare(name, methods, options.rounds)
        cells = [row.get(column, "") for column in columns]
        print(f"| {name} | " + " | ".join(c if isinstance(c, str) else f"{c:.2f}" for c in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
