"""User code that asks a logger for its paths, or writes to Python's log, is measured and leaves nothing."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from runs import QUIET, Module, Rows, loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.training.silence import silent, without_logging

NAMES = ["log_dir", "save_dir", "root_dir", "name", "version"]
LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}


def fit(module, **options):
    confusion = GradientConfusionCallback(every_n_train_steps=2, engine="loop")
    options = {"max_epochs": 1, "enable_checkpointing": False, "log_every_n_steps": 2} | options
    trainer = pl.Trainer(callbacks=[confusion], **(QUIET | options))
    trainer.fit(module, loader())
    assert confusion.last_step == 5
    return trainer


@pytest.mark.parametrize("kind", LOGGERS)
def test_paths_and_names_are_those_of_the_logger(kind, tmp_path):
    class Asks(Module):
        def training_step(self, batch, batch_idx):
            asked.append([getattr(self.logger, name) for name in NAMES] + [self.trainer.log_dir])
            os.path.join(self.trainer.log_dir, f"batch{batch_idx}.pt")
            assert isinstance(self.logger, LOGGERS[kind])
            return super().training_step(batch, batch_idx)

    asked = []
    logger = LOGGERS[kind](tmp_path)
    trainer = fit(Asks(), logger=logger)
    assert len(asked) > 6 and all(answer == asked[-1] for answer in asked)
    assert asked[-1] == [getattr(logger, name) for name in NAMES] + [trainer.log_dir]


@pytest.mark.parametrize("direct", ["log_metrics", "add_scalar"])
def test_what_a_step_writes_by_itself_is_written_as_often_as_without(direct, tmp_path):
    """The loggers of the Trainer are put back, but what is in a file is not."""

    class Writes(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if direct == "add_scalar":
                self.logger.experiment.add_scalar("direct", 1.0, self.global_step)
            else:
                self.logger.log_metrics({"direct": 1.0}, step=self.global_step)
            return loss

    logger = TensorBoardLogger(tmp_path)
    trainer = fit(Writes(), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("direct")] == list(range(trainer.global_step))


def test_everything_else_is_inert(tmp_path):
    stand_in = silent(TensorBoardLogger(tmp_path))
    stand_in.log_metrics({"a": 1}, step=3)
    stand_in.experiment.add_scalar("a", 1)
    stand_in.experiment.config["lr"] = stand_in.experiment.config["lr"]
    with stand_in.experiment.run() as run:
        assert list(run) == []
    stand_in.save()
    stand_in.finalize("success")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AttributeError):
        stand_in.no_attribute()


def test_a_client_is_not_started_by_asking(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlflow")
    silent(logger).experiment.log_param("a", 1)
    silent(logger).log_hyperparams({"a": 1})
    assert logger._run_id is None


def test_records_of_the_step_are_as_many_as_without(caplog):
    class Talks(Module):
        def training_step(self, batch, batch_idx):
            logging.getLogger("of.the.user").warning("step %d", batch_idx)
            return super().training_step(batch, batch_idx)

    fit(Talks(), logger=Rows())
    assert [record.getMessage() for record in caplog.records if record.name == "of.the.user"] == [
        f"step {i}" for i in range(6)
    ]


def test_other_threads_and_this_package_are_heard(caplog):
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "lightning_gradconf"), without_logging():
        logging.getLogger("mine").error("dropped")
        logging.getLogger("lightning_gradconf").info("kept")
        thread = threading.Thread(target=lambda: logging.getLogger("mine").error("of a thread"))
        thread.start()
        thread.join()
    logging.getLogger("mine").error("after")
    assert [record.getMessage() for record in caplog.records] == ["kept", "of a thread", "after"]
    assert Path(logging.Logger.callHandlers.__code__.co_filename).name == "__init__.py"
