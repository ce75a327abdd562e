"""What reaches which logger, and which units are said to conflict."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from runs import PREFIX, QUIET, Rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_gradconf import GradientConfusionCallback
from lightning_gradconf.reports.custom_scalars import charts
from lightning_gradconf.reports.report import Measurement, Report

pytestmark = pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning")
ANGLES = [82, 112, 218, 228, 259, 278, 322, 347]  # degrees; no two differences are alike
CLASSES = [0, 0, 0, 0, 1, 1, 1, 1]


def directions() -> torch.Tensor:
    """Images of 1 x 1 x 2 pixels: unit vectors at the known angles, a length of each."""
    radians = torch.tensor(ANGLES) * math.pi / 180
    lengths = torch.arange(1.0, 9)[:, None]
    return (lengths * torch.stack([radians.cos(), radians.sin()], 1)).view(-1, 1, 1, 2)


class Dots(pl.LightningModule):
    """The gradient of a sample is the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Linear(1, 1)  # without influence, so that there is a submodule

    def training_step(self, batch, batch_idx):
        loss = (batch["image"].flatten(1) @ self.weight).mean() + 0 * self.bias.weight.sum()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", torch.tensor(0.5))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Samples(TensorDataset):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


def fit(*callbacks: Any, logger: Any = False, **options: Any) -> pl.Trainer:
    data = Samples(directions(), torch.tensor(CLASSES))
    options = {"max_steps": 5, "log_every_n_steps": 2, "enable_checkpointing": False} | options
    trainer = pl.Trainer(logger=logger, callbacks=list(callbacks), **(QUIET | options))
    trainer.fit(Dots(), DataLoader(data, batch_size=8), DataLoader(data, batch_size=8))
    return trainer


def by_cosine() -> list[tuple[float, tuple[int, int]]]:
    pairs = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    return sorted((math.cos(math.radians(ANGLES[i] - ANGLES[j])), (i, j)) for i, j in pairs)


# ---- who conflicts ---------------------------------------------------------------------------------------------------


def test_top_pairs_are_those_of_the_lowest_cosines():
    confusion = GradientConfusionCallback(top_pairs=3, labels="label", every_n_train_steps=1)
    fit(confusion)
    assert confusion.last_step == 4
    for pair, (cosine, units) in zip(confusion.last_top_pairs, by_cosine()[:3], strict=True):
        assert pair.cosine == pytest.approx(cosine, abs=1e-6)
        assert pair.units == units
        assert [origin.samples for origin in pair.origins] == [(i,) for i in units]
        assert [str(origin) for origin in pair.origins] == [f"batch 0, sample {i}" for i in units]
        assert pair.labels == (CLASSES[units[0]], CLASSES[units[1]])
    within = [cosine for cosine, (i, j) in by_cosine() if CLASSES[i] == CLASSES[j]]
    between = [cosine for cosine, (i, j) in by_cosine() if CLASSES[i] != CLASSES[j]]
    assert confusion.last_statistics["within_class_cosine"] == pytest.approx(sum(within) / len(within), abs=1e-6)
    assert confusion.last_statistics["between_class_cosine"] == pytest.approx(sum(between) / len(between), abs=1e-6)


@pytest.mark.parametrize("source", ["fresh", "fixed"])
def test_drawn_units_are_told_by_their_index_in_the_dataset(source):
    confusion = GradientConfusionCallback(
        top_pairs=100, source=source, num_units=6, labels=lambda batch: batch["label"]
    )
    fit(confusion)
    assert len(confusion.last_top_pairs) == 15, "all there are"
    for pair in confusion.last_top_pairs:
        (first,), (second,) = (origin.samples for origin in pair.origins)
        assert pair.cosine == pytest.approx(math.cos(math.radians(ANGLES[first] - ANGLES[second])), abs=1e-6)
        assert pair.labels == (CLASSES[first], CLASSES[second])
        assert str(pair.origins[0]) == f"dataset[{first}]"


def test_units_of_several_samples_and_batches():
    confusion = GradientConfusionCallback(top_pairs=1, unit_size=2, every_n_epochs=1)
    fit(confusion, max_steps=-1, max_epochs=2)
    (pair,) = confusion.last_top_pairs
    for unit, origin in zip(pair.units, pair.origins, strict=True):
        assert origin.samples == (2 * unit, 2 * unit + 1)
        assert origin.batch == 0
    assert str(pair.origins[0]).startswith("batch 0, sample ")


