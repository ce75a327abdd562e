"""Nothing is read of loaders that keep an iterator, which reading would advance for good."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kinds import close, fit, gram_of
from test_loaders import N, Net, Rows, train
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Sampler, Subset

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.batches.iterators import iterator_in


def endless() -> Iterator[int]:
    generator = torch.Generator().manual_seed(3)
    while True:
        yield from torch.randperm(N, generator=generator).tolist()


class Goes(Sampler):
    """Goes on in the next epoch where it was left in the last."""

    def __init__(self) -> None:
        self.it = endless()

    def __iter__(self) -> Iterator[int]:
        return (next(self.it) for _ in range(N))

    def __len__(self) -> int:
        return N


class GoesInBatches(Goes):
    def __iter__(self) -> Iterator[Any]:
        return ([next(self.it) for _ in range(6)] for _ in range(4))

    def __len__(self) -> int:
        return 4


class Balanced(Goes):
    """Keeps a position for each class."""

    def __init__(self) -> None:
        self.of = {"cat": cycle(range(0, N, 2)), "dog": cycle(range(1, N, 2))}

    def __iter__(self) -> Iterator[int]:
        return (next(self.of["cat" if i % 2 else "dog"]) for i in range(N))


class Pairs(Rows):
    """Adds to each item what comes next elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.others = cycle(range(5))

    def __getitem__(self, i: int) -> Any:
        x, y = super().__getitem__(i)
        return x + next(self.others), y


KEPT: dict[str, Any] = {
    "sampler": (
        lambda: DataLoader(Rows(), batch_size=6, sampler=Goes()),
        "the sampler of the train loader, attribute 'it', is an iterator (generator)",
    ),
    "batch sampler": (
        lambda: DataLoader(Rows(), batch_sampler=GoesInBatches()),
        "the batch sampler of the train loader, attribute 'it', is an iterator (generator)",
    ),
    "wrapped sampler": (
        lambda: DataLoader(Rows(), batch_sampler=BatchSampler(Goes(), 6, False)),
        "the batch sampler of the train loader, attribute 'sampler.it', is an iterator (generator)",
    ),
    "dictionary": (
        lambda: DataLoader(Rows(), batch_size=6, sampler=Balanced()),
        """the sampler of the train loader, attribute "of['cat']", is an iterator (cycle)""",
    ),
    "dataset": (
        lambda: DataLoader(Pairs(), batch_size=6, shuffle=True),
        "the dataset of the train loader, attribute 'others', is an iterator (cycle)",
    ),
    "wrapped dataset": (
        lambda: DataLoader(ConcatDataset([Rows(12), Subset(Pairs(), range(12))]), batch_size=6, shuffle=True),
        "the dataset of the train loader, attribute 'datasets[1].dataset.others', is an iterator (cycle)",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_measurement_of_the_batch_in_training_reads_nothing(name):
    make, _ = KEPT[name]
    confusion = GradientConfusionCallback(every_n_train_steps=3, num_units=4)
    plain, measured = train(make()), train(make(), confusion)
    assert plain == measured
    assert len(confusion.last_gram) == 4


@pytest.mark.parametrize("name", [name for name in KEPT if "dataset" not in name])
def test_units_are_the_samples_of_the_batch(name):
    make, _ = KEPT[name]
    confusion, said = fit(Net(), make(), num_units=4)
    x, y = next(iter(make()))
    assert said == []
    close(confusion.last_gram, gram_of(Net(), [(x[i : i + 1], y[i : i + 1]) for i in range(4)]))


@pytest.mark.parametrize("source", ["fresh", "fixed"])
@pytest.mark.parametrize("name", KEPT)
def test_draws_are_refused_and_name_the_iterator(name, source):
    make, found = KEPT[name]
    confusion, said = fit(Net(), make(), source=source)
    assert confusion.last_gram is None and len(said) == 1
    assert (
        f"ValueError: {found}; source='fresh' and 'fixed' read items out of turn, which would advance it, and it "
        "cannot be turned back; use source='current'." in said[0]
    )
    confusion = GradientConfusionCallback(every_n_train_steps=3, num_units=4, source=source)
    with pytest.warns(UserWarning, match="a measurement failed"):
        measured = train(make(), confusion)
    assert measured == train(make())


def test_of_several_loaders_the_one_is_named():
    loaders = {"a": DataLoader(Rows()), "b": DataLoader(Rows(), sampler=Goes())}
    found = iterator_in(loaders)
    assert found == "the sampler of the train loader of batch['b'], attribute 'it', is an iterator (generator)"


def test_what_is_no_position_of_python_is_none(tmp_path: Path):
    class Plain(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.file = (tmp_path / "data").open("w+")
            self.names, self.range = ["a", "b"], range(3)
            self.itself = self

    data = Plain()
    assert iterator_in(DataLoader(data)) is None
    data.names = [chain("ab")]  # type: ignore[list-item]
    assert iterator_in(DataLoader(data)) == (
        "the dataset of the train loader, attribute 'names[0]', is an iterator (chain)"
    )
    data.file.close()


def test_batches_that_cannot_be_cut_are_not_drawn_instead():
    class Flat(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0].view(-1, 3), batch[1]), batch_idx)

    def flat(items: Any) -> Any:
        x, y = zip(*items, strict=True)
        return torch.cat(x), torch.stack(y)

    confusion, said = fit(Flat(), DataLoader(Pairs(), batch_size=6, collate_fn=flat))
    assert confusion.last_gram is None and len(said) == 1
    assert "ValueError: the tensors of the batch differ in their first dimension" in said[0]
