"""Compare the gradient confusion of saved runs: a table, and a figure of their curves."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_gradconf.plots import plot_runs
from lightning_gradconf.reports.saved_runs import Curve, loss_keys, read_sources, with_confusion
from lightning_gradconf.reports.settings import Settings, why_not_comparable

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"  # from low to high
_WIDTH = 24  # of a sparkline


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments``, by default the process's own, and return its exit status."""
    parser = argparse.ArgumentParser("python -m lightning_gradconf", description=__doc__)
    parser.add_argument("logdir", nargs="+", help="folder with TensorBoard event files or a metrics.csv, or above them")
    parser.add_argument("--keys", nargs="+", help="what to show beside confusion, instead of losses and accuracies")
    parser.add_argument("--prefix", default="gradient_confusion", help="of the callback's keys (default: %(default)s)")
    parser.add_argument("--output", default="confusion.png", help="where the figure goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        found, settings = read_sources(options.logdir, options.prefix)
        runs = with_confusion(found, options.keys, options.prefix)
        settings = {name: of for name, of in settings.items() if name in runs}
        print(table(runs, options.keys, options.prefix, _levels(sys.stdout.encoding), settings))
        if others := [name for name in found if name not in runs]:
            print(f"Left out, without {options.prefix}/min_cosine: {', '.join(others)}")
        plot_runs(runs, options.keys, options.prefix, settings).savefig(options.output)
    except (ImportError, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"\nThe curves are in {Path(options.output)}")
    return 0


def table(
    runs: Mapping[str, Mapping[str, Curve]],
    keys: Sequence[str] | None = None,
    prefix: str = "gradient_confusion",
    levels: str = _ASCII,
    settings: Mapping[str, Settings] | None = None,
) -> str:
    """Return a row for each of ``runs``: its last step, last and worst values, and ``min_cosine`` as a sparkline.

    The sparklines of all runs have one scale, written below them. ``keys`` are shown by their last values, by default
    the first loss. Where ``settings`` of a run are known, its row has them, and a line says which runs cannot be
    compared.

    >>> curves = {"gradient_confusion/min_cosine": {0: 0.5, 50: -0.25}, "train_loss": {50: 1.5}}
    >>> print(table({"a": curves}, settings={"a": Settings(32, 1, "ghost")}))
    run   n  unit_size  engine  step  min_cosine    worst  p05_cosine  eta  train_loss  min_cosine
    a    32          1   ghost    50     -0.2500  -0.2500           -    -      1.5000  #_
    min_cosine: _ is -0.25, # is 0.50
    """
    if keys is None:
        others = {key for curves in runs.values() for key in curves if not key.startswith(f"{prefix}/")}
        keys = loss_keys(others)[:1]
    lowest = [curves[f"{prefix}/min_cosine"] for curves in runs.values()]
    finite = [value for curve in lowest for value in curve.values() if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    settings = settings or {}
    rows = [["run", *Settings._fields, "step", "min_cosine", "worst", "p05_cosine", "eta", *keys, "min_cosine"]]
    for (name, curves), curve in zip(runs.items(), lowest, strict=True):
        last = [curves.get(key, {}) for key in (f"{prefix}/p05_cosine", f"{prefix}/eta", *keys)]
        worst = min((value for value in curve.values() if math.isfinite(value)), default=math.nan)
        numbers = [_last(curve), f"{worst:.4f}", *map(_last, last)]
        known = ["-" if value is None else str(value) for value in settings.get(name, (None,) * 3)]
        rows.append([name, *known, str(max(curve)), *numbers, sparkline(list(curve.values()), low, high, levels)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, middle, widths[1:-1]), last])
        for first, *middle, last in rows
    ]
    lines.append(f"min_cosine: {levels[0]} is {low:.2f}, {levels[-1]} is {high:.2f}")
    if reason := why_not_comparable(settings.values()):
        lines.append(f"Not comparable: {reason}.")
    return "\n".join(lines)


def sparkline(values: Sequence[float], low: float, high: float, levels: str = _ASCII) -> str:
    """Return ``values`` as characters of ``levels``, from ``low`` to ``high``; means where they are many, "?" for NaN.

    >>> sparkline([0.0, 0.5, 1.0, float("nan")], 0, 1)
    '_+#?'
    """
    characters = []
    for column in range(min(len(values), _WIDTH)):
        width = max(len(values) / _WIDTH, 1)
        part = values[int(column * width) : max(int((column + 1) * width), int(column * width) + 1)]
        mean = sum(part) / len(part)
        share = (mean - low) / (high - low) if high > low else 0.0
        characters.append("?" if math.isnan(mean) else levels[round(share * (len(levels) - 1))])
    return "".join(characters)


def _last(curve: Curve) -> str:
    return f"{curve[max(curve)]:.4f}" if curve else "-"


def _levels(encoding: str | None) -> str:
    """Return blocks where ``encoding`` has them."""
    try:
        _BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _ASCII
    return _BLOCKS


if __name__ == "__main__":
    sys.exit(main())