def test_zero_gradients_are_in_no_pair():
    class Zeros(Dots):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch | {"image": batch["image"] * (batch["image"].abs().sum() > 5)}, 0)

    data = Samples(directions(), torch.tensor(CLASSES))
    confusion = GradientConfusionCallback(top_pairs=100, engine="loop")
    trainer = pl.Trainer(max_steps=1, logger=False, callbacks=[confusion], enable_checkpointing=False, **QUIET)
    trainer.fit(Zeros(), DataLoader(data, batch_size=8))
    shown = {unit for pair in confusion.last_top_pairs for unit in pair.units}
    assert 0 < len(shown) < 8
    assert shown == set((confusion.last_gram.diagonal() > 0).nonzero().flatten().tolist())


def test_units_without_classes_have_no_statistics_of_classes():
    report = Report(("eta", "within_class_cosine"), False, False, False, 0, PREFIX)
    assert report.read(Measurement({"weight": torch.eye(2)}, 1, 0)).statistics == {"eta": 0.0}


@pytest.mark.parametrize(
    ("gram", "unit_size", "what"),
    [
        (torch.eye(2), 1, ""),
        (torch.diag(torch.tensor([0.0, 1.0])), 1, ""),
        (torch.zeros(2, 2), 1, "every single sample is zero.*pass a larger unit_size"),
        (torch.zeros(2, 2), 8, ""),
        (torch.tensor([[1.0, 0.0], [0.0, math.nan]]), 1, "not finite"),
        (torch.full((2, 2), math.inf), 8, "not finite"),
    ],
)
def test_a_measurement_knows_when_it_says_nothing(gram, unit_size, what):
    fault = Measurement({"weight": gram}, unit_size, 0).fault
    assert re.search(what, fault) if what else fault == ""


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ("image", r"one whole number .* found torch.float32 \(1, 1, 1, 2\)"),
        ("class", "labels='class' is not in the batch, which has the keys 'image', 'label'"),
        (1, "labels=1 is not in"),
    ],
)
def test_labels_that_are_none_are_said_once(labels, what):
    with pytest.warns(UserWarning, match=what) as warned:
        fit(GradientConfusionCallback(labels=labels))
    assert len([w for w in warned if "GradientConfusionCallback" in str(w.message)]) == 1


def test_arguments():
    with pytest.raises(ValueError, match="labels= gives each unit one class, so it needs unit_size=1, found 'batch'"):
        GradientConfusionCallback(labels=1, unit_size="batch")
    with pytest.raises(ValueError, match="top_pairs=-1"):
        GradientConfusionCallback(top_pairs=-1)
    assert GradientConfusionCallback(labels=1, statistics=["eta"]).statistics == ("eta",)
    assert "between_class_cosine" in GradientConfusionCallback(labels=1, statistics="all").statistics


# ---- where it goes ---------------------------------------------------------------------------------------------------


class Unknown(Rows):
    """A logger of the user's, with nothing but numbers."""


