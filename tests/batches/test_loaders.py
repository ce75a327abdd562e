"""Loaders of every kind can be drawn from, and what the training gets from them stays what it is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from test_kinds import QUIET, close, fit, gram_of, samples_of
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.batches.loaders import batch_size, collate, draw_indices, read_items, samples_at

N, FEATURES = 24, 3


class Rows(Dataset):
    def __init__(self, n: int = N) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
        self.y = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: Any) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return self.x[i], self.y[i]


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(FEATURES, 2).double()
        self.batches: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch.values() if isinstance(batch, dict) else batch
        if "log" not in vars(self):  # in training, not while it is measured
            self.batches.append(x[:, 0].tolist())
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Buckets(Sampler):
    """Batches of neighbours, in a random order of its own, with a position that it keeps."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.generator, self.epoch = size, random.Random(3), 0

    def __len__(self) -> int:
        return N // self.size

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        starts = list(range(0, N, self.size))
        self.generator.shuffle(starts)
        return (list(range(i, i + self.size)) for i in starts)


class Endless(Sampler):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(N, generator=self.generator).tolist()


class Half(Sampler):
    """Even indices, in an order that depends on how often it was asked."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return N // 2

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter([(2 * i + 2 * self.epoch) % N for i in range(N // 2)])


class Stateful(DataLoader):
    """Counts batches and begins where it was left, as torchdata's StatefulDataLoader does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Own:
    """A loader that is no DataLoader."""

    def __init__(self) -> None:
        self.dataset, self.batch_size, self.collate_fn = Rows(), 4, default_collate

    def __len__(self) -> int:
        return N // 4

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(N).view(-1, 4)
        return (self.collate_fn([self.dataset[int(i)] for i in group]) for group in order)


