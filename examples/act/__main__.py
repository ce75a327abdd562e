"""What to do with a bad value: every symptom of docs/act.md, what was tried against it, and what it changed.

Prints the tables of that page and saves its figures. The data comes with scikit-learn and Python. All together take
some ten minutes on one core; ARGS="layer classes" runs these two alone.

    make example NAME=act
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

EXAMPLES = (
    "few_pairs",
    "batch_size",
    "depth",
    "layer",
    "class_pair",
    "classes",
    "start",
    "rate_drop",
    "rate_too_large",
    "not_a_number",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"of {', '.join(EXAMPLES)}; all by default")
    parser.add_argument("--pictures", type=Path, default=Path("runs/act"), help="where the figures go")
    parser.add_argument("--fast", action="store_true", help="a few steps of each, to see that everything works")
    args = parser.parse_args()
    if unknown := set(args.examples) - set(EXAMPLES):
        parser.error(f"no example {', '.join(sorted(unknown))}: choose from {', '.join(EXAMPLES)}")
    args.pictures.mkdir(parents=True, exist_ok=True)
    for name in args.examples or EXAMPLES:
        start = time.monotonic()
        result = importlib.import_module(name).run(args.fast)
        picture = args.pictures / f"act_{name}.png"
        result.figure.savefig(picture)
        print(f"\n## {name}: {time.monotonic() - start:.0f} seconds, {picture}\n\n{result}", flush=True)


if __name__ == "__main__":
    main()
