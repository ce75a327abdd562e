"""Batches of every structure, to units and back."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradconf.batches.units import copy_of, num_samples, split, stack

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
BATCHES = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "dict": {"x": X, "y": Y},
    "ordered dict": OrderedDict(x=X, y=Y),
    "default dict": defaultdict(list, x=X),
    "namedtuple": Point(X, Y),
    "frozen dataclass": Frozen(X, "name"),
    "nested": {"a": (X, [Y, {"b": X}]), "c": Frozen(X, "name")},
    "shared tensors": {"x": X, "temperature": torch.tensor(2.0), "mask": torch.ones(1, 2)},
    "leaves that are no tensors": {"x": X, "name": "n", "number": 3, "none": None, "set": {1}},
    "strings of samples": {"x": X, "path": list("abcdef"), "tags": ("u", "v")},
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert type(a) is type(b) and list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, Frozen):
        same((a.x, a.name), (b.x, b.name))
    else:
        assert a == b


@pytest.mark.parametrize("unit_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", BATCHES)
def test_units_are_the_samples_of_the_batch(name, unit_size):
    batch = BATCHES[name]
    units = split(batch, unit_size)
    assert len(units) == 6 // unit_size
    assert all(num_samples(unit) == unit_size for unit in units)
    for i, unit in enumerate(units):
        same(unit, part_of(batch, slice(i * unit_size, (i + 1) * unit_size)))


def part_of(node, samples):
    """What a unit has of a batch of six."""
    if isinstance(node, torch.Tensor) or (isinstance(node, list) and node == list("abcdef")):
        return node[samples] if isinstance(node, list) or (node.dim() and len(node) == 6) else node
    if isinstance(node, Frozen):
        return Frozen(node.x[samples], node.name)
    if isinstance(node, dict):
        rebuilt = copy.copy(node)
        rebuilt.update({key: part_of(child, samples) for key, child in node.items()})
        return rebuilt
    if isinstance(node, list | tuple):
        entries = [part_of(child, samples) for child in node]
        return type(node)(*entries) if hasattr(node, "_fields") else type(node)(entries)
    return node


def tensors_in(node):
    if isinstance(node, torch.Tensor):
        return [node]
    children = node.values() if isinstance(node, dict) else vars(node).values() if isinstance(node, Frozen) else node
    return (
        [t for child in children for t in tensors_in(child)] if isinstance(node, dict | list | tuple | Frozen) else []
    )


@pytest.mark.parametrize("name", BATCHES)
def test_units_share_no_memory_with_the_batch(name):
    batch = BATCHES[name]
    own = {t.untyped_storage().data_ptr() for t in tensors_in(batch)}
    for unit in [*split(batch, 2), copy_of(batch)]:
        copies = tensors_in(unit)
        assert copies and own.isdisjoint(t.untyped_storage().data_ptr() for t in copies)


def test_a_unit_holds_its_own_samples():
    units = split({"x": X, "path": list("abcdef"), "scale": torch.tensor(3.0)}, 2)
    same(units[1], {"x": X[2:4], "path": ["c", "d"], "scale": torch.tensor(3.0)})


def test_a_short_rest_makes_no_unit():
    assert [len(unit) for unit in split(X, 4)] == [4]
    assert len(split(X, 2, num_units=2)) == 2
    assert split(X, 7) == []


@given(st.integers(1, 40), st.integers(1, 8))
def test_every_sample_of_full_units_appears_once(samples, unit_size):
    units = split((torch.arange(samples),), unit_size)
    assert [int(i) for unit in units for i in unit[0]] == list(range(samples // unit_size * unit_size))


def test_hugging_face_batch_keeps_its_type():
    encoding = pytest.importorskip("transformers").BatchEncoding
    batch = encoding({"input_ids": X.long(), "attention_mask": X.long()})
    units = split(batch, 2)
    assert type(units[0]) is encoding and units[0]["input_ids"].shape == (2, 2)
    assert batch["input_ids"].shape == (6, 2)


def test_stack_gives_rows_that_rebuild_each_unit():
    units = split({"x": X, "y": Y, "name": "n"}, 2)
    tensors, unit = stack(units)
    assert [tuple(t.shape) for t in tensors] == [(3, 2, 2), (3, 2)]
    for i, expected in enumerate(units):
        same(unit([t[i] for t in tensors]), expected)


def test_stack_refuses_what_differs():
    with pytest.raises(ValueError, match=r"batch\['x'\] has different shapes"):
        stack([{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}])
    with pytest.raises(ValueError, match=r"batch\['path'\] is no tensor and differs"):
        stack(split({"x": X, "path": list("abcdef")}, 1))


DETECTION = {
    "two lists": (
        [torch.ones(3, 4 + i, 5) for i in range(4)],
        [{"boxes": torch.full((i, 4), float(i)), "label": torch.tensor(i)} for i in range(4)],
    ),
    "list of mappings": [{"image": torch.ones(3, 4 + i, 5), "boxes": torch.ones(i, 4)} for i in range(4)],
    "boxes as many as channels": (
        [torch.ones(3, 4, 4) for _ in range(4)],
        [{"boxes": torch.ones(3, 4)} for _ in range(4)],
    ),
}


@pytest.mark.parametrize("name", DETECTION)
def test_samples_of_a_detector_lie_along_lists(name):
    batch = DETECTION[name]
    assert num_samples(batch) == 4
    units = split(batch, 2)
    assert [num_samples(unit) for unit in units] == [2, 2]
    same(units[1], type(batch)(part[2:4] for part in batch) if name != "list of mappings" else batch[2:])


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": X, "y": torch.ones(5, 3)}, r"batch\['x'\] \(6, 2\), batch\['y'\] \(5, 3\)"),
        ((X, {"deep": [torch.ones(4)]}), r"batch\[1\]\['deep'\]\[0\] \(4,\)"),
        ({"a": [X, Y], "b": [X[:4], Y[:4]]}, r"batch\['b'\]\[1\] \(4,\)"),
        ({"name": "no tensor"}, "batch of type dict"),
        (torch.tensor(1.0), "batch of type Tensor"),
        (None, "batch of type NoneType"),
    ],
)
def test_a_batch_whose_samples_cannot_be_told_is_refused(batch, words):
    with pytest.raises(ValueError, match=words):
        num_samples(batch)
