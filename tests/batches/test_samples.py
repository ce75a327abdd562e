"""Where samples lie: what is learned from a collate_fn, and what is assumed without one."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.layout import Layout, learn_places
from lightning_gradconf.batches.samples import assume, count, cut

ROWS = [(torch.randn(5, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(20)]


def learned(collate, data=ROWS, prepare=lambda batch: batch):
    return learn_places(DataLoader(data, batch_size=4, collate_fn=collate), prepare)


def test_what_is_drawn_at_random_for_a_batch_is_shared():
    def mixup(items):
        x, y = default_collate(items)
        weight, order = np.random.beta(0.4, 0.4), torch.randperm(len(x))
        return {"x": weight * x + (1 - weight) * x[order], "y": y, "other": y[order], "weight": weight}

    assert learned(mixup) == {"batch['x']": 0, "batch['y']": 0, "batch['other']": 0, "batch['weight']": None}


def test_masks_drawn_for_each_sample_keep_the_place_of_samples():
    def masked(items):
        x, y = default_collate(items)
        return x * (torch.rand(x.shape) > 0.3), y, random.random()

    assert learned(masked) == {"batch[0]": 0, "batch[1]": 0, "batch[2]": None}


def test_arrays_are_cut_along_their_dimension():
    def arrays(items):
        return {"x": np.stack([x.numpy() for x, _ in items], 1), "y": torch.tensor([y for _, y in items])}

    places = learned(arrays)
    assert places == {"batch['x']": 1, "batch['y']": 0}
    batch = arrays(ROWS[:4])
    units = cut(batch, places, {"batch": 1})
    np.testing.assert_array_equal(units[2]["x"], batch["x"][:, 2:3])
    assert not np.shares_memory(units[2]["x"], batch["x"])


def test_hooks_are_part_of_what_makes_a_batch():
    assert learned(default_collate, prepare=lambda batch: {"x": batch[0].T, "y": batch[1]}) == {
        "batch['x']": 1,
        "batch['y']": 0,
    }
    with pytest.raises(ValueError, match=r"batch\[0\] has the shapes \(2, 5\), \(4, 5\), \(6, 5\)"):
        learned(default_collate, prepare=lambda batch: (torch.cat([batch[0], batch[0]]), batch[1]))


@pytest.mark.parametrize(
    ("collate", "words"),
    [
        (lambda items: {"x": torch.stack([x for x, _ in items]), len(items): 1}, "batch has other entries"),
        (lambda items: items[0] if len(items) == 1 else items, "batch has another type"),
        (lambda items: (torch.stack([x for x, _ in items]), len(items)), r"batch\[1\] differs between batches of one"),
        (lambda items: torch.zeros(2), "nothing in the batch grows"),
        (lambda items: torch.cat([x + i for i, (x, _) in enumerate(items)]).view(-1, 5), "a sample cut out of a batch"),
    ],
)
def test_what_is_not_side_by_side_is_named(collate, words):
    with pytest.raises(ValueError, match=words):
        learned(collate)


class Closed(list):
    def __getitem__(self, i):
        raise OSError("opened in the workers alone")


@pytest.mark.parametrize("data", [Closed(range(9)), ROWS[:2]], ids=["cannot be read", "too few"])
def test_nothing_is_learned_without_items(data):
    assert learned(default_collate, data) is None


def test_a_loader_that_changes_what_collate_fn_returns():
    class Renamed(DataLoader):
        def __iter__(self):
            return ({"x": x, "y": y} for x, y in super().__iter__())

    loader = Renamed(ROWS, batch_size=4)
    layout = Layout(Feed(loader), loader)
    batch = next(iter(loader))
    assert layout.placed(batch) == ({"batch['x']": 0, "batch['y']": 0}, {"batch": 4})
    with pytest.raises(ValueError, match=r"batch\['x'\] is not in the batches"):
        layout.placed({"x": torch.zeros(3, 4), "y": torch.zeros(3)})


def test_sizes_that_contradict_one_another_are_named():
    with pytest.raises(ValueError, match=r"batch\[0\] \(4, 5\), batch\[1\] \(3,\)"):
        count((torch.zeros(4, 5), torch.zeros(3)), {"batch[0]": 0, "batch[1]": 0})
    with pytest.raises(ValueError, match=r"batch\[1\] is missing"):
        count((torch.zeros(4, 5),), {"batch[0]": 0, "batch[1]": 0})


@pytest.mark.parametrize(
    ("shapes", "batch_size"),
    [(((12, 6, 3), (12, 6)), 6), (((4, 6, 3), (4, 6)), 6), (((16, 3), (16,)), 8)],
    ids=["longer sequences", "shorter sequences", "two rows a sample"],
)
def test_a_count_that_contradicts_the_batch_size_is_refused_with_the_shapes(shapes, batch_size):
    batch = tuple(map(torch.zeros, shapes))
    words = (
        f"counts {shapes[0][0]} samples, but the loader's batch_size is {batch_size} (batch[0] {shapes[0]}, batch[1]"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        assume(batch, batch_size)


def test_a_short_last_batch_contradicts_nothing():
    assert assume((torch.zeros(5, 3), torch.zeros(5)), 8) == {"batch[0]": 0, "batch[1]": 0}


def test_a_tuple_of_mappings_is_a_list_of_samples_only_if_their_tensors_count_differently():
    inputs = ({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, {"x": torch.zeros(2, 3)})
    assert assume(inputs) == {"batch[0]['x']": 0, "batch[0]['y']": 0, "batch[1]['x']": 0}
    images = ({"image": torch.zeros(3, 8, 8), "boxes": torch.zeros(2, 4)}, {"image": torch.zeros(3, 8, 8)})
    assert assume(images) == {"batch": "entries"}
    assert assume([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3)}]) == {"batch": "entries"}


def test_units_take_a_share_of_each_part():
    batch = {"a": [torch.arange(6)], "b": torch.arange(14)}
    units = cut(batch, {"batch['a'][0]": 0, "batch['b']": 0}, {"batch['a']": 2, "batch['b']": 4})
    assert [(unit["a"][0].tolist(), unit["b"].tolist()) for unit in units] == [
        ([0, 1], [0, 1, 2, 3]),
        ([2, 3], [4, 5, 6, 7]),
        ([4, 5], [8, 9, 10, 11]),
    ]
    batch["a"] = None  # that loader has come to its end
    assert len(cut(batch, {"batch['a'][0]": 0, "batch['b']": 0}, {"batch['a']": 2, "batch['b']": 4})) == 3
