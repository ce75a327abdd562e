"""Wrong calls of the callback, and what they are told."""
# ruff: noqa: E501

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradconf import GradientConfusionCallback

LOSS_FN = "loss_fn takes the module and a batch, and returns the loss of the batch: loss_fn=lambda module, batch: "
# What is written, and what the error says.
WRONG = [
    ({"every_n_train_steps": 0}, "every_n_train_steps=0 must be an integer of at least 1"),
    ({"every_n_train_steps": 1.5}, "every_n_train_steps=1.5 must be an integer of at least 1"),
    ({"every_n_train_steps": True}, "every_n_train_steps=True must be an integer of at least 1"),
    ({"every_n_train_steps": "50"}, "every_n_train_steps='50' must be an integer of at least 1"),
    ({"every_n_epochs": -1}, "every_n_epochs=-1 must be an integer of at least 1"),
    ({"every_n_train_steps": 1, "every_n_epochs": 2}, "every_n_epochs=2 exclude each other; give one of them"),
    ({"max_overhead": 5}, "max_overhead=5 must be a part of the run's time, above 0 and at most 1: 0.05 is 5 %"),
    ({"max_overhead": 0}, "None keeps to the interval of the Trainer, whatever it costs"),
    ({"max_overhead": True}, "max_overhead=True must be a part of the run's time"),
    ({"num_units": 1}, "num_units=1 must be an integer of at least 2"),
    ({"num_units": None}, "num_units=None must be an integer of at least 2"),
    ({"unit_size": 0}, "unit_size=0 must be an integer of at least 1"),
    ({"unit_size": "all"}, "unit_size='all' must be a number of samples, or 'batch' for a whole batch"),
    ({"source": "val"}, "source='val' is not 'current', 'fresh', 'fixed' or a DataLoader"),
    ({"source": TensorDataset(torch.zeros(1))}, "source=a TensorDataset is not 'current', 'fresh', 'fixed' or a Data"),
    ({"engine": "fast"}, "engine='fast' is not one of 'auto', 'ghost', 'vmap', 'loop'"),
    ({"engine": None}, "engine=None is not one of"),
    ({"memory_budget": "lots"}, "memory_budget='lots' is no amount of memory; give bytes as an integer, or a text like"),
    ({"memory_budget": 0}, "memory_budget=0 is no amount of memory"),
    ({"memory_budget": 1.5}, "memory_budget=1.5 is no amount of memory"),
    ({"parameters": 5}, "parameters=5 must be a pattern on names of parameters, such as 'encoder.*', or a list of them"),
    ({"parameters": []}, "parameters=[] must be a pattern on names of parameters"),
    ({"parameters": ""}, "parameters='' must be a pattern on names of parameters"),
    ({"parameters": [nn.Linear(1, 1).weight]}, "must be a pattern on names of parameters"),
    ({"loss_fn": "mse"}, f"loss_fn='mse' is not a function; {LOSS_FN}"),
    ({"loss_fn": nn.CrossEntropyLoss()}, f"loss_fn=<CrossEntropyLoss> compares outputs with targets; {LOSS_FN}"),
    ({"loss_fn": F.cross_entropy}, f"loss_fn=cross_entropy compares outputs with targets; {LOSS_FN}"),
    ({"loss_fn": lambda batch: batch}, f"cannot be called with two arguments; {LOSS_FN}"),
    ({"dropout": "yes"}, "dropout='yes' must be True or False"),
    ({"statistics": []}, "statistics=[] names nothing to log; give names such as ['eta', 'min_cosine'], 'default' or 'all'"),
    ({"statistics": None}, "statistics=None names nothing to log"),
    ({"statistics": ["eta", "mean"]}, "There is no statistic ['mean']: choose from eta, min_cosine"),
    ({"statistics": ["within_class_cosine"]}, "['within_class_cosine'] compare classes, but there are no labels"),
    ({"per_layer": -1}, "per_layer=-1 must be an integer of at least 0"),
    ({"histogram": None}, "histogram=None must be True or False"),
    ({"figures": 3}, "figures=3 must be True or False"),
    ({"top_pairs": -1}, "top_pairs=-1 must be an integer of at least 0"),
    ({"labels": 1.5}, "labels=1.5 must say where a batch has its classes: a key, an index, or a function of the batch"),
    ({"labels": 1, "unit_size": "batch"}, "labels= gives each unit one class, so it needs unit_size=1, found 'batch'"),
    ({"prefix": ""}, "prefix='' must be a word that keys begin with, without a slash at either end; write prefix='grad"),
    ({"prefix": "a/"}, "prefix='a/' must be a word that keys begin with, without a slash at either end; write prefix='a'"),
    ({"prefix": 3}, "prefix=3 must be a word that keys begin with"),
    ({"prog_bar": "no"}, "prog_bar='no' must be True or False"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
    ({"verify": 2}, "verify=2 must be True or False"),
    ({"log_every_n_steps": 5}, "GradientConfusionCallback has no argument log_every_n_steps=5; use every_n_train_steps="),
    ({"batch_size": 5}, "has no argument batch_size=5; use unit_size="),
    ({"num_unit": 5}, "has no argument num_unit=5; use num_units="),
    ({"xyz": 5}, "has no argument xyz=5; its arguments are every_n_train_steps, every_n_epochs, max_overhead, num_units"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[f"{i} {', '.join(a)}" for i, (a, _) in enumerate(WRONG)])
def test_wrong_calls(arguments, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        GradientConfusionCallback(**arguments)
    assert words in str(caught.value)
    assert len(WRONG) >= 40


def test_arguments_have_names():
    with pytest.raises(
        TypeError, match=r"by name only, found 50 .*GradientConfusionCallback\(every_n_train_steps=50\)"
    ):
        GradientConfusionCallback(50)


def test_two_schedules_are_misuse_of_the_trainer():
    with pytest.raises(MisconfigurationException, match="every_n_train_steps=1 and every_n_epochs=2"):
        GradientConfusionCallback(every_n_train_steps=1, every_n_epochs=2)


def test_integers_of_numpy_and_torch_are_integers():
    confusion = GradientConfusionCallback(
        every_n_train_steps=np.int64(5), num_units=np.uint8(4), unit_size=torch.tensor(1), top_pairs=np.int32(2),
        labels=np.int64(1), memory_budget=np.int64(10**9), figures=np.bool_(False), seed=np.int16(3),
    )  # fmt: skip
    values = [confusion.every_n_train_steps, confusion.num_units, confusion.unit_size, confusion.labels, confusion.seed]
    assert values == [5, 4, 1, 1, 3] and all(type(value) is int for value in values)
    assert confusion.memory_budget == 10**9 and confusion.figures is False


def test_it_prints_the_arguments_that_differ_from_the_defaults():
    def loss(module, batch):
        return module(batch)

    class Mine(GradientConfusionCallback):
        def __init__(self):
            super().__init__(num_units=4, seed=0, statistics=["eta"])

    data = DataLoader(TensorDataset(torch.zeros(1)))
    assert repr(GradientConfusionCallback()) == "GradientConfusionCallback()"
    assert repr(GradientConfusionCallback(num_units=32, unit_size="batch", loss_fn=loss, source=data)) == (
        "GradientConfusionCallback(unit_size='batch', "
        "loss_fn=test_it_prints_the_arguments_that_differ_from_the_defaults.<locals>.loss, source=<DataLoader>)"
    )
    assert repr(Mine()) == "Mine(num_units=4, statistics=['eta'])"


def test_containers_of_omegaconf():
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"statistics": ["eta", "min_cosine"], "parameters": ["net.*"], "labels": "y"})
    confusion = GradientConfusionCallback(**config)
    assert confusion.statistics == ("eta", "min_cosine") and confusion.parameters == ("net.*",)
    assert repr(confusion) == (
        "GradientConfusionCallback(statistics=['eta', 'min_cosine'], parameters=['net.*'], labels='y')"
    )


def test_hydra_instantiates_it():
    hydra = pytest.importorskip("hydra.utils")
    target = {"_target_": "lightning_gradconf.GradientConfusionCallback", "unit_size": "batch", "statistics": ["eta"]}
    confusion = hydra.instantiate(target)
    assert confusion.unit_size == "batch" and confusion.statistics == ("eta",)
