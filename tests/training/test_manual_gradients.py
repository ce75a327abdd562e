"""Manually optimised steps that read gradients, which do not exist while measuring, or take none by a backward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Module, Scenario, run
from test_manual_optimization import Gan, fit, logged, lowest_cosine
from test_no_trace import assert_same

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.training import session
from lightning_gradconf.training.manual_optimization import ManualOptimization
from lightning_gradconf.training.measure import _agreed
from lightning_gradconf.training.training_step import StepObjective

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|log_every_n_steps|LeafSpec)")
NORM_OF_NONE = "AttributeError: 'NoneType' object has no attribute 'norm'"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the callback has said of the step that is no warning."""
    messages: list[str] = []
    monkeypatch.setattr(
        session, "inform", lambda trainer, message: messages.append(message) if "training_step" in message else None
    )
    return messages


class OneOptimizer(Gan):
    """One optimizer for both networks."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class LogsNorm(OneOptimizer):
    """Logs the norm of its gradients between the backward pass and the step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.generator_loss(batch))
        self.log("norm", sum(p.grad.norm() ** 2 for p in self.parameters()).sqrt())
        optimizer.step()


class Sharp(OneOptimizer):
    """Sharpness-aware minimisation by hand: a second loss, at weights that the gradients of the first lead to."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, parameters = self.optimizers(), list(self.parameters())
        self.generator_loss(batch).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            moves = [0.05 * p.grad / norm for p in parameters]
            for p, move in zip(parameters, moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        self.manual_backward(self.generator_loss(batch))
        with torch.no_grad():
            for p, move in zip(parameters, moves, strict=True):
                p.sub_(move)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize("kind", [LogsNorm, Sharp])
def test_the_loss_before_gradients_are_read_is_measured(kind: Any, engine: Any, said: list[str]) -> None:
    torch.manual_seed(0)
    confusion, rows, copies = fit(kind(), steps=3, engine=engine)
    values = logged(rows, "gradient_confusion/min_cosine")
    expected = [lowest_cosine(twin.generator_loss, list(twin.parameters()), batch) for twin, batch in copies.seen]
    assert len(values) == 3
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=1e-6, atol=1e-8)
    keys = {key.rpartition("/")[0] for _, row in rows.rows for key in row if key.startswith("gradient_confusion")}
    assert keys == {"gradient_confusion"}, "one loss, which has no number"
    error = NORM_OF_NONE if kind is LogsNorm else "RuntimeError: stack expects a non-empty TensorList"
    (message,) = said
    assert f"training_step raises after it: {error}. The losses" in message
    assert "what comes after that point of the step is not" in message and "loss_fn=" in message
    assert confusion.last_step == 2


class LogsNormOfEach(Gan):
    """Logs the norm of the gradients of the network whose number is ``reads``, before its step."""

    reads = 1

    def training_step(self, batch: Any, batch_idx: int) -> None:
        losses = (self.critic_loss, self.generator_loss)
        for i, (optimizer, loss) in enumerate(zip(self.optimizers(), losses, strict=True)):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            if i == self.reads:
                self.log("norm", optimizer.param_groups[0]["params"][0].grad.norm())
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("toggle", [False, True])
def test_all_losses_before_that_are_those_of_the_step_without(toggle: bool, said: list[str]) -> None:
    torch.manual_seed(0)
    reads = LogsNormOfEach()
    reads.toggle = toggle
    plain = Gan()
    plain.load_state_dict(reads.state_dict())
    _, rows, _ = fit(reads, steps=1)
    _, expected, _ = fit(plain, steps=1)
    for i in (0, 1):
        (value,) = logged(rows, f"gradient_confusion/{i}/min_cosine")
        assert [value] == pytest.approx(logged(expected, f"gradient_confusion/{i}/min_cosine"))
    assert len(said) == 1 and NORM_OF_NONE in said[0]


def test_a_toggled_loss_has_its_own_number_without_the_ones_after_it(said: list[str]) -> None:
    torch.manual_seed(0)
    module = LogsNormOfEach()
    module.toggle, module.reads = True, 0
    start = copy.deepcopy(module)
    _, rows, copies = fit(module, steps=1)
    expected = lowest_cosine(start.critic_loss, list(start.critic.parameters()), copies.seen[0][1])
    assert logged(rows, "gradient_confusion/0/min_cosine") == pytest.approx([expected])
    assert logged(rows, "gradient_confusion/1/min_cosine") == []
    assert len(said) == 1


class FailsOnASample(OneOptimizer):
    """Raises between its losses, on one of the samples by itself."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.critic_loss(batch))
        if len(batch[0]) == 1 and batch[0][0, 0] == self.bad:
            raise ArithmeticError("a bad sample")
        self.manual_backward(self.generator_loss(batch))
        optimizer.step()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.bad = float(batch[0][5, 0])


def test_a_later_loss_that_one_unit_does_not_reach_is_no_zero_gradient() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"a measurement failed .*ArithmeticError: a bad sample\."):
        confusion, rows, _ = fit(FailsOnASample(), steps=1)
    assert confusion.last_gram is None
    assert not any(key.startswith("gradient_confusion") for _, row in rows.rows for key in row)


