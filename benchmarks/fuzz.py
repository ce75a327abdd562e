"""Measure thousands of random models with each engine, and print every one that is not what plain autograd gives.

    python benchmarks/fuzz.py [--models 2000] [--seed 0] [--engine auto]

Four measurements of each model, in float64. What is found is shortened as far as it still fails, and printed as a
recipe for `gram.random_graphs.deviation` of the tests.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gram.random_graphs import Recipe, deviation, draw, shortened


def main() -> None:
    """Draw, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning_gradconf").setLevel(logging.ERROR)
    rng, engines, found, start = random.Random(options.seed), Counter[str](), 0, time.monotonic()

    def trouble(recipe: Recipe) -> str | None:
        wrong: str | None
        try:
            wrong, used = deviation(recipe, options.engine)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.120}"
        engines.update(used)
        return wrong

    for i in range(1, options.models + 1):
        recipe = draw(rng)
        if (wrong := trouble(recipe)) is not None:
            found += 1
            shorter = shortened(recipe, lambda other: trouble(other) is not None)
            print(f"{wrong}\n    {shorter}\n    {trouble(shorter)}", flush=True)
        if i % 200 == 0 or i == options.models:
            print(f"{i} models, {time.monotonic() - start:.0f} s, {found} wrong, {dict(engines)}", flush=True)


if __name__ == "__main__":
    main()
