"""python -m lightning_gradconf, on what loggers really wrote."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_gradconf.__main__ import main, sparkline
from lightning_gradconf.plots import plot_curves
from lightning_gradconf.reports.loggers import show_table
from lightning_gradconf.reports.saved_runs import accuracy_keys, loss_keys, read_runs, read_settings, with_confusion
from lightning_gradconf.reports.settings import Settings, row_of

pytest.importorskip("matplotlib")

LOGGED = [
    (0, {"gradient_confusion/min_cosine": -0.25, "gradient_confusion/p05_cosine": 0.0, "gradient_confusion/eta": 1.5}),
    (49, {"train_loss": 2.25}),
    (49, {"gradient_confusion/min_cosine": -0.75, "gradient_confusion/p05_cosine": -0.5, "gradient_confusion/eta": 4}),
    (99, {"gradient_confusion/min_cosine": -0.5, "gradient_confusion/p05_cosine": -0.25, "gradient_confusion/eta": 2}),
    (99, {"train_loss": 1.25, "val_acc": 0.5}),
]
CURVES = {
    "gradient_confusion/min_cosine": {0: -0.25, 49: -0.75, 99: -0.5},
    "gradient_confusion/p05_cosine": {0: 0.0, 49: -0.5, 99: -0.25},
    "gradient_confusion/eta": {0: 1.5, 49: 4.0, 99: 2.0},
    "train_loss": {49: 2.25, 99: 1.25},
    "val_acc": {99: 0.5},
}


def write(logger, logged=LOGGED, *settings):
    for step, metrics in logged:
        logger.log_metrics(metrics, step)
    for step, compared in enumerate(settings):
        show_table(logger, "gradient_confusion/settings", [row_of(compared)], step)
    logger.save()
    logger.finalize("success")
    return logger.log_dir


@pytest.mark.parametrize("logger_class", [TensorBoardLogger, CSVLogger])
def test_reads_what_a_logger_wrote(tmp_path, logger_class):
    folder = write(logger_class(tmp_path, name="run"))
    assert read_runs([folder]) == read_runs([tmp_path]) == {"version_0": CURVES}
    (file,) = (file for file in Path(folder).iterdir() if "events" in file.name or file.name == "metrics.csv")
    assert read_runs([file]) == {"version_0": CURVES}


def test_reads_runs_of_both_loggers_below_a_folder_by_their_paths(tmp_path):
    write(TensorBoardLogger(tmp_path, name="wide"))
    write(TensorBoardLogger(tmp_path, name="wide"))
    write(CSVLogger(tmp_path, name="deep"))
    assert list(read_runs([tmp_path])) == ["deep/version_0", "wide/version_0", "wide/version_1"]
    assert list(read_runs([tmp_path / "wide", tmp_path / "deep"])) == list(read_runs([tmp_path]))


def test_a_run_that_two_loggers_wrote_is_one(tmp_path):
    write(CSVLogger(tmp_path, name="run", version=0))
    write(TensorBoardLogger(tmp_path, name="run", version=0))
    assert read_runs([tmp_path]) == {"version_0": CURVES}


def test_a_resumed_run_goes_on_in_a_second_file(tmp_path):
    write(TensorBoardLogger(tmp_path, name="run", version=0), [(0, {"a": 1.0}), (1, {"a": 2.0}), (2, {"a": 3.0})])
    write(TensorBoardLogger(tmp_path, name="run", version=0), [(1, {"a": 5.0}), (2, {"a": 6.0}), (3, {"a": 7.0})])
    assert read_runs([tmp_path]) == {"version_0": {"a": {0: 1.0, 1: 5.0, 2: 6.0, 3: 7.0}}}


def test_event_files_of_one_second_are_told_by_their_counter(tmp_path):
    for counter, value in ((9, 1.0), (10, 2.0)):
        source = write(TensorBoardLogger(tmp_path, name=str(counter)), [(0, {"a": value})])
        (file,) = Path(source).glob("events*")
        (tmp_path / "run").mkdir(exist_ok=True)
        file.rename(tmp_path / "run" / f"events.out.tfevents.1700000000.host.12.{counter}")
    assert read_runs([tmp_path / "run"]) == {"run": {"a": {0: 2.0}}}


def test_keeps_every_point_and_passes_over_text(tmp_path):
    many = [(step, {"a": float(step)}) for step in range(20_000)]
    write(TensorBoardLogger(tmp_path, name="many"), many)
    assert len(read_runs([tmp_path / "many"])["version_0"]["a"]) == 20_000
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "metrics.csv").write_text("step,a,pairs,b\n0,1.5,3 and 7,\n1,nan,,\n,2.0,,\n")
    curves = read_runs([tmp_path / "text"])["text"]
    assert curves.keys() == {"a"}
    assert curves["a"][0] == 1.5
    assert math.isnan(curves["a"][1])


def test_losses_and_accuracies_are_known_by_name():
    keys = ["val_loss_epoch", "val_loss_step", "Train/Loss", "g_loss", "acc", "train_accuracy", "lr-SGD", "epoch"]
    assert loss_keys(keys) == ["Train/Loss", "g_loss", "val_loss_step"]
    assert accuracy_keys(keys) == ["train_accuracy", "acc"]


def test_runs_without_our_keys_are_left_out():
    assert with_confusion({"a": CURVES, "b": {"train_loss": {0: 1.0}}}) == {"a": CURVES}


def test_table_and_figure(tmp_path, capsys):
    write(TensorBoardLogger(tmp_path, name="wide"))
    write(CSVLogger(tmp_path, name="deep"), [(0, {"gradient_confusion/min_cosine": -1.0})])
    write(CSVLogger(tmp_path, name="other"), [(0, {"train_loss": 1.0})])
    output = tmp_path / "comparison.png"
    assert main([str(tmp_path), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("run", "n", "unit_size", "engine"),
        *("step", "min_cosine", "worst", "p05_cosine", "eta", "train_loss", "min_cosine"),
    ]
    assert lines[1].split()[:-1] == ["deep/version_0", "-", "-", "-", "0", "-1.0000", "-1.0000", "-", "-", "-"]
    assert lines[2].split()[:-1] == [
        "wide/version_0",
        "-",
        "-",
        "-",
        "99",
        "-0.5000",
        "-0.7500",
        "-0.2500",
        "2.0000",
        "1.2500",
    ]
    assert lines[2].split()[-1] in ("█▃▆", "#.*")
    assert lines[4] == "Left out, without gradient_confusion/min_cosine: other/version_0"
    assert lines[-1] == f"The curves are in {output}"
    assert output.read_bytes().startswith(b"\x89PNG")


# ---- what was compared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger_class", [TensorBoardLogger, CSVLogger])
def test_reads_the_settings_that_were_logged_last(tmp_path, logger_class):
    first, last = Settings(32, 1, "ghost"), Settings(32, None, "loop")
    folder = write(logger_class(tmp_path, name="fell back"), LOGGED, first, last)
    assert read_settings([tmp_path]) == read_settings([folder]) == {"version_0": last}
    assert read_settings([tmp_path], "another prefix") == {}
    assert read_runs([tmp_path]) == {"version_0": CURVES}, "settings are no curves"


@pytest.mark.parametrize("logger_class", [TensorBoardLogger, CSVLogger])
def test_reads_the_settings_of_a_prefix_of_two_words(tmp_path, logger_class):
    logger = logger_class(tmp_path, name="run")
    logger.log_metrics({"conflict/of layers/min_cosine": 0.5}, 0)
    show_table(logger, "conflict/of layers/settings", [row_of(Settings(32, 1, "ghost"))], 0)
    logger.save()
    logger.finalize("success")
    assert read_settings([tmp_path], "conflict/of layers") == {"version_0": Settings(32, 1, "ghost")}


def test_a_run_without_settings_has_none(tmp_path):
    write(TensorBoardLogger(tmp_path, name="new"), LOGGED, Settings(15, 128, "ghost"))
    write(TensorBoardLogger(tmp_path, name="old"))
    assert read_settings([tmp_path]) == {"new/version_0": Settings(15, 128, "ghost")}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Settings(15, 1, "loop"), None),
        (Settings(100, 1, "ghost"), "n differs (15, 100)"),
        (Settings(15, 128, "ghost"), "unit_size differs (1, 128)"),
    ],
)
def test_says_which_runs_cannot_be_compared(tmp_path, capsys, other, said):
    write(TensorBoardLogger(tmp_path, name="a"), LOGGED, Settings(15, 1, "ghost"))
    write(CSVLogger(tmp_path, name="b"), LOGGED, other)
    assert main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 0
    _, first, second, *lines = capsys.readouterr().out.splitlines()
    assert first.split()[1:4] == ["15", "1", "ghost"]
    assert second.split()[1:4] == list(map(str, other))
    assert [line for line in lines if "Not comparable" in line] == (
        [line for line in lines if said in line] if said else []
    )
    axes, *_ = (figure := plot_curves(tmp_path)).axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a/version_0 (n = 15, unit_size = 1, ghost)",
        f"b/version_0 (n = {other.n}, unit_size = {other.unit_size}, {other.engine})",
    ]
    assert (said in axes.get_title()) if said else ("differs" not in axes.get_title())


def test_the_title_of_one_run_has_its_settings(tmp_path):
    write(TensorBoardLogger(tmp_path, name="a"), LOGGED, Settings(15, None, "ghost"))
    assert plot_curves({"only": tmp_path}).axes[0].get_title().endswith("\nonly (n = 15, unit_size = ?, ghost)")


def test_runs_that_are_not_drawn_forbid_nothing(tmp_path, capsys):
    write(CSVLogger(tmp_path, name="a"), LOGGED, Settings(15, 1, "ghost"))
    write(CSVLogger(tmp_path, name="b"), [(0, {"train_loss": 1.0})], Settings(32, 1, "ghost"))
    assert main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 0
    assert "Not comparable" not in capsys.readouterr().out


def test_keys_and_prefix(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(CSVLogger(tmp_path, name="run"), [(0, {"train/min_cosine": 0.5, "val_acc": 0.25})])
    assert main([".", "--prefix", "train", "--keys", "val_acc"]) == 0
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert "val_acc" in header
    assert row.split()[:-1] == ["version_0", "-", "-", "-", "0", "0.5000", "0.5000", "-", "-", "0.2500"]
    assert (tmp_path / "confusion.png").is_file()


def test_nan_is_neither_the_last_word_nor_an_error(tmp_path, capsys):
    logged = [(step, {"gradient_confusion/min_cosine": value}) for step, value in enumerate((math.nan, -0.5, math.nan))]
    write(CSVLogger(tmp_path, name="run"), logged)
    assert main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[5:7] == ["nan", "-0.5000"]


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7, "abcdefgh") == "abcdefgh"
    assert sparkline([0.0] * 30 + [7.0] * 30, 0, 7, "abcdefgh") == "a" * 12 + "h" * 12
    assert sparkline([1, 1], 1, 1) == "__"
    assert len(sparkline(list(range(25)), 0, 24)) == 24
    assert sparkline([math.nan], 0, 0) == "?"


def test_blocks_only_where_the_terminal_has_them(tmp_path, monkeypatch):
    write(CSVLogger(tmp_path, name="run"))
    for encoding, line in (("utf-8", "█▁▅"), ("ascii", "#_+")):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 0
        stdout.seek(0)
        assert stdout.read().splitlines()[1].endswith(line)


def test_says_what_is_wrong(tmp_path, capsys):
    def error(*arguments):
        assert main([*map(str, arguments), "--output", str(tmp_path / "x.png")]) == 1
        return capsys.readouterr().err

    assert "nowhere does not exist: pass the folder" in error(tmp_path / "nowhere")
    assert "holds no TensorBoard event files and no metrics.csv" in error(tmp_path)
    write(CSVLogger(tmp_path, name="run"), [(0, {"train_loss": 1.0, "lr": 0.5})])
    assert "No run has gradient_confusion/min_cosine, only lr, train_loss: train with" in error(tmp_path)
    write(CSVLogger(tmp_path, name="run"))
    assert "No run has accuracy: choose from" in error(tmp_path, "--keys", "accuracy")
    assert main([str(tmp_path), "--output", str(tmp_path / "nowhere" / "x.png")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_without_matplotlib_the_table_is_there(tmp_path, capsys, monkeypatch):
    write(CSVLogger(tmp_path, name="run"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "version_0" in out
    assert "pip install matplotlib" in err


def test_as_a_command(tmp_path):
    write(CSVLogger(tmp_path, name="run"))
    command = [sys.executable, "-m", "lightning_gradconf", ".", "--output", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "version_0" in done.stdout
    assert (tmp_path / "x.png").is_file()
