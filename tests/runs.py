"""Short training runs and everything that can be told about one afterwards, for comparison bit by bit."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

PREFIX = "gradient_confusion"
SAMPLES, BATCH, FEATURES, CLASSES = 24, 4, 6, 3
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}


class Rows(Logger):
    """Keeps what is logged."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, ours: bool) -> list[tuple[int | None, dict[str, float]]]:
        rows = [(step, {k: v for k, v in row.items() if k.startswith(PREFIX) == ours}) for step, row in self.rows]
        return [(step, row) for step, row in rows if row.keys() - {"epoch"}]


class Watch(pl.Callback):
    """Notes what the training step is given: batches, weights, gradients, random state, flags."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        flags = [part.training for part in module.modules()]
        self.seen.append(frozen([batch, list(module.parameters()), flags, torch.get_rng_state()]))
        self.seen.append(frozen([p.grad for p in module.parameters()]))


class Meter:
    """A running mean, as people keep it in a file beside the module's."""

    def __init__(self) -> None:
        self.total, self.history = 0.0, []

    def update(self, value: float) -> None:
        self.total += value
        self.history.append(value)


class Data(Dataset):
    """Random numbers with an augmentation that draws from all three random states."""

    def __init__(self, augment: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(()) if self.augment else 0.0
        return self.x[i] + noise, self.y[i]


def loader(**kwargs: Any) -> DataLoader:
    return DataLoader(kwargs.pop("dataset", None) or Data(), **({"batch_size": BATCH, "shuffle": True} | kwargs))


class Module(pl.LightningModule):
    """A classifier; subclasses add one trap."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.make_net()

    def make_net(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
        )

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@dataclass
class Scenario:
    """What to train, and how."""

    module: Callable[[], Module] = Module
    data: Callable[[], Any] = loader
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Any]] = list
    confusion: dict[str, Any] = field(default_factory=dict)
    fit: Callable[..., None] = lambda trainer, module, data: trainer.fit(module, data)
    sources: tuple[str, ...] = ("current", "fresh", "fixed")
    loggers: Callable[[], list[Any]] = list
    plugins: Callable[[], list[Any]] = list
    raises: type[BaseException] | None = None


def run(scenario: Scenario, tmp: Path, confusion: Iterable[Any] = ()) -> dict[str, Any]:
    """Train once and return the fingerprint of the run."""
    tmp.mkdir(parents=True)
    before, handler = os.getcwd(), signal.getsignal(signal.SIGINT)
    os.chdir(tmp)
    forget_compiled()
    try:
        pl.seed_everything(7, verbose=False)
        module, watch, rows = scenario.module(), Watch(), Rows()
        data = scenario.data()
        options = {
            "max_epochs": 2,
            "log_every_n_steps": 2,
            "logger": [rows, *scenario.loggers()],
            "enable_checkpointing": False,
            "callbacks": [*scenario.callbacks(), *confusion, watch],
            "plugins": scenario.plugins() or None,
        }
        trainer = pl.Trainer(**(QUIET | options | scenario.trainer))
        with warnings.catch_warnings():
            # Lightning's own advice on these toy runs; ours is collected by the tests that expect it.
            warnings.filterwarnings("ignore", category=pl.utilities.warnings.PossibleUserWarning)
            toys = "num_workers|bottleneck|lr scheduler|returned `None|No (positive|negative) samples"
            toys += "|signature is experimental|without a model|no last checkpoint"
            toys += "|Please add the following callbacks"  # as Lightning asks for each that has a state
            warnings.filterwarnings("ignore", f".*({toys})")
            try:
                scenario.fit(trainer, module, data)
            except BaseException as error:
                if scenario.raises is None or not isinstance(error, scenario.raises):
                    raise
        return fingerprint(trainer, module, data, watch, rows, tmp)
    finally:
        os.chdir(before)
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it after an interrupt


def forget_compiled() -> None:
    """Let every run compile for itself."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def fingerprint(trainer: Any, module: Any, data: Any, watch: Watch, rows: Rows, tmp: Path) -> dict[str, Any]:
    """Everything that a run leaves, as plain values that compare exactly."""
    result = {
        "python rng": random.getstate(),
        "numpy rng": frozen(np.random.get_state()),
        "torch rng": frozen(torch.get_rng_state()),
        "weights and buffers": frozen(module.state_dict()),
        "gradients": frozen([p.grad for p in module.parameters()]),
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "optimizers": frozen([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "schedulers": frozen([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
        "attributes": frozen({name: attributes(part) for name, part in module.named_modules()}),
        "data": frozen({**attributes(getattr(data, "dataset", data)), "collate": getattr(data, "collate_fn", None)}),
        "steps seen": watch.seen,
        "logged": frozen(rows.of(ours=False)),
        "callback_metrics": frozen({k: v for k, v in trainer.callback_metrics.items() if not k.startswith(PREFIX)}),
        "progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
    }
    compiled = "torch._dynamo" in sys.modules  # a measurement imports it
    result["compiled graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled else 0
    if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
        result["scaler"] = frozen(scaler.state_dict())
    if not trainer.barebones:
        trainer.save_checkpoint(tmp / "last.ckpt")
    for path in sorted(tmp.rglob("*.ckpt")):
        content = torch.load(path, weights_only=False)
        ours = [key for key in content["callbacks"] if key.startswith("GradientConfusionCallback")]
        for key in ours:  # the one entry that a run without the callback does not have
            del content["callbacks"][key]
        result[f"checkpoint {path.relative_to(tmp)}"] = frozen(content, hide=str(tmp))
    return result


def attributes(part: Any) -> dict[str, Any]:
    hidden = {"_parameters", "_buffers", "_modules", "_trainer", "_fabric", "log", "log_dict"}
    values = {name: value for name, value in getattr(part, "__dict__", {}).items() if name not in hidden}
    # Hooks are numbered through the process, and compiled modules keep addresses.
    values = {name: len(value) if name.endswith("_hooks") else value for name, value in values.items()}
    return {name: value for name, value in values.items() if not (isinstance(value, int) and value > 2**40)}


def frozen(value: Any, hide: str = "") -> Any:
    """Plain values that are equal if and only if all bits are."""
    if isinstance(value, Tensor):
        dense = value.detach().contiguous().view(-1)
        return (
            "tensor",
            str(value.dtype),
            tuple(value.shape),
            value.requires_grad,
            dense.view(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b"",
        )
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, str):
        return value.replace(hide, "TMP") if hide else value
    if isinstance(value, Mapping):
        return [(frozen(key, hide), frozen(entry, hide)) for key, entry in value.items()]
    if isinstance(value, set):
        return "set", sorted(map(repr, value))
    if isinstance(value, Iterable) and not isinstance(value, bytes | nn.Module | Dataset | DataLoader):
        return type(value).__name__, [frozen(entry, hide) for entry in value]
    if isinstance(value, torch.Generator):
        return "generator", frozen(value.get_state())
    if isinstance(value, np.random.Generator):
        return "generator", repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return "generator", value.getstate()
    if isinstance(value, nn.Module):
        return frozen({**value.state_dict(), **attributes(value)}, hide)
    if isinstance(value, SimpleNamespace) or type(value).__module__ in ("runs", "test_no_trace"):
        return frozen(attributes(value), hide)
    if value is None or isinstance(value, bool | int | bytes):
        return value
    return type(value).__name__  # functions, configurations: their identity is not part of the run
