"""Which indices are taken of a loader, and what stands for items that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import BatchSampler, DataLoader

from lightning_gradconf.batches.loaders import draw_indices, example_indices, first_indices

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
    assert example_indices(loader) == [0, 64, 127] and loader.batch_sampler.given == 1
    assert first_indices(loader, None, 2) == [list(range(128)), list(range(128, 256))]
    assert first_indices(loader, 100, 2) == [list(range(100)), list(range(128, 228))]
    assert loader.batch_sampler.given <= 1 + 3 + 2
    assert draw_indices(repeating(3, 8), None, 1) == [[0, 1, 2]]
