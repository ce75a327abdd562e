"""Two classes against each other: half of one class is labelled as the other, seen by ``labels``."""

from __future__ import annotations

from typing import Any

import torch
from classes import class_cosines
from common import Result, cnn, digits, heatmaps, span, train
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

FIRST, SECOND = 3, 8


def run(fast: bool = False) -> Result:
    steps, seeds = (20, (0,)) if fast else (400, range(5))
    found: dict[str, list[tuple[float, ...]]] = {}
    pictures: dict[str, Tensor] = {}
    for seed in seeds:
        clean, test = digits(seed, flat=False)
        images, right = clean.tensors
        wrong = right.clone()
        wrong[(right == SECOND).nonzero()[::2, 0]] = FIRST
        for name, labels, longer in (
            ("half of the 8s labelled 3", wrong, 1),
            ("trained twice as long", wrong, 2),
            ("labels corrected", right, 1),
        ):
            # Ten images of each label, from those that are trained on.
            chosen = torch.cat([(labels == label).nonzero()[:10, 0] for label in range(10)])
            source = DataLoader(TensorDataset(images[chosen], labels[chosen]), 100)
            measured: dict[str, Any] = {
                "source": source,
                "num_units": 100,
                "labels": 1,
                "every_n_train_steps": steps * longer,
            }
            data = TensorDataset(images, labels)
            done = train(cnn, data, steps=steps * longer + 1, seed=seed, **measured)
            cosines = class_cosines(done.gram, labels[chosen])
            rows, columns = torch.triu_indices(10, 10, offset=1)
            others = cosines[rows, columns][(rows != FIRST) | (columns != SECOND)]
            correct = done.net(test.tensors[0]).argmax(1) == test.tensors[1]
            both = (test.tensors[1] == FIRST) | (test.tensors[1] == SECOND)
            shares = [correct[part].float().mean().item() for part in (both, ~both)]
            found.setdefault(name, []).append((cosines[FIRST, SECOND].item(), others.min().item(), *shares))
            pictures.setdefault(name, cosines)
    table = [["training", "cosine of 3 and 8", "lowest of the other pairs", "accuracy on 3 and 8", "on the others"]]
    table += [[name, *map(span, zip(*values, strict=True))] for name, values in found.items()]
    return Result(table, heatmaps(pictures, limit=0.6))
