"""Batches of several loaders: a unit has samples of each, in the proportion of their batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import CombinedLoader
from test_kinds import close, fit, gram_of, samples_of
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradconf.batches.draws import draw
from lightning_gradconf.batches.feed import Feed
from lightning_gradconf.batches.loaders import loaders_in, shares


def rows(n: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(k, generator=generator, dtype=torch.float64) for name, k in (("x", 3), ("y", 2))}
        for _ in range(n)
    ]


LABELLED, OTHERS = rows(32, 1), rows(96, 2)


def batch_of(items: Any) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in ("x", "y")}


class Both(pl.LightningModule):
    """A loss of labelled samples, and one of others."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(3, 2).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if "x" not in batch else [batch]
        losses = [F.mse_loss(self.net(part["x"]), part["y"]) for part in parts[:1] if part is not None]
        losses += [(self.net(part["x"]).square()).mean() for part in parts[1:] if part is not None]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Listed(Both):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a, b = batch
        return super().training_step({"a": a, "b": b}, batch_idx)


def loaders(small: int = 4, large: int = 12, kind: Any = dict) -> Any:
    both = DataLoader(LABELLED, batch_size=small), DataLoader(OTHERS, batch_size=large)
    return kind(both) if kind is not dict else {"a": both[0], "b": both[1]}


def unit(i: int, small: int, large: int) -> dict[str, Any]:
    return {
        "a": batch_of(LABELLED[i * small : (i + 1) * small]),
        "b": batch_of(OTHERS[i * large : (i + 1) * large]),
    }


@pytest.mark.parametrize(("unit_size", "share"), [(1, 3), (2, 6)])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_unit_has_samples_of_each_loader(kind, unit_size, share):
    confusion, said = fit(Both() if kind is dict else Listed(), loaders(kind=kind), unit_size=unit_size)
    assert said == []
    close(confusion.last_gram, gram_of(Both(), [unit(i, unit_size, share) for i in range(4 // unit_size)]))


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("source", ["current", "fresh"])
def test_modes_of_a_combined_loader(mode, source):
    confusion, said = fit(
        Both(), CombinedLoader(loaders(16, 12), mode), steps=7, source=source, unit_size=4, num_units=3
    )
    assert said == [] and len(confusion.last_gram) == 3
    if source == "current" and mode == "max_size":  # the step of index 6: the labelled ones have come to their end
        rest = [{"a": None, "b": batch_of(OTHERS[i : i + 4])} for i in range(72, 84, 4)]
        close(confusion.last_gram, gram_of(Both(), rest))


def test_draws_take_each_sample_once():
    units = draw(Feed(loaders()), 10, 2, (0,))
    assert len(units) == 10 and all(found.size == 2 for found in units)
    assert {found.batch["a"]["x"].shape for found in units} == {(2, 3)}
    assert {found.batch["b"]["x"].shape for found in units} == {(6, 3)}
    seen = [tuple(row) for found in units for row in found.batch["b"]["x"].tolist()]
    assert len(set(seen)) == 60 and set(seen) <= {tuple(item["x"].tolist()) for item in OTHERS}


def test_draws_are_those_of_plain_autograd():
    confusion, said = fit(Both(), loaders(8, 8), source="fresh", unit_size=32, num_units=2, top_pairs=9)
    assert said and "gives 1 unit" in said[0], "32 labelled samples are one unit of 32"
    confusion, said = fit(Both(), {"a": DataLoader(LABELLED, batch_size=8)}, source="fresh", num_units=6, top_pairs=99)
    samples = samples_of(confusion)
    close(confusion.last_gram, gram_of(Both(), [{"a": batch_of([LABELLED[i] for i in group])} for group in samples]))


def test_whole_batches_of_all_loaders():
    confusion, said = fit(Both(), loaders(4, 12), unit_size="batch", num_units=3, steps=3)
    assert said == []
    close(confusion.last_gram, gram_of(Both(), [unit(i, 4, 12) for i in range(3)]))


def test_a_loader_that_comes_to_its_end_is_no_shorter_batch():
    combined = CombinedLoader(loaders(16, 12), "max_size")  # 2 batches of one, 8 of the other
    confusion, said = fit(Both(), combined, unit_size="batch", num_units=4, steps=5)
    assert said == [] and confusion.last_step == 4
    batches = [{"a": None, "b": batch_of(OTHERS[i : i + 12])} for i in range(0, 60, 12)]
    for i in range(2):
        batches[i]["a"] = batch_of(LABELLED[16 * i : 16 * i + 16])
    close(confusion.last_gram, gram_of(Both(), batches[1:]))


def test_loaders_nested_in_structures():
    assert list(loaders_in({"a": 1, "b": [2, {"c": 3}]})) == ["batch['a']", "batch['b'][0]", "batch['b'][1]['c']"]


def test_shares_are_rounded():
    sizes = {name: DataLoader(range(99), batch_size=size) for name, size in (("a", 8), ("b", 20), ("c", 9))}
    assert shares(sizes, 1) == {"a": 1, "b": 2, "c": 1}
    assert shares(sizes, 4) == {"a": 4, "b": 10, "c": 4}
    assert shares({"a": DataLoader(range(9)), "b": [1]}, 2, {"b": 3}) == {"a": 2, "b": 6}


class Stream(IterableDataset):
    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def test_streams_lie_on_dimension_0_of_their_parts():
    both = [DataLoader(Stream(LABELLED), batch_size=4), DataLoader(Stream(OTHERS), batch_size=12)]
    confusion, said = fit(Listed(), both)
    assert said == []
    close(confusion.last_gram, gram_of(Both(), [unit(i, 1, 3) for i in range(4)]))
