"""What is said where units cannot be cut out of batches, and what is not said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kinds import BATCH, FEATURES, KINDS, Graphs, Net, graph_objects, randn
from test_kinds import close, fit, gram_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def test_a_fall_back_is_said_once_for_all_steps_and_names_the_way_out():
    kind = KINDS["padding that the loss cannot cut"]
    confusion, said = fit(Net(kind.loss), kind.loader(), steps=4)
    assert len(said) == 1 and confusion.last_step == 3
    assert "drawn as with source='fresh' (ValueError: Expected input batch_size" in said[0]
    assert said[0].endswith("Pass source='fresh' to choose this.")


def test_the_reason_is_what_was_found():
    graphs, offsets = (
        fit(Net(KINDS[name].loss), KINDS[name].loader())[1][0] for name in ("graphs as an object", "bags with offsets")
    )
    assert "(samples cannot be told apart in batch, an object of type Graphs)" in graphs
    assert "(batch[0] has the shapes (2,), (8,), (13,) for one, two and three items)" in offsets


def test_what_collating_alone_does_not_help_is_the_error_of_the_user():
    kind = KINDS["padding that the loss cannot cut"]

    def fails(net: Any, batch: Any) -> Any:
        raise ArithmeticError(f"of {len(batch[0])}")

    confusion, said = fit(Net(kind.loss), kind.loader(), loss_fn=fails)
    assert len(said) == 1 and "ArithmeticError: of 1." in said[0] and "fresh" not in said[0]
    assert confusion.last_gram is None


class Squeezes(Net):
    """Fails on a batch of one sample, as modules do that squeeze logits and labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.linear(x).squeeze()
        self.log("accuracy", (logits.argmax(1) == y.squeeze()).double().mean())
        return F.cross_entropy(logits, y.squeeze())


def squeezed(**options: Any) -> Any:
    data = TensorDataset(randn(24, FEATURES, seed=0), torch.arange(24)[:, None] % 4)
    module = Squeezes(lambda *_: None)
    return fit(module, DataLoader(data, batch_size=BATCH), **({"steps": 4, "every_n_train_steps": 1} | options))


@pytest.mark.parametrize("source", ["current", "fresh"])
def test_a_module_that_squeezes_its_batch_is_advised_to_take_two(source):
    confusion, said = squeezed(source=source)
    assert confusion.last_gram is None
    assert len(said) == 1 and said[0].endswith("The module fails on a single sample and not on two: pass unit_size=2.")
    confusion, said = squeezed(source=source, unit_size=2, num_units=3)
    assert said == [] and len(confusion.last_gram) == 3


def test_advice_that_does_not_help_is_not_given():
    def fails(module: Any, batch: Any) -> Any:
        raise ArithmeticError("always")

    _, said = squeezed(loss_fn=fails)
    assert len(said) == 1 and "unit_size" not in said[0]


def test_batches_of_a_stream_that_cannot_be_cut():
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return (KINDS["graphs as an object"].item(i) for i in range(24))

    loader = DataLoader(Stream(), batch_size=BATCH, collate_fn=graph_objects)
    confusion, said = fit(Net(KINDS["graphs as an object"].loss), loader)
    assert len(said) == 1 and "found no tensor with a sample dimension in a batch of type Graphs" in said[0]
    confusion, said = fit(Net(KINDS["graphs as an object"].loss), loader, unit_size="batch", num_units=2, steps=2)
    assert said == [] and len(confusion.last_gram) == 2


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__(lambda *_: None)
        self.norm = nn.BatchNorm1d(4).double()
        self.norm.running_mean += 0.3

    def training_step(self, batch: Graphs, batch_idx: int) -> Any:
        h = torch.zeros(len(batch.y), 4, dtype=batch.x.dtype).index_add(0, batch.of, self.linear(batch.x))
        return F.mse_loss(self.norm(h), batch.y)


@pytest.mark.parametrize("unit_size", [1, "batch"])
def test_a_unit_of_one_graph_is_one_sample_for_batchnorm(unit_size):
    kind = KINDS["graphs as an object"]
    one = kind.loader(batch_size=1)
    confusion, said = fit(Normalised(), kind.loader(), source=one, unit_size=unit_size)
    assert said == []
    expected = Normalised()
    expected.norm.eval()
    close(confusion.last_gram, gram_of(expected, [kind.collate([kind.item(i)]) for i in range(BATCH)]))


def test_units_of_graphs_have_the_statistics_of_their_batch():
    kind = KINDS["graphs as an object"]
    confusion, _ = fit(Normalised(), kind.loader(), source=kind.loader(), unit_size="batch", num_units=4)
    batches = [kind.collate([kind.item(i) for i in range(j, j + BATCH)]) for j in range(0, 24, BATCH)]
    close(confusion.last_gram, gram_of(Normalised(), batches))


def test_classes_of_single_graphs():
    kind = KINDS["graphs as an object"]
    confusion, _ = fit(Net(kind.loss), kind.loader(), labels=lambda batch: int(batch.y.sum() > 0), num_units=12)
    assert "within_class_cosine" in confusion.last_statistics


def test_nothing_is_said_where_units_are_drawn_on_purpose(caplog):
    kind = KINDS["graphs as an object"]
    with caplog.at_level(logging.WARNING):
        _, said = fit(Net(kind.loss), kind.loader(), source="fresh")
    assert said == []
