"""Hundreds of measurements leave nothing behind in the process."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from runs import QUIET, Data, Module, loader

from lightning_gradconf import GradientConfusionCallback

MEASUREMENTS, SETTLED = 300, 50


def resident() -> int:
    """Resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Census(pl.Callback):
    """Counts what is alive, before the measurement of each batch."""

    def __init__(self) -> None:
        self.counts: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % SETTLED == 0:
            gc.collect()
            hooks = [len(v) for part in module.modules() for k, v in vars(part).items() if k.endswith("_hooks")]
            self.counts.append(
                {
                    "tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
                    "hooks": hooks,
                    "threads": threading.active_count(),
                    "handles": len(os.listdir("/proc/self/fd")),
                    "temporary files": sorted(os.listdir(tempfile.gettempdir())),
                    "resident": resident(),
                }
            )


class Wide(Module):
    """Gradients of 32 units take 4 MB, so that a leak of one measurement in ten would show."""

    def make_net(self) -> Any:
        return torch.nn.Sequential(torch.nn.Linear(6, 3000), torch.nn.Dropout(0.1), torch.nn.Linear(3000, 3))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory")
@pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    "options",
    [{"engine": "vmap"}, {"engine": "loop", "num_units": 8}, {"source": "fresh", "num_units": 8, "unit_size": 2}],
    ids=["vmap", "loop", "fresh"],
)
def test_nothing_accumulates(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    census = Census()
    confusion = GradientConfusionCallback(every_n_train_steps=1, per_layer=True, **options)
    trainer = pl.Trainer(
        max_steps=MEASUREMENTS + 1,
        max_epochs=-1,
        callbacks=[census, confusion],
        logger=TensorBoardLogger(tmp_path),
        log_every_n_steps=2 * MEASUREMENTS,  # what Lightning logs it also keeps
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(Wide(), loader(dataset=Data(augment=True), batch_size=12))
    assert confusion.last_step == MEASUREMENTS
    settled, *later = census.counts[1:]
    assert len(later) == MEASUREMENTS // SETTLED - 1
    for count in later:
        for name in settled.keys() - {"resident"}:
            assert count[name] == settled[name], name
    grown = max(count["resident"] for count in later) - settled["resident"]
    assert grown < 8 * 2**20, f"{grown / 2**20:.1f} MB more than after {SETTLED} measurements"
