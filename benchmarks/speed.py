"""Time of each engine over that of one ordinary forward and backward pass of the same samples.

    python benchmarks/speed.py [--workloads mlp gpt] [--methods ghost vmap loop opacus] [--rounds 7] [--threads 1]

All methods take turns in one process, and the numbers are medians. With one thread the time is that of the processor,
which is the time on the clock of an idle machine, and on a busy one leaves out what others do. Peers that are installed
(`pip install -e '.[bench]'`) are among the methods; before anything is timed, its Gram is compared with that of
the loop. The first measurement of ghost, which calibrates, is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from peers import PEERS
from torch import Tensor
from workloads import WORKLOADS, Workload, build

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.ghost.engine import Memory
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.select import gram_of_units

MAIN = ("mlp", "cnn", "resnet18", "gpt", "lstm", "encoder")
ENGINES = ("ghost", "vmap", "loop")
WRONG = 1e-2  # of the product of two norms: an error that float32 does not explain


def ordinary(work: Workload) -> Callable[[], None]:
    def step() -> None:
        work.loss(work.model, work.batch).backward()
        work.model.zero_grad()

    return step


def engine(work: Workload, name: str) -> Callable[[], Tensor]:
    target, memory = objective(work.model, work.loss), Memory()
    units = split(work.batch, work.unit_size)

    def measure() -> Tensor:
        grams = list(gram_of_units(target, units, work.unit_size, name, memory=memory)[0].values())
        return sum(grams[1:], grams[0])

    return measure


def method(work: Workload, name: str) -> Callable[[], Tensor]:
    return PEERS[name](work) if name in PEERS else engine(work, name)


def seconds(function: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def error(got: Tensor, want: Tensor) -> float:
    norms = want.diagonal().sqrt()
    return float(((got - want).abs() / norms.outer(norms)).max())


def compare(name: str, methods: list[str], rounds: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return the cells of a workload, and for methods without a time the reason."""
    want = engine(build(name), "loop")()
    functions: dict[str, Callable[[], object]] = {"ordinary, ms": ordinary(build(name))}
    first, cells, reasons = 0.0, {}, {}
    for each in methods:
        try:
            found: list[Tensor] = []
            function = method(build(name), each)
            took = seconds(lambda function=function, found=found: found.append(function()))
            if (off := error(found[0], want)) > WRONG:
                raise ArithmeticError(f"the Gram is wrong by {off:.2g}")
            function()
            functions[each] = function
            first = took if each == "ghost" else first
        except Exception as problem:
            cells[each], reasons[each] = (
                "fails",
                f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]:.90}",
            )
    times: dict[str, list[float]] = {each: [] for each in functions}
    for turn in range(rounds + 1):
        for each, function in functions.items():
            taken = seconds(function)
            if turn:  # the first round warms up
                times[each].append(taken)
    base = statistics.median(times.pop("ordinary, ms"))
    cells |= {each: f"{statistics.median(taken) / base:.2f}" for each, taken in times.items()}
    return cells | {"ordinary, ms": f"{1000 * base:.3g}", "ghost, first": f"{first / base:.1f}"}, reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(MAIN), choices=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", default=[*ENGINES, *PEERS], choices=[*ENGINES, *PEERS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # each engine and peer has some to give, of operations without a batching rule
    columns = ["ordinary, ms", *options.methods, *(["ghost, first"] if "ghost" in options.methods else [])]
    print("| workload | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    failures = []
    for name in options.workloads:
        cells, reasons = compare(name, options.methods, options.rounds)
        print(f"| {name} | " + " | ".join(cells[column] for column in columns) + " |", flush=True)
        failures += [f"{name}, {each}: {reason}" for each, reason in reasons.items()]
    print("", *failures, sep="\n")


if __name__ == "__main__":
    main()
