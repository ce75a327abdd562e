"""What a forward pass leaves in a module is put back, however it ends."""

from __future__ import annotations

import random
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace

import broken_isolation
import numpy as np
import pytest
import runs
import torch
from runs import Data, Meter, frozen
from torch import nn

import lightning_gradconf
from lightning_gradconf.gram.module_state import _is_installed, untouched, without_warnings


class Trap(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.number, self.word, self.nothing = 1, "a", None
        self.items, self.pairs, self.recent, self.seen = [1, [2]], {"a": {"b": 1}}, deque([1], maxlen=2), {1}
        self.ordered, self.counts, self.counter = OrderedDict(a=1, b=2), defaultdict(int, a=1), Counter(a=1)
        self.space, self.options = SimpleNamespace(n=1), Namespace(n=[1])
        self.fixed = (1, [2])
        self.array, self.tensor, self.in_list = np.ones(2), torch.ones(2), [torch.ones(2)]
        self.leaf = torch.ones(2, requires_grad=True)
        self.leaf.grad = torch.ones(2)
        self.read_only = np.ones(2)
        self.read_only.flags.writeable = False
        self.meter = Meter()
        self.alias = [self.layer.bias]
        self.hidden = [nn.BatchNorm1d(2)]
        self.generators = (torch.Generator(), np.random.default_rng(1), np.random.RandomState(1), random.Random(1))
        self.loop = self.pairs
        self.pairs["self"] = self.pairs


def change_everything(trap: Trap) -> None:
    trap.number, trap.word, trap.nothing, trap.new = 2, "b", 3, 4
    trap.items.append(3)
    trap.items[1].append(4)
    trap.pairs["a"]["b"] = 2
    trap.pairs["c"] = 3
    trap.recent.extend([2, 3])
    trap.seen.add(2)
    trap.ordered.move_to_end("a")
    trap.counts["b"] += 1
    trap.fixed[1].append(3)
    trap.array += 1
    trap.tensor += 1
    trap.in_list[0] += 1
    trap.meter.update(1)
    trap.hidden[0](torch.randn(4, 2))
    trap.counter["a"] += 1
    trap.counter["b"] += 1
    trap.space.n += 1
    trap.options.n.append(2)
    with torch.no_grad():
        trap.hidden[0].weight += 1
        trap.alias[0] += 1
        trap.leaf += 1
    trap.leaf.grad += 1
    trap.leaf.requires_grad_(False)
    torch.rand(1, generator=trap.generators[0])
    trap.generators[1].random(), trap.generators[2].rand(), trap.generators[3].random()
    torch.rand(1), np.random.rand(), random.random()
    trap.eval()
    trap.layer.requires_grad_(False)
    trap.layer.weight.grad = torch.ones(2, 2)
    trap.layer.register_forward_hook(lambda *_: None)
    del trap.loop


def state(trap: Trap):
    del trap.pairs["self"]
    try:
        generators = [
            frozen(g) if not isinstance(g, np.random.RandomState) else frozen(g.get_state()) for g in trap.generators
        ]
        rng = frozen(torch.get_rng_state()), frozen(np.random.get_state()), random.getstate()
        values = {k: v for k, v in vars(trap).items() if k not in ("generators", "meter", "loop")}
        values["hidden"] = [part.state_dict() for part in trap.hidden]
        values["leaf.grad"] = trap.leaf.grad
        grads = [(p.requires_grad, p.grad is None) for p in trap.parameters()]
        return frozen(values), vars(trap.meter).copy(), generators, rng, grads, trap.loop is trap.pairs, trap.training
    finally:
        trap.pairs["self"] = trap.pairs


@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back(ending):
    trap = Trap()
    before = state(trap)
    keep = {name: value for name, value in vars(trap).items()}
    try:
        with untouched(trap):
            change_everything(trap)
            if ending:
                raise ending
    except (RuntimeError, KeyboardInterrupt) as error:
        assert type(error) is ending
    assert state(trap) == before
    assert all(vars(trap)[name] is value for name, value in keep.items()), "objects were replaced, not put back"


def test_without_isolation_the_same_changes_show():
    trap = Trap()
    before = frozen({k: v for k, v in vars(trap).items() if k in ("items", "array", "tensor", "counts")})
    change_everything(trap)
    assert frozen({k: v for k, v in vars(trap).items() if k in ("items", "array", "tensor", "counts")}) != before


def test_what_did_not_change_is_not_written_to():
    trap = Trap()
    trap.tensor.requires_grad_(True)
    version = trap.tensor._version
    with untouched(trap):
        pass
    assert trap.tensor._version == version


@pytest.mark.parametrize("where", ["attribute", "list"])
def test_an_iterator_is_refused_before_anything_happens(where):
    trap = Trap()
    numbers = iter(range(3))
    trap.numbers = numbers if where == "attribute" else {"deep": [numbers]}
    with pytest.raises(RuntimeError, match=r"Trap\.numbers.* is an iterator"), untouched(trap):
        raise AssertionError("entered")
    assert next(numbers) == 0


def test_other_containers_are_put_back():
    groups = [{"lr": 0.1, "betas": [1, 2]}]
    with untouched(nn.Linear(1, 1), groups):
        groups[0]["lr"] = 1
        groups[0]["betas"].append(3)
        groups.append({})
    assert groups == [{"lr": 0.1, "betas": [1, 2]}]


def test_tensors_of_the_module_when_asked():
    layer = nn.BatchNorm1d(2)
    layer.weight.grad = torch.ones(2)
    grad = layer.weight.grad
    with untouched(layer, tensors=True):
        layer(torch.randn(4, 2))
        layer.weight.data += 1
        grad += 1
        layer.weight.grad = None
    assert torch.equal(layer.running_mean, torch.zeros(2)) and torch.equal(layer.weight, torch.ones(2))
    assert layer.weight.grad is grad and torch.equal(grad, torch.ones(2))


def test_of_data_only_attributes_and_generators_are_put_back():
    class Cached(Data):
        def __init__(self):
            super().__init__()
            self.calls, self.rng, self.cache, self.parts = 0, random.Random(1), {}, [Data()]

    data = Cached()
    state, x = data.rng.getstate(), data.x
    with untouched(nn.Linear(1, 1), data=[data]):
        data.calls += 1
        data.rng.random()
        data.cache[0] = 1
        data.parts[0].augment = True
        data.x = data.x + 1
    assert (data.calls, data.rng.getstate(), data.parts[0].augment) == (0, state, False)
    assert data.x is x and data.cache == {0: 1}


def test_what_is_the_users_own():
    assert not _is_installed("__main__") and not _is_installed(runs.__name__)
    assert all(map(_is_installed, ("torch.nn", "collections", "numpy", "builtins", "lightning_gradconf.callback")))


def test_warnings_shown_once_are_remembered():
    def warn():
        warnings.warn("twice", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with without_warnings():
            warn()
        warn()
        with without_warnings("other"):
            warnings.warn("other words", UserWarning, stacklevel=1)
            warnings.warn("not these", UserWarning, stacklevel=1)
        warn()
    assert [str(w.message) for w in caught] == ["twice", "not these"]


def test_every_break_of_broken_isolation_still_applies():
    package = Path(lightning_gradconf.__file__).parent
    for part, (file, old, _) in broken_isolation.BREAKS.items():
        (path,) = package.rglob(file)
        assert old in path.read_text(), part