class ReadsTooEarly(OneOptimizer):
    """Raises before its first loss, while it is measured."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if len(batch[0]) == 1:
            raise ArithmeticError("no single samples")
        self.manual_backward(self.generator_loss(batch))
        self.optimizers().step()


def test_an_error_before_the_first_loss_is_a_failed_measurement(said: list[str]) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="a measurement failed") as caught:
        confusion, _, _ = fit(ReadsTooEarly(), steps=2)
    assert [str(w.message) for w in caught if "GradientConfusionCallback" in str(w.message)] == [
        "GradientConfusionCallback: a measurement failed and training goes on as without it. ArithmeticError: no "
        "single samples. After 3 failures in a row it stops trying. With manual optimization it helps to pass the "
        "loss, such as loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])."
    ]
    assert confusion.last_gram is None and said == []


def test_with_a_loss_fn_a_failure_points_to_gradient_gram() -> None:
    def loss_fn(module: Any, batch: Any) -> Any:
        raise ArithmeticError("in the loss_fn")

    torch.manual_seed(0)
    message = (
        r"in the loss_fn\. After 3 failures in a row it stops trying; to see the whole error, run gradient_gram on"
    )
    with pytest.warns(UserWarning, match=message):
        fit(ReadsTooEarly(), steps=1, loss_fn=loss_fn)


class TakesGradients(OneOptimizer):
    """Sets gradients by hand, and takes no backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        parameters = list(self.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(self.generator_loss(batch), parameters), strict=True):
            p.grad = gradient
        self.optimizers().step()


def test_a_run_without_a_backward_pass_says_so_at_its_end() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="no measurement took place") as caught:
        confusion, _, _ = fit(TakesGradients(), steps=3)
    assert [str(w.message) for w in caught if "GradientConfusionCallback" in str(w.message)] == [
        "GradientConfusionCallback: no measurement took place: training_step called neither manual_backward nor "
        "backward(), so that there is no loss to measure. Pass the loss, such as "
        "loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])."
    ]
    assert confusion.last_gram is None


def test_a_step_without_a_backward_pass_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_MAX_WITHOUT_LOSS", 2)
    calls = []

    class Counted(TakesGradients):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            calls.append(batch_idx)
            super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="neither manual_backward nor backward"):
        fit(Counted(), steps=4)
    assert len(calls) == 4 + 2


def test_the_same_run_is_measured_with_its_loss() -> None:
    torch.manual_seed(0)
    _, rows, copies = fit(TakesGradients(), steps=1, loss_fn=lambda module, batch: module.generator_loss(batch))
    ((twin, batch),) = copies.seen
    expected = lowest_cosine(twin.generator_loss, list(twin.parameters()), batch)
    assert logged(rows, "gradient_confusion/min_cosine") == pytest.approx([expected])


class Clips(Module):
    """With noise and state: reads gradients after the first of two losses, and counts on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.begun, self.ended, self.norms = 0, 0, []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.begun += 1
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.manual_backward(loss)
        self.norms.append(float(sum(p.grad.norm() ** 2 for p in self.parameters())))
        self.log("norm", self.norms[-1])
        self.manual_backward(0.5 * self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        self.ended += 1


@pytest.mark.parametrize("options", [{}, {"engine": "loop", "unit_size": 2}, {"source": "fresh", "num_units": 3}])
def test_the_run_is_bitwise_the_run_without(options: Any, tmp_path: Path) -> None:
    confusion = GradientConfusionCallback(every_n_train_steps=1, verify=True, **options)
    plain = run(Scenario(Clips), tmp_path / "plain")
    assert_same(plain, run(Scenario(Clips), tmp_path / "measured", [confusion]))
    assert confusion.last_step == 11 and confusion.last_gram.isfinite().all()


class TwoRanks:
    """The ranks of this process and of another, whose answers are given."""

    def __init__(self, number: int, answer: Any) -> None:
        self.number, self.answer = number, answer

    def minimum(self, value: int) -> int:
        return min(value, self.number)

    def gather(self, values: list[Any]) -> list[Any]:
        return [self.answer, *values]


class Target:
    def __init__(self, *names: str) -> None:
        self.parameters = dict.fromkeys(names)


def test_ranks_measure_the_same_losses_and_all_know_why_there_are_no_more() -> None:
    manual: Any = object.__new__(ManualOptimization)
    manual.stopped = ""
    parts: Any = [StepObjective("0", None, Target("a", "b")), StepObjective("1", None, Target("c"))]  # type: ignore
    ranks: Any = TwoRanks(1, ("KeyError: 'x'", [""], [["a", "b"]]))
    agreed = _agreed(ranks, manual, parts)
    assert [(part.name, part.target) for part in agreed] == [("", parts[0].target)]
    assert manual.stopped == "KeyError: 'x'"
    ranks = TwoRanks(1, ("KeyError: 'x'", [""], [["a"]]))
    with pytest.raises(RuntimeError, match="for other parameters on another rank"):
        _agreed(ranks, manual, parts)
