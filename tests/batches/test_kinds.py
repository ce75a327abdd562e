"""Each kind of batch is measured: the Gram is that of plain autograd on what the collate_fn makes of single items."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from kinds import BATCH, KINDS, Kind, Net
from torch import Tensor

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.batches.layout import learn_places

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


def fit(module: Any, data: Any, steps: int = 1, **options: Any) -> tuple[GradientConfusionCallback, list[str]]:
    """Train with the callback; return it with its warnings."""
    confusion = GradientConfusionCallback(**({"every_n_train_steps": 1, "num_units": BATCH} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=[confusion], **QUIET).fit(module, data)
    said = [str(w.message) for w in caught if "GradientConfusionCallback" in str(w.message)]
    return confusion, said


def gram_of(module: Any, batches: Sequence[Any]) -> Tensor:
    """The oracle: one backward pass a batch."""
    parameters = list(module.parameters())
    rows = []
    for batch in batches:
        loss = module.training_step(batch, 0)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows) @ torch.stack(rows).T


def samples_of(confusion: GradientConfusionCallback) -> list[tuple[int, ...]]:
    """The samples behind each row of the Gram, from a callback with all pairs."""
    pairs = confusion.last_top_pairs
    found = {unit: origin for pair in pairs for unit, origin in zip(pair.units, pair.origins, strict=True)}
    return [found[i].samples for i in range(len(confusion.last_gram))]


def oracle(kind: Kind, samples: Sequence[tuple[int, ...]]) -> Tensor:
    return gram_of(Net(kind.loss), [kind.collate([kind.item(i) for i in group]) for group in samples])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_where_samples_lie_is_learned(name):
    kind = KINDS[name]
    if kind.places is None:
        with pytest.raises(ValueError, match=r"batch|sample"):
            learn_places(kind.loader(), lambda batch: batch)
    else:
        assert learn_places(kind.loader(), lambda batch: batch) == kind.places


@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_units_of_the_batch_in_training(name, unit_size):
    kind = KINDS[name]
    confusion, said = fit(Net(kind.loss), kind.loader(), unit_size=unit_size, top_pairs=100)
    if kind.cut:
        assert said == []
        assert samples_of(confusion) == [tuple(range(i, i + unit_size)) for i in range(0, BATCH, unit_size)]
    else:
        (words,) = said
        assert "source='fresh'" in words
        assert len(confusion.last_gram) == BATCH, "units are drawn from the whole dataset"
    samples = samples_of(confusion)
    assert len({i for group in samples for i in group}) == unit_size * len(samples), "a sample is taken twice"
    close(confusion.last_gram, oracle(kind, samples))


@pytest.mark.parametrize("unit_size", [1, 3])
@pytest.mark.parametrize("source", ["fresh", "fixed"])
@pytest.mark.parametrize("name", KINDS)
def test_draws(name, source, unit_size):
    kind = KINDS[name]
    options = {"source": source, "unit_size": unit_size, "top_pairs": 100, "num_units": 5, "every_n_train_steps": 10}
    confusion, said = fit(Net(kind.loss), kind.loader(shuffle=True), **options)
    assert said == [] and len(confusion.last_gram) == 5
    close(confusion.last_gram, oracle(kind, samples_of(confusion)))


@pytest.mark.parametrize("name", KINDS)
def test_a_loader_of_the_users_gives_its_first_samples(name):
    kind = KINDS[name]
    confusion, said = fit(Net(kind.loss), kind.loader(shuffle=True), source=kind.loader(batch_size=5), num_units=7)
    assert said == []
    close(confusion.last_gram, oracle(kind, [(i,) for i in range(7)]))


@pytest.mark.parametrize("name", KINDS)
def test_whole_batches_leave_out_a_short_last_one(name):
    kind = KINDS[name]
    options = {"unit_size": "batch", "num_units": 6, "every_n_train_steps": 1}
    loader = kind.loader(batch_size=5)  # 5, 5, 5, 5, 4
    module = Net(kind.loss)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    confusion, said = fit(module, loader, steps=7, **options)
    assert said == []
    batches = [tuple(range(i, i + 5)) for i in (0, 5, 10, 15)]
    close(confusion.last_gram, oracle(kind, [*batches, *batches[:2]][-len(confusion.last_gram) :]))
    assert len(confusion.last_gram) == 5, "as many as an epoch has batches"
