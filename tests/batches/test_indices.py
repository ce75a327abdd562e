"""Which indices are taken of a loader, and what stands for items that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kinds import close, fit, gram_of, samples_of
from test_loaders import Buckets, N, Net, Rows
from torch.utils.data import BatchSampler, DataLoader, default_collate

from lightning_gradconf.batches.loaders import draw_indices, examples, first_indices

# ---- batch samplers without an end -----------------------------------------------------------------------------------


class Repeats:
    """A batch sampler without an end and without a length, as of timm's MultiEpochsDataLoader."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.given = batches, 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            for batch in self.batches:
                self.given += 1
                yield batch


def repeating(n: int, size: int, drop_last: bool = False) -> DataLoader:
    return DataLoader(range(n), batch_sampler=Repeats(BatchSampler(range(n), size, drop_last)))


@pytest.mark.parametrize(("n", "drop_last"), [(40, False), (42, False), (42, True)])
def test_a_batch_sampler_without_an_end_gives_one_epoch(n, drop_last):
    loader = repeating(n, 8, drop_last)
    drawn = draw_indices(loader, None, 100)
    assert sorted(drawn) == [list(range(i, i + 8)) for i in range(0, 40, 8)], "without the short last one"
    assert loader.batch_sampler.given <= 7
    assert sorted(i for (i,) in draw_indices(loader, 1, 100)) == list(range(40 if drop_last else n))


def test_of_a_batch_sampler_without_an_end_no_more_is_taken_than_is_needed():
    loader = repeating(50_000, 128)
    assert examples(loader) == [0, 64, 127] and loader.batch_sampler.given == 1
    assert first_indices(loader, None, 2) == [list(range(128)), list(range(128, 256))]
    assert first_indices(loader, 100, 2) == [list(range(100)), list(range(128, 228))]
    assert loader.batch_sampler.given <= 1 + 3 + 2
    assert list(draw_indices(repeating(3, 8), None, 1)) == [[0, 1, 2]]


# ---- items that are missing ------------------------------------------------------------------------------------------


class Broken(Rows):
    """Returns None for every third item, the first among them."""

    def __getitem__(self, i: int) -> Any:
        return None if i % 3 == 0 else super().__getitem__(i)


INTACT = [i for i in range(N) if i % 3]


def without_broken(items: list[Any]) -> Any:
    return default_collate([item for item in items if item is not None])


def broken(**options: Any) -> DataLoader:
    return DataLoader(Broken(), **({"collate_fn": without_broken, "batch_size": 6, "shuffle": True} | options))


def expected(samples: list[tuple[int, ...]]) -> Any:
    batches = [[torch.stack(column) for column in zip(*(Rows()[i] for i in group), strict=True)] for group in samples]
    return gram_of(Net(), batches)


def test_examples_are_items_that_are_there():
    found = examples(broken(shuffle=False))
    rows = Rows()
    assert [int((rows.x == x).all(1).nonzero()) for x, _ in found] == [23, 1, 2]
    assert examples(DataLoader([None] * 5)) == [None] * 3, "where all are None, they are no errors"


def test_batches_without_broken_items_are_cut():
    confusion, said = fit(Net(), broken(shuffle=False), num_units=4)
    assert said == []
    close(confusion.last_gram, expected([(1,), (2,), (4,), (5,)]))


@pytest.mark.parametrize("source", ["fresh", "fixed"])
@pytest.mark.parametrize("buckets", [False, True])
def test_other_items_are_drawn_in_the_place_of_broken_ones(source, buckets):
    found = []
    for _ in range(2):
        options = {"batch_size": 1, "batch_sampler": Buckets(), "shuffle": False} if buckets else {}
        confusion, said = fit(Net(), broken(**options), source=source, num_units=len(INTACT), top_pairs=999)
        assert said == []
        samples = samples_of(confusion)
        assert sorted(samples) == [(i,) for i in INTACT], "each of them once"
        close(confusion.last_gram, expected(samples))
        found.append(samples)
    assert found[0] == found[1]


def test_a_unit_of_several_samples_has_them_all_while_there_are_others():
    confusion, said = fit(Net(), broken(), source="fresh", unit_size=2, num_units=3, top_pairs=99)
    assert said == []
    samples = samples_of(confusion)
    assert {len(group) for group in samples} == {2} and {i for group in samples for i in group} <= set(INTACT)
    close(confusion.last_gram, expected(samples))


def test_whole_batches_lack_broken_items_as_in_training():
    confusion, said = fit(Net(), broken(batch_size=12), source="fresh", unit_size="batch", num_units=2, top_pairs=9)
    assert said == []
    samples = samples_of(confusion)
    assert sorted(i for group in samples for i in group) == list(range(N))
    close(confusion.last_gram, expected([tuple(i for i in group if i % 3) for group in samples]))


def test_the_first_items_of_a_loader_are_those_that_are_there():
    def graphs(items: list[Any]) -> Any:  # cannot be cut
        x, y = without_broken(items)
        return x.flatten(), y.flatten()

    net = Net()
    source = broken(shuffle=False, collate_fn=graphs)
    losses = {
        "loss_fn": lambda module, batch: (module.net(batch[0].view(-1, 3)) - batch[1].view(-1, 2)).square().mean()
    }
    confusion, _ = fit(net, broken(), source=source, num_units=4, **losses)
    close(confusion.last_gram, expected([(1,), (2,), (4,), (5,)]))
