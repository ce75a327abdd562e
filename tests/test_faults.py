"""Whatever goes wrong inside a measurement, the run is bitwise the run without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import OnExceptionCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from runs import PREFIX, Data, Module, Rows, Scenario, loader, run
from test_no_trace import assert_same
from torch.utils.tensorboard import SummaryWriter

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.batches import layout, sources
from lightning_gradconf.gram.ranks import data_parallel
from lightning_gradconf.reports import report


class Fault:
    """Raises at one stage, from the step on that it is armed at."""

    stage: str | None = None
    error: type[BaseException] = RuntimeError
    armed = False

    @classmethod
    def at(cls, stage: str) -> None:
        if cls.armed and cls.stage == stage:
            raise cls.error("injected")


class Arm(pl.Callback):
    """Arms the fault at a step; ``plainly`` is the same error there in a run without measurements."""

    def __init__(self, step: int, plainly: bool) -> None:
        self.step, self.plainly = step, plainly

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        Fault.armed = trainer.fit_loop.epoch_loop._batches_that_stepped >= self.step
        if Fault.armed and self.plainly and not trainer.fit_loop._should_accumulate():
            raise Fault.error("injected")


class Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        Fault.at("backward")
        return gradient


class Faulty(Module):
    """Fails at the stages of a measurement that are the user's own code, and there only."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def at(self, stage: str) -> None:
        if "log" in vars(self):  # mute, while it is measured
            Fault.at(stage)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.count += 1
        self.at("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        loss = super().training_step(batch, batch_idx)
        self.at("forward")
        return Backward.apply(loss) if "log" in vars(self) else loss


class FaultyRows(Rows):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith(PREFIX) for name in metrics):
            Fault.at("logger")


# The functions of ours that a stage begins with; at the other stages the user's code fails.
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "sampling": (layout.Layout, "units"),
    "drawing": (sources, "draw"),
    "unit split": (layout, "shares"),
    "isolation": (torch.compiler, "set_stance"),  # in the middle of putting it up
    "contraction": (data_parallel, "blockwise"),
    "statistics": (report, "gradient_statistics"),
    "histogram": (SummaryWriter, "add_histogram"),
}
STAGES = [
    *((stage, "auto") for stage in (*FUNCTIONS, "on_train_batch_start", "logger") if stage != "contraction"),
    ("contraction", "loop"),  # what the other engines contract is left to it
    *((stage, engine) for stage in ("forward", "backward") for engine in ("auto", "vmap", "loop")),
]


@contextmanager
def fault(stage: str | None, error: type[BaseException] = RuntimeError) -> Iterator[None]:
    Fault.stage, Fault.error, Fault.armed = stage, error, False
    with pytest.MonkeyPatch.context() as patch:
        if stage in FUNCTIONS:
            owner, name = FUNCTIONS[stage]
            patch.setattr(owner, name, failing(stage, getattr(owner, name)))
        try:
            yield
        finally:
            Fault.armed = False


def failing(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        Fault.at(stage)
        return function(*args, **kwargs)

    return call


def scenario(step: int, plainly: bool = False) -> Scenario:
    return Scenario(
        Faulty,
        data=lambda: loader(dataset=Data(augment=True)),
        callbacks=lambda: [Arm(step, plainly), OnExceptionCheckpoint(".", "interrupted")],
        loggers=lambda: [FaultyRows(), TensorBoardLogger(".", "board")],
        trainer={"enable_checkpointing": True, "accumulate_grad_batches": 2},
    )


def confusion(stage: str, engine: str) -> GradientConfusionCallback:
    source = "fresh" if stage == "drawing" else "current"
    options: dict[str, Any] = {"unit_size": 2, "num_units": 2, "prog_bar": True}
    return GradientConfusionCallback(every_n_train_steps=2, source=source, engine=engine, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> dict[str, Any]:
    with fault(None):
        return run(scenario(0), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("stage", "engine"), STAGES)
def test_an_error_is_said_once_and_changes_nothing(
    stage: str, step: int, engine: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    measuring = confusion(stage, engine)
    with fault(stage), pytest.warns(UserWarning, match=r"training goes on.*RuntimeError: injected\. ") as caught:
        measured = run(scenario(step), tmp_path / "run", [measuring])
    assert len([w for w in caught if "GradientConfusionCallback" in str(w.message)]) == 1
    assert_same(plain, measured)
    assert plain["progress"] == (6, 2, False)
    assert (measuring.last_gram is None) == (step == 0 and stage not in ("logger", "histogram"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: Any) -> dict[str, Any]:
    with fault(None, KeyboardInterrupt):
        return run(replace(scenario(3, True), raises=SystemExit), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(("stage", "engine"), STAGES)
def test_an_interrupt_passes_through_and_leaves_the_run_as_it_was(
    stage: str, engine: str, interrupted: dict[str, Any], tmp_path: Path
) -> None:
    measuring = confusion(stage, engine)
    with fault(stage, KeyboardInterrupt):
        measured = run(replace(scenario(3), raises=SystemExit), tmp_path / "run", [measuring])
    assert interrupted["progress"] == (3, 1, False)
    assert "checkpoint interrupted.ckpt" in interrupted
    assert_same(interrupted, measured)
    assert measuring.last_step is not None
