"""One layer in conflict: a bottleneck, found by ``per_layer`` and widened."""

from __future__ import annotations

from functools import partial
from typing import Any

from common import Result, digits, mlp, panels, span, train

LAYERS = {"net.0": "64 to 64", "net.2": "64 to k", "net.4": "k to 64", "net.6": "64 to 10"}


def run(fast: bool = False) -> Result:
    steps, seeds = (20, (0,)) if fast else (900, range(5))
    train_set, test = digits()
    variants: dict[str, tuple[int, dict[str, Any]]] = {
        "k = 4": (4, {}),
        "k = 4, larger batch (256)": (4, {"batch_size": 256}),
        "k = 16": (16, {}),
        "k = 64": (64, {}),
    }
    table = [["network", *(f"{name} ({what})" for name, what in LAYERS.items()), "training loss", "test accuracy"]]
    found = {}
    for name, (k, options) in variants.items():
        runs = [
            train(partial(mlp, 64, 64, k, 64, 10), train_set, steps=steps, seed=seed, per_layer=True, **options)
            for seed in seeds
        ]
        found[name] = runs[0]
        lowest = [span([run.at(f"min_cosine/{layer}", 0) for run in runs]) for layer in LAYERS]
        table.append(
            [name, *lowest, span([r.loss(train_set) for r in runs]), span([r.accuracy(test) for r in runs], 3)]
        )
    figure, axes = panels([f"{name}, lowest cosine by layer" for name in ("k = 4", "k = 64")])
    for panel, name in zip(axes, ("k = 4", "k = 64"), strict=True):
        for (layer, what), colour in zip(LAYERS.items(), ("#8c8c8c", "#c44e52", "#4c80b6", "#55a868"), strict=True):
            curve = found[name].curve(f"min_cosine/{layer}")
            panel.plot(list(curve), list(curve.values()), color=colour, linewidth=1.2, label=f"{layer} ({what})")
        panel.set(ylim=(-1.03, 0.03))
        panel.set_xlabel("step", fontsize=8)
    axes[0].legend(frameon=False, fontsize=7)
    return Result(table, figure)
