"""What a forward pass leaves in a module is put back, however it ends."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from runs import frozen
from torch import nn

from lightning_gradconf.isolation import untouched


class Meter:
    def __init__(self):
        self.total, self.values = 0, []


class Trap(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.number, self.word, self.nothing = 1, "a", None
        self.items, self.pairs, self.recent, self.seen = [1, [2]], {"a": {"b": 1}}, deque([1], maxlen=2), {1}
        self.ordered, self.counts = OrderedDict(a=1, b=2), defaultdict(int, a=1)
        self.fixed = (1, [2])
        self.array, self.tensor, self.in_list = np.ones(2), torch.ones(2), [torch.ones(2)]
        self.meter = Meter()
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
    trap.meter.total += 1
    trap.meter.values.append(1)
    trap.hidden[0](torch.randn(4, 2))
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
