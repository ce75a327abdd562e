"""A rare class: seen by its recall rather than by ``labels``, and sampled more often."""

from __future__ import annotations

from typing import Any

import torch
from common import Result, cnn, digits, heatmaps, span, train
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_gradconf.statistics import cosine_matrix

RARE, KEPT = 8, 7  # the class, and how many of its samples are left


def class_cosines(gram: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cosine of each pair of classes ``(10, 10)``, a sample not compared with itself."""
    cosines = cosine_matrix(gram).fill_diagonal_(0).nan_to_num()
    members = F.one_hot(labels, 10).float()
    sizes = members.sum(0)
    return members.T @ cosines @ members / (sizes[:, None] * sizes - torch.diag(sizes))


def run(fast: bool = False) -> Result:
    steps, seeds = (20, (0,)) if fast else (400, range(5))
    others = [c for c in range(10) if c != RARE]
    found: dict[str, list[tuple[float, ...]]] = {}
    pictures: dict[str, Tensor] = {}
    for seed in seeds:
        (x, y), test = digits(seed, flat=False)[0].tensors, digits(seed, flat=False)[1]
        dropped = (y == RARE).nonzero()[KEPT:, 0]
        kept = torch.ones(len(y), dtype=torch.bool).index_fill(0, dropped, False)
        data = TensorDataset(x[kept], y[kept])
        weights = 1 / torch.bincount(y[kept], minlength=10)
        # What is compared has every class equally often: ten images of each that are not trained on.
        chosen = torch.cat([(test.tensors[1] == c).nonzero()[:10, 0] for c in range(10)])
        compared = TensorDataset(*(part[chosen] for part in test.tensors))
        draws = WeightedRandomSampler(
            weights[y[kept]].tolist(), len(data), generator=torch.Generator().manual_seed(seed)
        )

        def weighted(output: Tensor, target: Tensor, weights: Tensor = weights) -> Tensor:
            return F.cross_entropy(output, target, weight=weights)

        for name, loader, loss in (
            ("as it is", data, F.cross_entropy),
            ("rare class drawn as often", DataLoader(data, 32, sampler=draws, drop_last=True), F.cross_entropy),
            ("class weights in the loss", data, weighted),
        ):
            measured: dict[str, Any] = {"source": DataLoader(compared, 100), "num_units": 100, "labels": 1}
            done = train(cnn, loader, steps=steps + 1, loss=loss, seed=seed, every_n_train_steps=steps, **measured)
            cosines = class_cosines(done.gram, compared.tensors[1])
            between = cosines[others][:, others]
            right = done.net(test.tensors[0]).argmax(1) == test.tensors[1]
            rare = test.tensors[1] == RARE
            found.setdefault(name, []).append(
                (
                    cosines[RARE, others].mean().item(),
                    (between.sum() - between.diagonal().sum()).item() / 72,
                    right[rare].float().mean().item(),
                    right[~rare].float().mean().item(),
                )
            )
            pictures.setdefault(name, cosines)
    table = [["training", "rare class with the others", "other classes with each other"]]
    table[0] += ["recall of the rare class", "accuracy on the others"]
    table += [[name, *map(span, zip(*values, strict=True))] for name, values in found.items()]
    return Result(table, heatmaps(pictures, limit=0.4))
