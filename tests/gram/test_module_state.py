"""What a forward pass leaves in a module is put back, however it ends."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import broken_isolation
import numpy as np
import pytest
import runs
import torch
from runs import Data, Meter, frozen
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

import lightning_gradconf
from lightning_gradconf import gradient_gram
from lightning_gradconf.batches.loaders import changes
from lightning_gradconf.gram.module_state import _is_installed, rewinder, untouched
from lightning_gradconf.gram.process_state import without_warnings


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


def test_python_state_is_put_back_between_units():
    trap = Trap()

    def seen():
        values = {k: v for k, v in vars(trap).items() if k not in ("generators", "meter", "loop", "pairs", "_modules")}
        values["hidden"] = [part.state_dict() for part in trap.hidden]
        return frozen(values), vars(trap.meter).copy(), trap.pairs["a"], list(trap.pairs), trap.leaf.grad.tolist()

    before, draws = seen(), trap.generators[3].getstate()
    rewind = rewinder(trap)
    for _ in range(3):
        change_everything(trap)
        assert seen() != before
        rewind()
        assert seen() == before
    assert trap.generators[3].getstate() != draws, "each unit draws random numbers of its own"


def test_what_only_a_later_unit_changes_is_put_back():
    trap = Trap()
    rewind = rewinder(trap)
    rewind()  # after a unit that changed nothing
    trap.number, trap.new = 5, 1
    trap.items[1].append(3)
    trap.tensor += 1
    rewind()
    assert trap.number == 1 and not hasattr(trap, "new") and trap.items == [1, [2]] and trap.tensor.tolist() == [1, 1]


def test_what_only_some_units_change_is_put_back():
    trap = Trap()
    before, rewind = trap.array.copy(), rewinder(trap)
    for written in (True, False, True):
        if written:
            trap.array += 1
        rewind()
        assert (trap.array == before).all()


class Slots:
    __slots__ = ("more", "number")

    def __init__(self):
        self.number, self.more = 0, [0]


class OwnDict(dict):
    pass


class Counting:
    def __init__(self):
        self.number = 0

    def add(self, by=1):
        self.number += by


def counting(holder):
    """Return a module that holds an object in some way, and the object."""
    module, counter = nn.Linear(1, 1), Counting()
    module.held = holder(counter)
    return module, counter


@pytest.mark.parametrize(
    "holder",
    [
        lambda counter: counter.add,
        lambda counter: partial(Counting.add, counter),
        lambda counter: partial(counter.add, by=2),
        lambda counter: {counter},
        lambda counter: frozenset({counter}),
        lambda counter: {counter: 1},
        lambda counter: SimpleNamespace(deep=[(counter,)]),
    ],
)
def test_objects_are_found_however_they_are_held(holder):
    module, counter = counting(holder)
    with untouched(module):
        counter.add()
        counter.new = 1
    assert vars(counter) == {"number": 0}


def test_attributes_of_containers_and_of_objects_without_a_dictionary_are_put_back():
    module = nn.Linear(1, 1)
    module.slots, module.own = Slots(), OwnDict(a=1)
    module.own.count = 0
    with untouched(module):
        module.slots.number = 5
        module.slots.more.append(1)
        module.own.count = 5
        module.own["b"] = 2
    assert (module.slots.number, module.slots.more, module.own.count, dict(module.own)) == (0, [0], 0, {"a": 1})


def test_a_long_chain_of_objects_is_followed():
    module = nn.Linear(1, 1)
    module.chain = last = Counting()
    for _ in range(3000):
        last.following = Counting()
        last = last.following
    with untouched(module):
        last.add()
    assert last.number == 0


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 4, dtype=torch.float64)

    def error(self, x):
        return (self.net(x) - x[:, :4]).square().mean()


class Counts(Base):
    """Takes turns between two losses by a counter of its own."""

    calls = 0

    def loss(self, x):
        self.calls += 1
        return self.error(x) if self.calls % 2 else self.net(x).abs().sum()


class Queue(Base):
    """A memory of embeddings, with its position in Python."""

    def __init__(self):
        super().__init__()
        self.at = 0
        self.register_buffer("memory", torch.zeros(16, 4, dtype=torch.float64))

    def loss(self, x):
        z = self.net(x)
        self.memory[(self.at + torch.arange(len(z))) % 16] = z.detach()
        self.at = (self.at + len(z)) % 16
        return (z @ self.memory[: self.at or 16].T).square().mean() + self.error(x)


class Cached(Base):
    """A buffer made anew for another size of batch, with its key in Python."""

    def __init__(self):
        super().__init__()
        self.key = -1
        self.register_buffer("cache", None, persistent=False)

    def loss(self, x):
        if len(x) != self.key:
            self.cache, self.key = torch.full((len(x), 1), 1.0 / len(x), dtype=torch.float64), len(x)
        return (self.net(x) * self.cache).square().sum()


class Remembers(Base):
    """Lists, dictionaries and tensors that are no buffers."""

    def __init__(self):
        super().__init__()
        self.outputs, self.seen, self.scale = [], {}, torch.ones((), dtype=torch.float64)
        self.hidden = [nn.Linear(1, 1, dtype=torch.float64)]

    def loss(self, x):
        self.outputs.append(len(x))
        self.seen[len(self.seen)] = 1
        self.scale.mul_(2)
        with torch.no_grad():
            self.hidden[0].bias.add_(1)
        return self.error(x) * self.scale * len(self.outputs) * len(self.seen) + self.net(x).sum() * self.hidden[0].bias


class Lowest(Base):
    """Changes its state on some units only."""

    lowest = 1.0

    def loss(self, x):
        self.lowest = min(self.lowest, float(x[0, 0]))
        return self.error(x) * self.lowest


class Freezes(Base):
    """Freezes a parameter in its forward pass."""

    def loss(self, x):
        self.net.bias.requires_grad_(False)
        return self.error(x)


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("unit_size", [1, 2])
@pytest.mark.parametrize("kind", [Counts, Queue, Cached, Remembers, Lowest, Freezes])
def test_each_unit_starts_from_the_same_state(kind, unit_size, engine):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(8, 5, dtype=torch.float64)
    for _ in range(2):  # a step, so that the state is not that of the first one
        module.loss(x)
        module.requires_grad_()
    rows = []
    for unit in x.split(unit_size):
        twin = copy.deepcopy(module)
        twin.zero_grad()
        twin.loss(unit).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    for _ in range(2):
        grams = gradient_gram(module, lambda module, x: module.loss(x), x, unit_size=unit_size, engine=engine)
        torch.testing.assert_close(sum(grams.values()), expected, rtol=1e-10, atol=1e-12)


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


def test_of_data_attributes_generators_and_what_is_small_are_put_back():
    class Cached(Data):
        def __init__(self):
            super().__init__()
            self.calls, self.rng, self.cache, self.parts = 0, random.Random(1), {}, [Data()]
            self.weights, self.errors, self.recent = torch.ones(3), {"epoch": np.zeros(3)}, deque([1], 2)
            self.images = torch.zeros(1 << 10).expand(1 << 11, -1)  # large, so that no copy of it is kept

    data = Cached()
    state, x = data.rng.getstate(), data.x
    with untouched(nn.Linear(1, 1), data=[data]):
        data.calls += 1
        data.rng.random()
        data.cache[0] = 1
        data.parts[0].augment = True
        data.x = data.x + 1
        data.weights[0] = 2
        data.errors["epoch"] += 1
        data.recent.extend([2, 3])
        data.images[0, 0] = 1
    assert (data.calls, data.rng.getstate(), data.parts[0].augment) == (0, state, False)
    assert data.x is x and data.cache == {} and data.recent == deque([1])
    assert data.weights.tolist() == [1, 1, 1] and data.errors["epoch"].tolist() == [0, 0, 0]
    assert data.images.amax() == 1


class LibraryTransform:
    """A transform of a library: it holds transforms, or draws from a generator of its own."""

    __module__ = "torch.nn"

    def __init__(self, *transforms):
        self.transforms, self.generators = transforms, [np.random.RandomState(1), random.Random(1)]

    def __call__(self, x):
        self.generators[0].rand(), self.generators[1].random()
        for transform in self.transforms:
            transform(x)


class UsersTransform:
    def __init__(self):
        self.rng, self.calls = random.Random(1), 0

    def __call__(self, x):
        self.calls += 1
        return x + self.rng.random()


@pytest.mark.parametrize("in_dictionary", [False, True])
def test_transforms_of_libraries_are_followed_to_their_generators_and_to_transforms_of_the_users(in_dictionary):
    inner, own = LibraryTransform(), UsersTransform()
    data = Data()
    data.transform = LibraryTransform(inner, own)
    if in_dictionary:
        data.transform = {"image": data.transform, "kind": LibraryTransform}
    transform = data.transform["image"] if in_dictionary else data.transform
    before = [pickle.dumps(part.generators) for part in (transform, inner)]
    state = own.rng.getstate()
    with untouched(nn.Linear(1, 1), data=[data]):
        transform(0)
        assert [pickle.dumps(part.generators) for part in (transform, inner)] != before
    assert [pickle.dumps(part.generators) for part in (transform, inner)] == before
    assert (own.rng.getstate(), own.calls) == (state, 0)


@pytest.mark.parametrize(
    "dataset",
    [
        [torch.zeros(2)],
        (torch.zeros(2),),
        {0: torch.zeros(2)},
        UserDict({0: torch.zeros(2)}),
        np.zeros((1, 2)),
        TensorDataset(torch.zeros(1, 2)),
        Subset([torch.zeros(2)], [0]),
        ConcatDataset([[torch.zeros(2)]]),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
@pytest.mark.parametrize("sampler", [RandomSampler, SequentialSampler])
def test_what_is_in_a_dataset_of_any_kind_is_not_copied(dataset, sampler):
    loader = DataLoader(dataset, sampler=sampler(dataset))
    containers, data = changes(loader)
    (sample,) = [*dataset.values()] if isinstance(dataset, dict | UserDict) else [*dataset]
    (tensor,) = sample if isinstance(sample, tuple) else (sample,)
    with untouched(nn.Linear(1, 1), *containers, data=data):
        tensor[:] = 1  # nobody does this; it shows that no copy was kept
        loader.sampler.more = 1
    assert tensor.sum() == 2 and not hasattr(loader.sampler, "more")


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
