"""What it costs a training step to be ridden on: time over the same step without, methods taking turns."""

from __future__ import annotations

import statistics
import sys
import time

import torch
from workloads import Workload, build

from lightning_gradconf.batches.units import num_samples, split
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.ghost import ride
from lightning_gradconf.gram.objective import objective
from lightning_gradconf.gram.ranks.data_parallel import gram_of_factors
from lightning_gradconf.gram.ranks.process_group import Ranks

ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("mlp", "cnn", "resnet18", "gpt", "lstm", "encoder"):
        work = build(name)
        samples, memory = num_samples(work.batch), ghost.Memory()
        target = objective(work.model, work.loss)
        units = split(work.batch, 1)
        ghost.unit_grams(target, units, 1, memory)

        counts = [0, *sorted({samples, min(samples, 32), 8})]
        times: dict[int, list[float]] = {first: [] for first in counts}
        for _ in range(3 + ROUNDS):
            for first in counts:
                times[first].append(step(work, first, memory))
        plain = statistics.median(times[0][3:])
        own = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            ghost.unit_grams(target, units[:32], 1, memory)
            own.append(time.perf_counter() - start)
        shown = ", ".join(f"{n} units +{statistics.median(times[n][3:]) / plain - 1:.2f}" for n in counts[1:])
        print(f"{name}: {1e3 * plain:.0f} ms; riding {shown}; pass of its own {statistics.median(own[2:]) / plain:.2f}")


def step(work: Workload, first: int, memory: ghost.Memory, together: Ranks | None = None) -> float:
    """Seconds that a forward and backward pass takes, with the first so many units measured, of each rank or here."""
    for p in work.model.parameters():
        p.grad = None
    start = time.perf_counter()
    loss = work.loss(work.model, work.batch)
    if first:
        parameters = dict(work.model.named_parameters())
        samples = num_samples(work.batch)
        ridden = ride.board(loss.grad_fn, parameters, samples, 1, first, memory, keep=together is not None)
        ridden.listen(loss.grad_fn)
    loss.backward()
    if first:
        ridden.leave()
        if together is None:
            ridden.grams()
        else:
            gram_of_factors(together, parameters, ridden.factors(), first, memory.work)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
