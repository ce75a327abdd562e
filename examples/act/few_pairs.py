"""A few strong conflicts among many weak ones: wrong labels, found by ``top_pairs`` and taken out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from common import Result, Run, digits, mlp, panels, sgd, span, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_gradconf.plots import draw_density

WRONG = 0.1  # share of wrong labels


def network() -> nn.Sequential:
    return mlp(64, 128, 128, 10)


def with_wrong_labels(data: TensorDataset, seed: int) -> tuple[TensorDataset, Tensor]:
    """Return the data with some labels replaced by another class, and which ones."""
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(WRONG * len(labels))]
    shift = torch.randint(1, 10, (len(wrong),), generator=generator)
    return TensorDataset(images, labels.index_copy(0, wrong, (labels[wrong] + shift) % 10)), wrong


def in_most_pairs(run: Run, number: int) -> tuple[Tensor, float]:
    """Return the samples that are in most of the pairs that ``top_pairs`` lists, and the share of places they fill."""
    found = Counter(i for pair in run.confusion.last_top_pairs for origin in pair.origins for i in origin.samples)
    most = found.most_common(number)
    return torch.tensor([index for index, _ in most]), sum(count for _, count in most) / found.total()


def of_largest_loss(run: Run, data: TensorDataset, number: int) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(run.net(data.tensors[0]), data.tensors[1], reduction="none").topk(number).indices


def without(data: TensorDataset, dropped: Tensor) -> TensorDataset:
    kept = torch.ones(len(data), dtype=torch.bool).index_fill(0, dropped, False)
    return TensorDataset(*(part[kept] for part in data.tensors))


def run(fast: bool = False) -> Result:
    short, long, seeds = (6, 6, (0,)) if fast else (660, 2000, range(5))
    signs: dict[str, list[Run]] = {}
    shares: dict[str, list[float]] = {}  # of the places in the worst pairs that a tenth of the samples fills
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        clean, test = digits(seed)
        if fast:
            clean = TensorDataset(*(part[:200] for part in clean.tensors))
        noisy, wrong = with_wrong_labels(clean, seed)
        # After 15 epochs, all pairs of the training set: a million, of which the worst 5000 are listed.
        whole: dict[str, Any] = {"num_units": len(clean), "top_pairs": 5000, "every_n_train_steps": short}
        for name, data in (("clean labels", clean), ("one label in ten wrong", noisy)):
            run = train(network, data, steps=short + 1, seed=seed, optimizer=sgd(0.3), **whole)
            signs.setdefault(name, []).append(run)
            shares.setdefault(name, []).append(in_most_pairs(run, len(clean) // 10)[1])
        sets = {
            "clean labels": clean,
            "one label in ten wrong": noisy,
            "the samples in most of the worst pairs taken out": without(noisy, in_most_pairs(run, len(wrong))[0]),
            "the samples of the largest loss taken out": without(noisy, of_largest_loss(run, noisy, len(wrong))),
            "as many samples taken out at random": without(noisy, torch.randperm(len(noisy))[: len(wrong)]),
        }
        true = {tuple(image.tolist()): int(label) for image, label in zip(*clean.tensors, strict=True)}
        for name, data in sets.items():
            left = sum(true[tuple(image.tolist())] != int(label) for image, label in zip(*data.tensors, strict=True))
            again = train(network, data, steps=long, seed=seed, optimizer=sgd(0.3), num_units=2)
            found.setdefault(name, []).append((left / len(data), again.accuracy(test)))

    keys = ("min_cosine", "p05_cosine", "gradient_norm")
    signs_of = {name: [span([r.at(key, short) for r in runs]) for key in keys] for name, runs in signs.items()}
    print("of the places in the worst pairs, a tenth of the samples fills", {k: span(v) for k, v in shares.items()})
    table = [["training set", "lowest cosine", "5 % quantile", "gradient norm", "wrong labels in it", "test accuracy"]]
    for name, values in found.items():
        wrong_labels, accuracies = zip(*values, strict=True)
        table.append([name, *signs_of.get(name, ["", "", ""]), span(wrong_labels, 3), span(accuracies, 3)])
    figure, axes = panels(list(signs))
    for panel, (name, runs) in zip(axes, signs.items(), strict=True):
        draw_density(panel, runs[0].gram)
        panel.set_title(f"{name}: {panel.get_title().split(': ')[1]}", fontsize=9)
        panel.legend(frameon=False, fontsize=7)
    return Result(table, figure)
