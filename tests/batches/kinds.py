"""Batches of every kind that people train on, each small, with a module whose loss is that of its samples."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

N, BATCH, FEATURES, CLASSES = 24, 6, 3, 4
Point = namedtuple("Point", ["x", "y"])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def length(i: int) -> int:
    """Of a sequence, a graph, a bag: not sorted, and the same for some."""
    return 2 + (5 * i) % 7


def ids(i: int) -> Tensor:
    return (torch.arange(length(i)) * (i + 3)) % 11


@dataclass
class Kind:
    """A kind of batch.

    Attributes:
        item: The item of the dataset at an index.
        collate: The ``collate_fn``.
        loss: Of a batch, given the layers of `Net`.
        places: Where samples lie, None if not side by side.
        cut: Whether units are cut out of batches.
    """

    item: Callable[[int], Any]
    collate: Callable[[Sequence[Any]], Any]
    loss: Callable[[Any, Any], Tensor]
    places: dict[str, Any] | None
    cut: bool = True

    def loader(self, **options: Any) -> DataLoader[Any]:
        return DataLoader(Items(self.item), **({"batch_size": BATCH, "collate_fn": self.collate} | options))


class Items(Dataset):
    """Items made when they are asked for, since some collators take entries out of them."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


class Net(pl.LightningModule):
    """Layers for all kinds, of which each uses some."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn = nn.LSTM(FEATURES, 5)
            self.linear, self.bag = nn.Linear(FEATURES, CLASSES), nn.EmbeddingBag(11, FEATURES, mode="mean")
            self.embedding, self.out = nn.Embedding(11, FEATURES), nn.Linear(5, CLASSES)
        self.double()
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


# ---- sequences -------------------------------------------------------------------------------------------------------


def time_first(items: Sequence[Any]) -> Any:
    return torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items], 1)


def padded_time_first(items: Sequence[Any]) -> Any:
    return {"x": pad_sequence([x for x, _ in items]), "length": torch.tensor([len(x) for x, _ in items])}


def masked_loss(net: Any, batch: Any) -> Tensor:
    out = net.out(net.rnn(batch["x"])[0]).square().mean(-1)
    mask = torch.arange(len(out))[:, None] < batch["length"]
    return ((out * mask).sum(0) / mask.sum(0)).mean()


def dynamic_padding(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """As Hugging Face collators do: entries are taken out of the features."""
    labels = [feature.pop("label") for feature in features]
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    mask = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": torch.tensor(labels),
    }


def classify(net: Any, batch: Any) -> Tensor:
    mask = batch["attention_mask"][..., None]
    mean = (net.embedding(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
    return F.cross_entropy(net.linear(mean), batch["labels"])


def padded_with_lengths(items: Sequence[Any]) -> Any:
    x, y = ([item[i] for item in items] for i in (0, 1))
    lengths = torch.tensor([len(row) for row in x])
    return pad_sequence(x, batch_first=True), lengths, pad_sequence(y, batch_first=True, padding_value=-100)


def tag(net: Any, batch: Any) -> Tensor:
    """Fails on a sample that keeps the padding of its batch."""
    x, lengths, y = batch
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(net.rnn(packed)[0], batch_first=True)
    return F.cross_entropy(net.out(out).flatten(0, 1), y.flatten(), ignore_index=-100)


def sorted_by_length(items: Sequence[Any]) -> Any:
    return padded_with_lengths(sorted(items, key=lambda item: -len(item[0])))


def packed(items: Sequence[Any]) -> Any:
    return pack_sequence([x for x, _ in items], enforce_sorted=False), torch.stack([y for _, y in items])


def of_last_state(net: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(net.out(net.rnn(x)[1][0][-1]), y)


# ---- detection -------------------------------------------------------------------------------------------------------


def stacked_with_targets(items: Sequence[Any]) -> Any:
    return torch.stack([image for image, _ in items]), [target for _, target in items]


def detr(net: Any, batch: Any) -> Tensor:
    images, targets = batch
    losses = [F.mse_loss(net.linear(i).expand_as(t["boxes"]), t["boxes"]) for i, t in zip(images, targets, strict=True)]
    return torch.stack(losses).mean()


def boxes_in_a_row(items: Sequence[Any]) -> Any:
    """As in YOLO: the boxes of all images, each with the index of its image in the batch."""
    rows = [F.pad(t["boxes"], (1, 0), value=float(i)) for i, (_, t) in enumerate(items)]
    return torch.stack([image for image, _ in items]), torch.cat(rows)


def yolo(net: Any, batch: Any) -> Tensor:
    images, boxes = batch
    return (net.linear(images)[boxes[:, 0].long()] - boxes[:, 1:]).square().mean()


def columns(items: Sequence[Any]) -> Any:
    return tuple(zip(*items, strict=True))


def of_images(net: Any, batch: Any) -> Tensor:
    """As in torchvision: images of several sizes."""
    images, targets = batch
    pairs = zip(images, targets, strict=True)
    return torch.stack([F.mse_loss(net.linear(i.mean(0)).expand_as(t["boxes"]), t["boxes"]) for i, t in pairs]).mean()


# ---- bags and graphs -------------------------------------------------------------------------------------------------


def offsets(items: Sequence[Any]) -> Any:
    lengths = torch.tensor([0, *(len(x) for x, _ in items)])
    return torch.cat([x for x, _ in items]), lengths.cumsum(0)[:-1], torch.stack([y for _, y in items])


def of_bags(net: Any, batch: Any) -> Tensor:
    x, starts, y = batch
    return F.mse_loss(net.linear(net.bag(x, starts)), y)


class Graphs:
    """Nodes of all graphs in a row, and the graph that each belongs to."""

    def __init__(self, x: Tensor, of: Tensor, y: Tensor) -> None:
        self.x, self.of, self.y = x, of, y

    def to(self, device: Any) -> Graphs:
        return Graphs(self.x.to(device), self.of.to(device), self.y.to(device))

    def clone(self) -> Graphs:
        return Graphs(self.x.clone(), self.of.clone(), self.y.clone())


def graph_tensors(items: Sequence[Any]) -> Any:
    of = [torch.full((len(x),), i) for i, (x, _) in enumerate(items)]
    return torch.cat([x for x, _ in items]), torch.cat(of), torch.stack([y for _, y in items])


def graph_objects(items: Sequence[Any]) -> Any:
    return Graphs(*graph_tensors(items))


def of_graphs(net: Any, batch: Any) -> Tensor:
    x, of, y = (batch.x, batch.of, batch.y) if isinstance(batch, Graphs) else batch
    h = torch.zeros(len(y), CLASSES, dtype=x.dtype).index_add(0, of, net.linear(x).relu())
    return F.mse_loss(h, y)


# ---- structures ------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: list[str]
    scale: float = 2.0


def record(items: Sequence[Any]) -> Record:
    return Record(
        torch.stack([i["x"] for i in items]), torch.stack([i["y"] for i in items]), [i["name"] for i in items]
    )


def of_rows(net: Any, batch: Any) -> Tensor:
    x, y = (batch.x, batch.y) if hasattr(batch, "x") else (batch["x"], batch["y"])
    return F.mse_loss(net.linear(x), y)


def of_ragged(net: Any, batch: Any) -> Tensor:
    return torch.stack([F.mse_loss(net.linear(x.mean(0)), y) for x, y in batch]).mean()


def with_number(items: Sequence[Any]) -> Any:
    return {**default_collate([{k: i[k] for k in ("x", "y")} for i in items]), "number": len(items)}


def by_number(net: Any, batch: Any) -> Tensor:
    return F.mse_loss(net.linear(batch["x"]), batch["y"], reduction="sum") / batch["number"]


def pairs_of(items: Sequence[Any]) -> Any:
    """Whether each sample is like each other: a square."""
    batch = default_collate([{k: i[k] for k in ("x", "y")} for i in items])
    return {**batch, "alike": torch.cdist(batch["y"], batch["y"])}


def of_pairs(net: Any, batch: Any) -> Tensor:
    return of_rows(net, batch) + (net.linear(batch["x"]).sum(1) * batch["alike"]).square().mean()


def row(i: int) -> dict[str, Any]:
    return {"x": randn(FEATURES, seed=i), "y": randn(CLASSES, seed=100 + i), "name": f"row {i}"}


def sequence(i: int) -> Any:
    return randn(length(i), FEATURES, seed=i), torch.arange(length(i)) % CLASSES


def targets(i: int) -> Any:
    return {"boxes": randn(1 + i % 3, CLASSES, seed=100 + i)}


KINDS: dict[str, Kind] = {
    "time first": Kind(
        lambda i: (randn(7, FEATURES, seed=i), randn(7, CLASSES, seed=100 + i)),
        time_first,
        lambda net, batch: F.mse_loss(net.out(net.rnn(batch[0])[0]), batch[1]),
        {"batch[0]": 1, "batch[1]": 1},
    ),
    "time first, padded": Kind(sequence, padded_time_first, masked_loss, {"batch['x']": 1, "batch['length']": 0}),
    "dictionary with text": Kind(
        row, default_collate, of_rows, {"batch['x']": 0, "batch['y']": 0, "batch['name']": "entries"}
    ),
    "named tuple": Kind(
        lambda i: Point(row(i)["x"], row(i)["y"]), default_collate, of_rows, {"batch[0]": 0, "batch[1]": 0}
    ),
    "dataclass": Kind(row, record, of_rows, {"batch.x": 0, "batch.y": 0, "batch.name": "entries", "batch.scale": None}),
    "dynamic padding": Kind(
        lambda i: {"input_ids": ids(i).tolist(), "label": i % CLASSES},
        dynamic_padding,
        classify,
        {"batch['input_ids']": 0, "batch['attention_mask']": 0, "batch['labels']": 0},
    ),
    "padding that the loss cannot cut": Kind(
        sequence, padded_with_lengths, tag, {"batch[0]": 0, "batch[1]": 0, "batch[2]": 0}, cut=False
    ),
    "sorted by length": Kind(sequence, sorted_by_length, tag, {"batch[0]": 0, "batch[1]": 0, "batch[2]": 0}, cut=False),
    "packed sequences": Kind(
        lambda i: (randn(length(i), FEATURES, seed=i), randn(CLASSES, seed=100 + i)),
        packed,
        of_last_state,
        None,
        cut=False,
    ),
    "stacked images, list of targets": Kind(
        lambda i: (randn(FEATURES, seed=i), targets(i)),
        stacked_with_targets,
        detr,
        {"batch[0]": 0, "batch[1]": "entries"},
    ),
    "boxes of all images in a row": Kind(
        lambda i: (randn(FEATURES, seed=i), targets(i)), boxes_in_a_row, yolo, None, cut=False
    ),
    "one box an image, in a row": Kind(
        lambda i: (randn(FEATURES, seed=i), {"boxes": randn(1, CLASSES, seed=100 + i)}),
        boxes_in_a_row,
        yolo,
        None,
        cut=False,
    ),
    "images of several sizes": Kind(
        lambda i: (randn(length(i), FEATURES, seed=i), targets(i)),
        columns,
        of_images,
        {"batch[0]": "entries", "batch[1]": "entries"},
    ),
    "ragged list": Kind(
        lambda i: (randn(length(i), FEATURES, seed=i), randn(CLASSES, seed=100 + i)),
        list,
        of_ragged,
        {"batch": "entries"},
    ),
    "bags with offsets": Kind(lambda i: (ids(i), randn(CLASSES, seed=i)), offsets, of_bags, None, cut=False),
    "bags of one, with offsets": Kind(
        lambda i: (ids(i)[:1] + i % 3, randn(CLASSES, seed=i)), offsets, of_bags, None, cut=False
    ),
    "graphs as tensors": Kind(
        lambda i: (randn(length(i), FEATURES, seed=i), randn(CLASSES, seed=100 + i)),
        graph_tensors,
        of_graphs,
        None,
        cut=False,
    ),
    "graphs of one node": Kind(
        lambda i: (randn(1, FEATURES, seed=i), randn(CLASSES, seed=100 + i)), graph_tensors, of_graphs, None, cut=False
    ),
    "graphs as an object": Kind(
        lambda i: (randn(length(i), FEATURES, seed=i), randn(CLASSES, seed=100 + i)),
        graph_objects,
        of_graphs,
        None,
        cut=False,
    ),
    "number of samples in the batch": Kind(row, with_number, by_number, None, cut=False),
    "pairs of samples": Kind(row, pairs_of, of_pairs, None, cut=False),
}
