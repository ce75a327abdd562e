"""Peak memory of each engine beside that of one ordinary forward and backward pass of the same samples.

    python benchmarks/memory.py [--workloads mlp gpt] [--engines ghost vmap loop]

Each number comes from a process of its own: the highest resident memory during a call above that before it.
``ghost, first`` includes its first call, which proves what it reads; the other columns come after two. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch
from speed import ENGINES, MAIN, engine, ordinary
from workloads import WORKLOADS, build


def peak(workload: str, method: str, first: bool) -> float:
    """Return the megabytes that a method takes above the loaded model and data."""
    work = build(workload)
    function = ordinary(work) if method == "ordinary" else engine(work, method)
    for _ in range(0 if first else 2):  # the second measurement has a proof too
        function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call left behind counts as taken again
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    function()
    return (status("VmHWM") - before) / 1024


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(MAIN), choices=list(WORKLOADS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(peak(options.one[0], options.one[1], options.one[2] == "first"))
        return
    columns = ["ordinary", *options.engines, *(["ghost, first"] if "ghost" in options.engines else [])]
    print("| workload | " + " | ".join(f"{column}, MB" for column in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for workload in options.workloads:
        cells = []
        for method in columns:
            name, _, first = method.partition(", ")
            command = [sys.executable, __file__, "--one", workload, name, first or "later"]
            result = subprocess.run(command, capture_output=True, text=True)
            cells.append(f"{float(result.stdout):.0f}" if result.returncode == 0 else "fails")
        print(f"| {workload} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
