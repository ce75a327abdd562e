"""Metrics see nothing while units are measured, and answer as one real call did."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from runs import frozen
from torch import nn
from torch.func import vmap
from torchmetrics import (
    AUROC,
    Accuracy,
    ConfusionMatrix,
    MaxMetric,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    MetricTracker,
    MinMaxMetric,
    R2Score,
)
from torchmetrics.wrappers import Running

from lightning_gradconf import gradient_gram
from lightning_gradconf.gram import metric_answers
from lightning_gradconf.gram.metric_answers import answered
from lightning_gradconf.gram.objective import objective

CLASSES = 3
TASK = {"task": "multiclass", "num_classes": CLASSES}


class Net(nn.Module):
    """A classifier with metrics of several kinds, all with checks of their arguments."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, CLASSES, dtype=torch.float64)
        self.metrics = self.made()

    def made(self):
        return Accuracy(**TASK)

    def logits(self, batch):
        return self.net(batch[0])

    def loss(self, batch):
        logits = self.logits(batch)
        self.log(logits, batch[1])
        return F.cross_entropy(logits, batch[1])

    def log(self, logits, y):
        self.answer = self.metrics(logits, y)


class WithAUROC(Net):
    def made(self):
        return AUROC(**TASK)


class InAList(Net):
    def made(self):
        return [Accuracy(**TASK)]

    def log(self, logits, y):
        self.answer = self.metrics[0](logits, y)


class Collection(Net):
    def made(self):
        parts = {"a": Accuracy(**TASK), "b": Accuracy(**TASK, average="macro"), "c": ConfusionMatrix(**TASK)}
        return MetricCollection(parts, prefix="train/", compute_groups=[["a", "b"], ["c"]])


class CollectionByHand(Collection):
    def log(self, logits, y):
        self.metrics.update(logits, y)
        self.answer = self.metrics.compute()
        self.metrics.reset()


class Mean(Net):
    def made(self):
        return nn.ModuleDict({"mean": MeanMetric(), "most": MaxMetric()})

    def log(self, logits, y):
        loss = F.cross_entropy(logits, y)
        self.answer = self.metrics["mean"](loss), self.metrics["most"](loss.detach())
        self.metrics["mean"].update(loss, weight=len(y))
        self.answer += (self.metrics["mean"].compute(),)


class Wrapped(Net):
    def made(self):
        minmax, running = MinMaxMetric(Accuracy(**TASK)), Running(MeanMetric(), window=3)
        return nn.ModuleDict({"minmax": minmax, "running": running, "tracker": MetricTracker(Accuracy(**TASK))})

    def log(self, logits, y):
        self.metrics["tracker"].increment()
        self.answer = self.metrics["minmax"](logits, y), self.metrics["running"](logits.sum())
        self.metrics["tracker"].update(logits, y)
        self.answer += (self.metrics["tracker"].compute(),)


class Composed(Net):
    def made(self):
        a, b = Accuracy(**TASK), Accuracy(**TASK, average="macro")
        return a + b


class MadeInTheLoss(Net):
    def made(self):
        return None

    def log(self, logits, y):
        first, second = Accuracy(**TASK), Accuracy(**TASK, top_k=2)
        second.update(logits, y)
        self.answer = first(logits, y), second.compute()


class SeveralCalls(Net):
    def log(self, logits, y):
        self.answer = [self.metrics(logits, y), self.metrics(-logits, y), self.metrics.compute()]


class TwoSamples(Net):
    """R2 takes two samples at least."""

    def made(self):
        return R2Score()

    def log(self, logits, y):
        self.answer = self.metrics(logits[:, 0], y.double())


METRICS = [
    *(Net, WithAUROC, InAList, Collection, CollectionByHand, Mean, Wrapped, Composed, MadeInTheLoss),
    *(SeveralCalls, TwoSamples),
]


def loss_fn(module, batch):
    return module.loss(batch)