class AtOnce(Rows):
    """Reads several items at once, as datasets on disk do."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0] * N, N, replacement=False, generator=generator())


LOADERS: dict[str, Any] = {
    "shuffled": lambda: DataLoader(Rows(), batch_size=4, shuffle=True),
    "with its own generator": lambda: DataLoader(Rows(), batch_size=4, shuffle=True, generator=generator()),
    "a worker": lambda: DataLoader(Rows(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True),
    "subset": lambda: DataLoader(Subset(Rows(48), range(0, 48, 2)), batch_size=4, shuffle=True),
    "weighted sampler": lambda: DataLoader(Rows(), batch_size=4, sampler=weighted()),
    "sampler of a part": lambda: DataLoader(Rows(), batch_size=4, sampler=SubsetRandomSampler(range(12, 24))),
    "sampler of the user's": lambda: DataLoader(Rows(), batch_size=4, sampler=Half()),
    "endless sampler": lambda: DataLoader(Rows(), batch_size=4, sampler=Endless()),
    "batch sampler": lambda: DataLoader(Rows(), batch_sampler=BatchSampler(RandomSampler(range(N)), 4, True)),
    "batch sampler of a weighted one": lambda: DataLoader(Rows(), batch_sampler=BatchSampler(weighted(), 4, True)),
    "buckets": lambda: DataLoader(Rows(), batch_sampler=Buckets()),
    "batch sampler as sampler": lambda: DataLoader(
        Rows(), batch_size=None, sampler=BatchSampler(RandomSampler(range(N)), 4, True)
    ),
    "buckets as sampler": lambda: DataLoader(Rows(), batch_size=None, sampler=Buckets()),
    "stacked datasets": lambda: DataLoader(StackDataset(x=Rows().x, y=Rows().y), batch_size=4, shuffle=True),
    "items at once": lambda: DataLoader(AtOnce(), batch_size=4, shuffle=True),
    "loader with a state": lambda: Stateful(Rows(), batch_size=4, shuffle=True),
    "no DataLoader": Own,
    "list of items": lambda: DataLoader([Rows()[i] for i in range(N)], batch_size=4, shuffle=True),
}


def train(loader: Any, *callbacks: Any) -> tuple[Any, ...]:
    """Train and return all that the training has seen and left."""
    pl.seed_everything(7, verbose=False)
    module = Net()
    pl.Trainer(max_steps=14, accelerator="cpu", callbacks=list(callbacks), **QUIET).fit(module, loader)
    state = {"random": torch.get_rng_state().tolist(), "python": random.getstate()}
    for name in ("dataset", "sampler", "batch_sampler"):
        part = getattr(loader, name, None)
        state[name] = {k: v for k, v in getattr(part, "__dict__", {}).items() if isinstance(v, int)}
    return module.batches, [p.tolist() for p in module.parameters()], state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit_size": "batch"},
        {"source": "fresh"},
        {"source": "fixed", "unit_size": 2},
        {"source": "fresh", "unit_size": "batch"},
    ],
    ids=["current", "current batches", "fresh", "fixed pairs", "fresh batches"],
)
@pytest.mark.parametrize("name", LOADERS)
def test_training_gets_the_same_batches(name, options):
    confusion = GradientConfusionCallback(every_n_train_steps=3, num_units=3, **options)
    plain, measured = train(LOADERS[name]()), train(LOADERS[name](), confusion)
    assert plain == measured
    assert len(confusion.last_gram) == 3


@pytest.mark.parametrize("unit_size", [1, 2, "batch"])
@pytest.mark.parametrize("name", LOADERS)
def test_draws_are_of_what_the_sampler_takes(name, unit_size):
    loader = LOADERS[name]()
    options = {"source": "fresh", "unit_size": unit_size, "num_units": 3, "top_pairs": 100, "every_n_train_steps": 10}
    confusion, said = fit(Net(), loader, **options)
    samples = samples_of(confusion)
    assert said == []
    assert {len(group) for group in samples} == {4 if unit_size == "batch" else unit_size}
    assert len({i for group in samples for i in group}) == sum(map(len, samples)), "drawn with replacement"
    if name == "sampler of a part":
        assert all(i >= 12 for group in samples for i in group)
    if name == "sampler of the user's":
        assert all(i % 2 == 0 for group in samples for i in group)
    if "buckets" in name:
        assert all(len({i // 4 for i in group}) == 1 for group in samples), "a unit is of one bucket"
    data = Subset(Rows(48), range(0, 48, 2)) if name == "subset" else Rows()
    items = [[data[i] for i in group] for group in samples]
    close(confusion.last_gram, gram_of(Net(), [[torch.stack(t) for t in zip(*group, strict=True)] for group in items]))


def test_items_that_collate_fn_takes_apart_are_whole_afterwards():
    data = [{"x": [1.0, 2.0], "label": i} for i in range(4)]
    loader = DataLoader(data, collate_fn=lambda items: [item.pop("label") for item in items])
    assert collate(loader, read_items(loader, [1, 3])) == [1, 3]
    assert all(item.keys() == {"x", "label"} for item in data)


def test_seeds_decide_the_draw():
    loader = LOADERS["buckets"]()
    random.seed(1)
    first = list(islice(draw_indices(loader, 2, 5), 5))
    assert len(first) == 5 and all(len(group) == 2 for group in first)
    assert len(list(draw_indices(loader, 3, 100))) == 6, "one group of three in each bucket of four"


@pytest.mark.parametrize(
    ("loader", "size", "last"),
    [
        (DataLoader(range(10), batch_size=4), 4, 2),
        (DataLoader(range(10), batch_size=4, drop_last=True), 4, 4),
        (DataLoader(range(3), batch_size=4), 4, 3),
        (DataLoader(range(10), batch_sampler=Buckets()), None, None),
        (DataLoader(range(10), batch_size=None), None, None),
        ([1, 2], None, None),
    ],
)
def test_batch_sizes(loader, size, last):
    assert batch_size(loader) == size
    assert samples_at(loader, len(loader) - 1 if hasattr(loader, "sampler") else 0) == last


class Zipped(DataLoader):
    """Batches of two loaders, one of which it passes for its dataset."""

    def __init__(self) -> None:
        self.loaders = [DataLoader(Rows(), batch_size=8, collate_fn=self.named) for _ in range(2)]
        super().__init__(self.loaders[0])  # type: ignore[arg-type]

    @staticmethod
    def named(items: Any) -> dict[str, Tensor]:
        return dict(zip("xy", default_collate(items), strict=True))

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Any:
        return zip(*self.loaders, strict=True)


def test_a_loader_of_loaders_is_cut_into_samples_of_each():
    class Both(Net):
        def training_step(self, batch, batch_idx):
            labelled, unlabelled = batch
            return super().training_step(labelled, batch_idx) + self.net(unlabelled["x"]).square().mean()

    confusion, said = fit(Both(), Zipped(), num_units=6)
    assert not said and batch_size(Zipped()) is None
    samples = [{"x": Rows().x[i : i + 1], "y": Rows().y[i : i + 1]} for i in range(6)]
    close(confusion.last_gram, gram_of(Both(), [(sample, sample) for sample in samples]))


# ---- streams ---------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Items, or batches of its own."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        rows = Rows()
        if self.size is None:
            return (rows[i] for i in range(N))
        return (rows[i : i + self.size] for i in range(0, N, self.size))


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter(Stream(6))


@pytest.mark.parametrize(
    "loader",
    [lambda: DataLoader(Stream(), batch_size=6), lambda: DataLoader(Stream(6), batch_size=None), Batches],
    ids=["items", "batches of its own", "no DataLoader"],
)
def test_samples_of_a_stream_lie_on_dimension_0(loader):
    confusion, said = fit(Net(), loader())
    assert said == []
    close(confusion.last_gram, gram_of(Net(), [Rows()[i : i + 1] for i in range(6)]))
    module = Net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    confusion, said = fit(module, loader(), unit_size="batch", num_units=2, steps=2)
    assert said == []
    close(confusion.last_gram, gram_of(Net(), [Rows()[0:6], Rows()[6:12]]))


def test_a_stream_of_another_batch_size_is_refused_with_the_shapes():
    def time_first(items: Any) -> Any:
        x, y = zip(*items, strict=True)
        return torch.stack([torch.stack(x)] * 9), torch.stack([torch.stack(y)] * 9)

    _, said = fit(Net(), DataLoader(Stream(), batch_size=6, collate_fn=time_first))
    assert len(said) == 1
    assert "counts 9 samples, but the loader's batch_size is 6 (batch[0] (9, 6, 3), batch[1] (9, 6, 2))" in said[0]
    assert "unit_size='batch'" in said[0]