@pytest.fixture
def everywhere(tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import wandb

    loggers: dict[str, Logger] = {
        "tensorboard": TensorBoardLogger(tmp_path, name="tensorboard"),
        "csv": CSVLogger(tmp_path, name="csv"),
        "wandb": WandbLogger(save_dir=tmp_path, offline=True),
        "mlflow": MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlflow"),
        "unknown": Unknown(),
    }
    confusion = GradientConfusionCallback(figures=True, top_pairs=2, labels="label", per_layer=True)
    fit(confusion, logger=list(loggers.values()))
    yield loggers | {"last": confusion.last_statistics}
    wandb.finish()


def rows_of(logger: Logger) -> list[dict[str, Any]]:
    """The rows of a logger with what is ours."""
    if isinstance(logger, Rows):
        return [row for _, row in logger.rows if f"{PREFIX}/eta" in row]
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        return [row for row in csv.DictReader(file) if row[f"{PREFIX}/eta"]]


FIGURES = {"heatmap", "density", "classes", "layers"}
STEPS = [0, 1, 3]


def test_each_logger_gets_what_it_can_show(everywhere):
    keys = {f"{PREFIX}/{name}" for name in everywhere["last"]}
    layers = {f"{PREFIX}/min_cosine/weight", f"{PREFIX}/min_cosine/bias"}

    events = EventAccumulator(everywhere["tensorboard"].log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert keys | layers <= set(tags["scalars"])
    assert [event.step for event in events.Scalars(f"{PREFIX}/eta")] == STEPS
    assert {f"{PREFIX}/{name}" for name in FIGURES} <= set(tags["images"])
    assert [event.step for event in events.Images(f"{PREFIX}/layers")] == [3]
    assert tags["histograms"] == [f"{PREFIX}/cosines"]
    texts = events.Tensors(f"{PREFIX}/top_pairs/text_summary")
    assert [event.step for event in texts] == STEPS
    text = texts[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("| cosine | first | second | labels |\n| --- |")
    assert text.count("\n") == 3, "two pairs"

    folder = Path(everywhere["csv"].log_dir)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[f"{PREFIX}/eta"]]
    assert [int(row["step"]) for row in rows] == STEPS
    assert keys | layers <= set(rows[0])
    assert {path.parent.name for path in (folder / PREFIX).glob("*/*.png")} == FIGURES
    with open(folder / PREFIX / "top_pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), row["first"][:16]) for row in rows[::2]] == [(s, "batch 0, sample ") for s in STEPS]

    mlflow = everywhere["mlflow"]
    for name, value in everywhere["last"].items():
        history = mlflow.experiment.get_metric_history(mlflow.run_id, f"{PREFIX}/{name}")
        assert [metric.step for metric in history] == STEPS
        assert history[-1].value == pytest.approx(value)
    assert mlflow.experiment.get_metric_history(mlflow.run_id, f"{PREFIX}/min_cosine.weight")
    listed = {artifact.path for artifact in mlflow.experiment.list_artifacts(mlflow.run_id, PREFIX)}
    assert listed == {f"{PREFIX}/{name}" for name in (*FIGURES, "settings", "top_pairs")}

    summary = everywhere["wandb"].experiment.summary
    for name, value in everywhere["last"].items():
        assert summary[f"{PREFIX}/{name}"] == pytest.approx(value)
    assert summary[f"{PREFIX}/cosines"]["_type"] == "histogram"
    pictures = Path(everywhere["wandb"].experiment.dir, "media")
    assert {path.name.split("_")[0] for path in (pictures / "images" / PREFIX).iterdir()} == FIGURES
    (table, *_) = (pictures / "table" / PREFIX).glob("top_pairs*.json")
    assert json.loads(table.read_text())["columns"] == ["cosine", "first", "second", "labels"]

    for logger in ("csv", "unknown"):  # as in Lightning's own rows
        assert [int(row["epoch"]) for row in rows_of(everywhere[logger])] == [0, 1, 3]
    epochs = mlflow.experiment.get_metric_history(mlflow.run_id, "epoch")
    assert {(metric.step, metric.value) for metric in epochs} >= {(step, float(step)) for step in STEPS}

    rows = everywhere["unknown"].of(ours=True)
    assert [step for step, _ in rows] == STEPS
    assert keys | layers == set(rows[0][1])


def test_images_of_a_pair_are_shown_side_by_side(tmp_path):
    class Larger(Dots):
        def training_step(self, batch, batch_idx):
            return super().training_step({"image": batch["image"][:, :1, :1, :2]}, batch_idx)

    images = directions().repeat(1, 3, 4, 2)
    data = Samples(images, torch.tensor(CLASSES))
    logger = CSVLogger(tmp_path)
    for size, shown in ((1, True), (2, False)):
        confusion = GradientConfusionCallback(top_pairs=2, unit_size=size, prefix=f"units_of_{size}")
        trainer = pl.Trainer(max_steps=1, logger=logger, callbacks=[confusion], enable_checkpointing=False, **QUIET)
        trainer.fit(Larger(), DataLoader(data, batch_size=8))
        assert Path(logger.log_dir, f"units_of_{size}/top_pairs/00000000.png").exists() == shown


def test_a_logger_that_fails_keeps_no_other_from_its_numbers(tmp_path):
    class Full(Rows):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith(PREFIX) for key in metrics):
                raise OSError("no space left on device")

    rows = Rows()
    with pytest.warns(UserWarning, match="no space left on device"):
        fit(GradientConfusionCallback(), logger=[Full(), rows])
    assert [step for step, _ in rows.of(ours=True)] == STEPS


# ---- the page of charts ----------------------------------------------------------------------------------------------


def layout(folder: str) -> dict[str, dict[str, list[str]]]:
    events = EventAccumulator(folder).Reload()
    if metadata.CONFIG_SUMMARY_TAG not in events.Tags()["tensors"]:
        return {}
    page = layout_pb2.Layout.FromString(events.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0])
    return {
        category.title: {
            chart.title: list(chart.multiline.tag)
            or [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
            for chart in category.chart
        }
        for category in page.category
    }


def test_page_has_confusion_loss_and_accuracy_and_a_band_of_cosines(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(GradientConfusionCallback(), GradientConfusionCallback(prefix="of/weight", parameters="weight"), logger=logger)
    page = layout(logger.log_dir)
    assert list(page) == [PREFIX, "of/weight"]
    events = EventAccumulator(logger.log_dir).Reload()
    shown = lambda patterns: {tag for tag in events.Tags()["scalars"] for p in patterns if re.match(p, tag)}  # noqa: E731
    assert shown(page[PREFIX]["min_cosine, loss, accuracy: see Matches"]) == {
        f"{PREFIX}/min_cosine",
        "train_loss",
        "val_acc",
    }
    assert shown(page["of/weight"]["min_cosine, loss, accuracy: see Matches"]) == {
        "of/weight/min_cosine",
        "train_loss",
        "val_acc",
    }
    cosines = torch.tensor([cosine for cosine, _ in by_cosine()])
    want = (
        cosines.mean(),
        cosines.quantile(0.05, interpolation="nearest"),
        cosines.quantile(0.95, interpolation="nearest"),
    )
    for tag, value in zip(page[PREFIX]["cosines, 5 % to 95 %"], want, strict=True):
        assert [event.step for event in events.Scalars(tag)] == STEPS
        assert events.Scalars(tag)[-1].value == pytest.approx(float(value), abs=1e-6)


@pytest.mark.parametrize("hook", ["before the run", "setup", "on_fit_start", "on_train_start", "on_train_epoch_end"])
def test_a_page_of_the_users_own_stays(hook, tmp_path):
    def write(trainer, *args, **kwargs):
        trainer.logger.experiment.add_custom_scalars({"mine": {"losses": ["Multiline", ["train_loss"]]}})

    logger = TensorBoardLogger(tmp_path)
    own = pl.Callback()
    if hook == "before the run":
        write(SimpleNamespace(logger=logger))
    else:
        setattr(own, hook, write)
    for order in ([own, GradientConfusionCallback()], [GradientConfusionCallback(), own]):
        fit(*order, logger=logger)
        assert list(layout(logger.log_dir)) == ["mine"]


def test_the_page_is_written_once_and_nothing_is_read_from_the_folder(tmp_path, monkeypatch):
    class NewKeys(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            module.log(f"loss_of_epoch_{trainer.current_epoch}", 1.0)

    pages, add = [], SummaryWriter.add_custom_scalars
    monkeypatch.setattr(SummaryWriter, "add_custom_scalars", lambda self, page: (pages.append(page), add(self, page)))
    monkeypatch.setattr(EventAccumulator, "Reload", lambda self: pytest.fail("read the event folder"))
    logger = TensorBoardLogger(tmp_path)
    for _ in range(2):
        fit(NewKeys(), GradientConfusionCallback(), GradientConfusionCallback(prefix="b"), logger=logger, max_steps=3)
    assert [list(page) for page in pages] == [[PREFIX, "b"]]


def test_bytes_and_bins_of_a_default_measurement(tmp_path):
    def size(*callbacks):
        folder = tmp_path / str(len(callbacks))
        fit(*callbacks, logger=TensorBoardLogger(folder, name=""), max_steps=42, log_every_n_steps=1)
        return sum(file.stat().st_size for file in folder.rglob("events*")), folder

    without, _ = size()
    measured, folder = size(GradientConfusionCallback(num_units=8))
    assert (measured - without) / 42 < 1500
    events = EventAccumulator(str(folder / "version_0"), size_guidance={"histograms": 0}).Reload()
    limits = events.Histograms(f"{PREFIX}/cosines")[-1].histogram_value.bucket_limit
    even = torch.linspace(-1, 1, 41).tolist()
    assert all(min(abs(limit - edge) for edge in even) < 1e-6 for limit in limits)


def test_runs_that_do_not_train_have_no_page(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(callbacks=[GradientConfusionCallback()], logger=logger, **QUIET)
    for run in (trainer.validate, trainer.test):
        run(BoringModel(), verbose=False)
    trainer.predict(BoringModel())
    assert layout(logger.log_dir) == {}


def test_without_histogram_there_is_no_page(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(GradientConfusionCallback(histogram=False), logger=logger)
    assert layout(logger.log_dir) == {}
    assert not any(
        os.path.basename(tag) == "p95" for tag in EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    )


def test_the_patterns_of_a_chart_work_as_the_one_that_tensorboard_makes_of_them():
    patterns = charts(PREFIX)[PREFIX]["min_cosine, loss, accuracy: see Matches"][1]
    joined = re.compile("|".join(f"({pattern})" for pattern in patterns))
    found = ["min_cosine", "0/min_cosine"]
    others = ["eta", "cosines/mean", "min_cosine/net.0"]
    assert all(joined.match(f"{PREFIX}/{name}") for name in found)
    assert not any(joined.match(f"{PREFIX}/{name}") for name in others)
    assert all(map(joined.match, ["train_loss", "val/Loss", "train_loss_step", "val_accuracy", "Acc"]))
    assert not any(map(joined.match, ["train_loss_epoch", "val_acc_epoch", "epoch", "lr-SGD"]))
