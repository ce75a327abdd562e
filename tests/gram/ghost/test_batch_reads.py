"""Parts of a batch that are no tensors, and differ between units."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gradconf.gram.ghost.agreement import UnitsDiffer
from lightning_gradconf.gram.ghost.batch_reads import PartOfUnits, part_of_units
from lightning_gradconf.gram.ghost.unit_mode import UnitMode


@pytest.fixture
def mode():
    return UnitMode(3, own_at=(), running_statistics=False, dropout=False)


def test_a_part_that_all_units_have_is_that_part(mode):
    assert part_of_units([["a"], ["a"], ["a"]], "batch", mode) == ["a"]


def test_what_units_have_in_common_can_be_read(mode):
    part = part_of_units([["a", 1], ["b", 1], ["c", 1]], "batch", mode)
    assert isinstance(part, list) and len(part) == 2 and part and part[1] == 1
    first, second = part
    assert second == 1 and isinstance(first, str) and type(first) is PartOfUnits
    facts = part_of_units([{"fold": 1, "id": i} for i in range(3)], "batch", mode)
    assert facts["fold"] == 1 and [*facts] == ["fold", "id"] and type(facts["id"]) is PartOfUnits
    assert not hasattr(facts, "to")
    assert mode.differ is None


@pytest.mark.parametrize(
    "look",
    [
        str,
        repr,
        hash,
        lambda name: f"{name}",
        lambda name: name == "a",
        lambda name: name in {"a"},
        lambda name: "a" in name,
        lambda name: name + "b",
        lambda name: "b" + name,
        lambda name: name.upper(),
        lambda name: next(iter(name)) == "a",
        lambda name: name.__setattr__("more", 1),
    ],
)
def test_looking_at_what_differs_shows_who_agrees(mode, look):
    name = part_of_units(["aa", "bb", "aa"], "batch['name']", mode)
    with pytest.raises(UnitsDiffer) as caught:
        look(name)
    assert caught.value.values == [0, 1, 0] and mode.differ is caught.value


@pytest.mark.parametrize("look", [lambda name: "-".join([name]), Path, float, lambda name: name / "b"])
def test_where_c_asks_for_a_type_of_its_own_it_finds_another(mode, look):
    name = part_of_units(["1", "2", "1"], "batch['name']", mode)
    with pytest.raises((TypeError, UnitsDiffer)):
        look(name)


def test_units_are_told_apart_by_what_they_have(mode):
    with pytest.raises(UnitsDiffer) as caught:
        part_of_units([["a"], ["b"], ["a"]], "batch['name']", mode)[0].lower()
    assert caught.value.values == [0, 1, 0]
    with pytest.raises(UnitsDiffer, match="batch"):
        part_of_units([None, "b", None], "batch['name']", mode)
    with pytest.raises(UnitsDiffer, match=r"len\(batch\)"):
        len(part_of_units([["a"], ["b", "c"], ["d"]], "batch", mode))
