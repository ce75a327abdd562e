"""Time of each engine over that of one ordinary forward and backward pass of the same samples.

    python benchmarks/speed.py [--workloads mlp gpt] [--methods ghost vmap loop opacus] [--rounds 7] [--threads 1]

All methods take turns in one process, and the numbers are medians. With one thread the time is that of the processor,
which is the time on the clock of an idle machine, and on a busy one leaves out what others do. Peers that are installed
(`pip install -e '.[bench]'`) are among the methods; before anything is timed, its Gram is compared with that of
the loop. The first measurement of ghost, which proves what it reads, is timed by itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peers import PEERS, Losses
from torch import Tensor, nn
from workloads import WORKLOADS, Workload, build

from lightning_gradconf.batches.units import split
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks.process_group import Ranks
from lightning_gradconf.gram.select import gram_of_units, in_words

MAIN = ("mlp", "cnn", "resnet18", "gpt", "lstm", "encoder")
ENGINES = ("ghost", "vmap", "loop")
WRONG = 1e-2  # of the product of two norms: an error that float32 does not explain


class Measured(NamedTuple):
    """A model with its loss, a batch of ``unit_size`` samples for each unit, and the losses of samples for others."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    batch: Any
    losses: Losses | None = None
    unit_size: int = 1


def ordinary(work: Workload | Measured) -> Callable[[], None]:
    """Return one forward and backward pass."""

    def step() -> None:
        work.loss(work.model, work.batch).backward()
        work.model.zero_grad()

    return step


def engine(work: Workload | Measured, name: str, used: list[str] | None = None) -> Callable[[], Tensor]:
    """Return a measurement that gives the whole Gram, and adds the engine to ``used``."""
    target, units = objective(work.model, work.loss), split(work.batch, work.unit_size)

    def measure() -> Tensor:
        options: dict[str, Any] = {"dropout": False, "memory_budget": None, "progress": None, "train_batch_size": None}
        found, by = gram_of_units(Ranks(target.device), target, units, work.unit_size, name, **options)
        if used is not None:
            used.append(by)
        grams = list(found.values())
        return sum(grams[1:], grams[0])

    return measure


def method(work: Workload | Measured, name: str) -> Callable[[], Tensor]:
    """Return a measurement by an engine or a peer."""
    if name not in PEERS:
        return engine(work, name)
    if work.losses is None:
        raise NotImplementedError("takes the losses of samples, which this model does not give")
    return PEERS[name](work.model, work.batch, work.losses)


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each function; the first of the rounds only warms up."""
    times: dict[str, list[float]] = {each: [] for each in functions}
    for turn in range(rounds + 1):
        for each, function in functions.items():
            taken = seconds(function)
            if turn:
                times[each].append(taken)
    return {each: statistics.median(taken) for each, taken in times.items()}


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest error, in units of the norms of two gradients."""
    norms = want.diagonal().sqrt()
    return float(((got - want).abs() / norms.outer(norms)).max())


def import_everything() -> None:
    """Measure something small, so that the first measurement of others has nothing to import."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    work = Measured(net, lambda m, x: m(x).square().mean(), torch.randn(4, 3))
    for name in ENGINES:
        engine(work, name)()


def checked(work: Workload | Measured, name: str, want: Tensor) -> tuple[Callable[[], Tensor], float]:
    """Return a measurement that has the wanted Gram, and how long the first one took.

    Raises:
        ArithmeticError: It has another Gram.
        Exception: Whatever a library raises for a model that it does not cover.
    """
    function, found = method(work, name), list[Tensor]()
    took = seconds(lambda: found.append(function()))
    if (off := error(found[0], want)) > WRONG:
        raise ArithmeticError(f"the Gram is wrong by {off:.2g}")
    return function, took


def in_a_cell(problem: Exception) -> str:
    """Return what a table says where there is no time."""
    return str(problem).removeprefix("the Gram is ") if isinstance(problem, ArithmeticError) else "fails"


def compare(build: Callable[[], Measured], name: str, rounds: int, peers: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Return a row, and why peers failed.

    The row has milliseconds of a pass, the engine, a first and a later measurement in passes, how many milliseconds a
    later one is above the pass, the error, and the time of each peer in passes.
    """
    import_everything()
    want, work, used, found = engine(build(), "loop")(), build(), list[str](), list[Tensor]()
    step, measure = ordinary(build()), engine(work, name, used)  # a step changes the statistics of BatchNorm
    step()
    first = seconds(lambda: found.append(measure()))
    functions: dict[str, Callable[[], object]] = {"step": step, "measure": measure}
    cells, reasons = {}, []
    for peer in peers:
        try:
            functions[peer], _ = checked(build(), peer, want)
        except Exception as problem:
            cells[peer] = in_a_cell(problem)
            reasons.append(f"{peer}: {in_words(problem):.120}")
    median = in_turns(functions, rounds)
    base, later = median.pop("step"), median.pop("measure")
    above = 1000 * (later - base)
    off = error(found[0], want)
    row = [f"{1000 * base:.3g}", used[-1], f"{first / base:.1f}", f"{later / base:.2f}", f"{above:.1f}", f"{off:.0e}"]
    cells |= {peer: f"{taken / base:.2f}" for peer, taken in median.items()}
    return " | ".join([*row, *(cells[peer] for peer in peers)]), reasons


def table(name: str, methods: list[str], rounds: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return the cells of a workload, and for methods without a time the reason."""
    want = engine(build(name), "loop")()
    functions: dict[str, Callable[[], object]] = {"ordinary, ms": ordinary(build(name))}
    functions["ordinary, ms"]()
    first, cells, reasons = 0.0, {}, {}
    for each in methods:
        try:
            functions[each], took = checked(build(name), each, want)
            first = took if each == "ghost" else first
        except Exception as problem:
            cells[each], reasons[each] = in_a_cell(problem), f"{in_words(problem):.120}"
    median = in_turns(functions, rounds)
    base = median.pop("ordinary, ms")
    cells |= {each: f"{taken / base:.2f}" for each, taken in median.items()}
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
    import_everything()
    columns = ["ordinary, ms", *options.methods, *(["ghost, first"] if "ghost" in options.methods else [])]
    print("| workload | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    failures = []
    for name in options.workloads:
        cells, reasons = table(name, options.methods, options.rounds)
        print(f"| {name} | " + " | ".join(cells[column] for column in columns) + " |", flush=True)
        failures += [f"{name}, {each}: {reason}" for each, reason in reasons.items()]
    print("", *failures, sep="\n")


if __name__ == "__main__":
    main()