def batch_of(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return [x, torch.randint(CLASSES, (n,), generator=generator)]


def units(batch):
    return [[t[i : i + 1] for t in batch] for i in range(len(batch[0]))]


def oracle(module, batch):
    """The Gram by plain autograd, each unit on a fresh copy."""
    rows = []
    for unit in units(batch):
        twin = copy.deepcopy(module)
        if isinstance(twin, TwoSamples):
            twin.log = lambda *args: None
        gradients = torch.autograd.grad(twin.loss(unit), list(twin.net.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows) @ torch.stack(rows).T


def state(module):
    """Everything that metrics hold."""

    def of(part):
        return {name: value for name, value in vars(part).items() if not callable(value) and name[:1] != "_"}

    parts = [m for m in module.modules() if isinstance(m, Metric)]
    parts += module.metrics if isinstance(module.metrics, list) else []
    return [(frozen(of(m)), m._update_count, frozen(m.metric_state)) for m in parts]


@pytest.mark.filterwarnings("ignore:The ``compute`` method", "ignore:.*No (positive|negative) samples")
@pytest.mark.parametrize("engine", ["ghost", "loop", "vmap"])
@pytest.mark.parametrize("kind", METRICS)
def test_gradients_are_those_of_plain_autograd_and_metrics_are_as_before(kind, engine):
    torch.manual_seed(0)
    if (kind, engine) == (MadeInTheLoss, "vmap"):
        pytest.skip("torch.func.grad cannot copy the default states of a metric")
    module, batch = kind(), batch_of()
    with torch.no_grad():
        module.loss(batch)
    expected = oracle(module, batch)
    before = state(module)
    for _ in range(3):
        grams = gradient_gram(module, loss_fn, batch, engine=engine)
        torch.testing.assert_close(sum(grams.values()), expected, rtol=1e-10, atol=1e-12)
    assert state(module) == before
    assert nothing_is_patched()


def nothing_is_patched():
    return not any("__getattribute__" in vars(cls) for cls in (Metric, MetricCollection))


@pytest.mark.filterwarnings("ignore:The ``compute`` method", "ignore:.*No (positive|negative) samples")
@pytest.mark.parametrize("kind", [kind for kind in METRICS if kind is not TwoSamples])
def test_answers_are_those_of_one_real_call_and_of_the_same_structure(kind):
    torch.manual_seed(0)
    module, batch = kind(), batch_of()
    twin = copy.deepcopy(module)
    twin.loss(units(batch)[0])
    if kind is MadeInTheLoss:  # the first time, nothing tells of these metrics
        with answered(objective(module, loss_fn), units(batch)[0]) as measured:
            measured.loss_fn(module, units(batch)[0])
    with answered(objective(module, loss_fn), units(batch)[0]) as measured:
        before = state(module)
        measured.loss_fn(module, units(batch)[1])
        assert frozen(module.answer) == frozen(torch.utils._pytree.tree_map(detached, twin.answer))
        measured.loss_fn(module, batch)  # a second pass starts from the first answer
        assert frozen(module.answer) == frozen(torch.utils._pytree.tree_map(detached, twin.answer))
        vmap(lambda x, y: measured.loss_fn(module, [x, y]), randomness="different")(*(t.unsqueeze(1) for t in batch))
    assert frozen(module.answer) == frozen(torch.utils._pytree.tree_map(detached, twin.answer))
    if kind is not Wrapped:  # MetricTracker.increment is a change of the module, and not of a metric
        assert state(module) == before


def detached(leaf):
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


class Calls(Net):
    """Counts what is computed for real."""

    def made(self):
        class Counted(Metric):
            updates, computes = [], []

            def update(self, preds, target):
                self.updates.append(len(preds))

            def compute(self):
                self.computes.append(1)
                return torch.tensor(0.5)

        return Counted()


def test_a_metric_is_called_for_one_unit_of_all():
    module, batch = Calls(), batch_of(32)
    for call in range(1, 6):
        module.metrics.updates.clear()
        gradient_gram(module, loss_fn, batch, engine="loop")
        # Twice a forward call of a metric that says nothing of its state: in calls whose number is a power of two.
        assert module.metrics.updates == ([1, 1] if call in (1, 2, 4) else [])


class Depends(Net):
    """Each loss is computed with what a metric returns."""

    how = "weight"

    def loss(self, batch):
        logits = self.logits(batch)
        if self.how == "itself":
            return self.square(logits[:, 0], batch[1].double())
        loss, accuracy = F.cross_entropy(logits, batch[1]), self.metrics(logits, batch[1])
        if self.how == "weight":
            return loss * (1 + accuracy)
        if self.how == "threshold":  # far from what a unit has
            return loss if float(accuracy) > -1e4 else 3 * loss
        if self.how == "clamp":
            return loss * accuracy.clamp(min=100)
        return loss if float(accuracy) < 0.5 else 3 * loss

    def made(self):
        self.square = MeanSquaredError()
        return Accuracy(**TASK)


@pytest.mark.parametrize("how", ["weight", "branch", "itself", "threshold", "clamp"])
def test_a_loss_that_depends_on_a_metric_gets_the_real_ones(how):
    torch.manual_seed(0)
    module, batch = Depends(), batch_of()
    module.how = how
    module.square.set_dtype(torch.float64)
    expected = oracle(module, batch)
    before = state(module)
    for _ in range(3):
        grams = gradient_gram(module, loss_fn, batch)
        torch.testing.assert_close(sum(grams.values()), expected, rtol=1e-6, atol=1e-8)
    assert state(module) == before


def test_a_metric_that_was_not_called_when_answers_were_recorded_is_called():
    class Later(Net):
        def log(self, logits, y):
            if len(y) > 1:
                self.answer = self.metrics(logits, y)

    module, batch = Later(), batch_of()
    module.other = MeanMetric()
    target = objective(module, lambda module, batch: module.other(1.0) * 0 + module.loss(batch))
    with answered(target, units(batch)[0]) as measured:
        measured.loss_fn(module, batch)
    assert module.metrics._update_count == 1
    assert module.other._update_count == 0


def test_a_module_without_metrics_is_measured_as_it_is():
    module = nn.Linear(2, 1)
    target = objective(module, lambda module, x: module(x).sum())
    with answered(target, torch.randn(1, 2)) as measured:
        assert measured is target


def test_an_error_of_the_loss_is_left_to_the_engines():
    module = nn.Linear(2, 1)
    target = objective(module, lambda module, x: module(x).nothing)
    with answered(target, torch.randn(1, 2)) as measured:
        assert measured is target
    assert nothing_is_patched()


def test_other_threads_use_their_metrics():
    module, batch = Net(), batch_of()
    elsewhere = Accuracy(**TASK)
    seen = []

    def loss(module, batch):
        thread = threading.Thread(target=lambda: seen.append(float(elsewhere(batch[1], batch[1]))))
        thread.start()
        thread.join()
        elsewhere(batch[1], batch[1])
        return module.loss(batch)

    with answered(objective(module, loss), units(batch)[0]) as measured:
        seen.clear()
        elsewhere.reset()
        measured.loss_fn(module, batch)
    assert seen == [1.0] and elsewhere._update_count == 1
    assert nothing_is_patched()


def test_metrics_do_not_talk_to_other_ranks():
    def never(*args, **kwargs):
        raise AssertionError("a metric synchronises")

    module, batch = Net(), batch_of()
    module.metrics = Accuracy(**TASK, dist_sync_on_step=True, dist_sync_fn=never, distributed_available_fn=lambda: True)
    for how in ("answered", "depends"):
        scale = {"answered": 0.0, "depends": 1.0}[how]
        target = objective(module, lambda module, batch, scale=scale: module.loss(batch) + scale * module.answer)
        with answered(target, units(batch)[0]) as measured:
            measured.loss_fn(module, batch)
    module.metrics.reset()
    with pytest.raises(AssertionError, match="synchronises"):
        module.loss(batch)


def test_a_metric_made_while_measuring_works_afterwards():
    class Lazy(Net):
        def made(self):
            return None

        def log(self, logits, y):
            if self.metrics is None:
                self.metrics = Accuracy(**TASK)
            self.answer = self.metrics(logits, y)

    module, batch = Lazy(), batch_of()
    with answered(objective(module, loss_fn), units(batch)[0]) as measured:
        assert module.metrics is None
        measured.loss_fn(module, batch)
    module.metrics.reset()
    value = module.metrics(batch[1], batch[1])
    assert float(value) == 1.0 and module.metrics._update_count == 1
    collection = MetricCollection([module.metrics])
    assert float(collection(batch[1], batch[1])["MulticlassAccuracy"]) == 1.0


def test_what_is_known_goes_with_the_module():
    module = Net()
    with answered(objective(module, loss_fn), units(batch_of())[0]):
        pass
    assert module in metric_answers._known
    del module
    gc.collect()
    assert not any(isinstance(known, Net) for known in metric_answers._known)
