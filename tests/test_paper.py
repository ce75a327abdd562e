"""examples/paper: its networks are the published ones, its claims hold at initialisation, its studies run."""

from __future__ import annotations

import csv
import json
import math
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_paper_data import write_cifar, write_mnist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from paper import __main__ as command
from paper import data, figures, models, moments, protocol, speed, sweep, tables, theory, trends, width
from paper.run import Run, train

CIFAR, DIGIT = (3, 32, 32), (1, 8, 8)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"), [("wrn-28-10", 36.5), ("wrn-16-4", 2.7), ("wrn-40-4", 8.9), ("wrn-16-8", 11.0)]
)
def test_parameters_of_wide_resnets_in_millions(name, published):
    """Zagoruyko & Komodakis 2016, tables 4 to 6, for CIFAR-10."""
    with torch.device("meta"):
        assert round(parameters(models.build(name, CIFAR, 10)) / 1e6, 1) == published


@pytest.mark.parametrize("name", ["16-2", "28-1"])
def test_halves_differ_from_the_wide_resnet_in_what_is_left_out(name):
    networks = {kind: models.build(f"{kind}-{name}", CIFAR, 10) for kind in models.PARTS}
    norms = sum(parameters(m) for m in networks["wrn"].modules() if isinstance(m, nn.BatchNorm2d))
    shortcuts = sum(parameters(m) for m in networks["wrn"].modules() if getattr(m, "kernel_size", None) == (1, 1))
    everything = parameters(networks["wrn"])
    assert norms > 0 and shortcuts > 0
    assert parameters(networks["skip"]) == everything - norms
    assert parameters(networks["bn"]) == everything - shortcuts
    assert parameters(networks["cnn"]) == everything - norms - shortcuts
    layers = [m for m in networks["cnn"].modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == int(name[:2]) - 2  # 6 n + 4 counts the two 1x1 convolutions of widened stages


@pytest.mark.parametrize("skip", [True, False])
def test_a_block_that_computes_nothing(skip):
    block = models.Block(4, 4, stride=1, batch_norm=False, skip=skip)
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), x if skip else torch.zeros_like(x), rtol=0, atol=0)


@pytest.mark.parametrize("image", [CIFAR, DIGIT, (1, 28, 28)])
@pytest.mark.parametrize("name", ["cnn-10-1", "wrn-10-2", "bn-10-1", "skip-10-1", "relu-2-8", "tanh-1-8", "linear-3-8"])
def test_every_network_takes_every_image(name, image):
    assert models.build(name, image, 7, channels=2)(torch.randn(3, *image)).shape == (3, 7)


def test_width_of_a_perceptron():
    sizes = [tuple(m.weight.shape) for m in models.build("relu-3-5", DIGIT, 10).modules() if isinstance(m, nn.Linear)]
    assert sizes == [(5, 64), (5, 5), (5, 5), (10, 5)]


@pytest.mark.parametrize("name", ["resnet-18-2", "cnn-16", "relu", "relu-a-2", "relu-2--3"])
def test_no_such_network(name):
    with pytest.raises(ValueError, match="write KIND-DEPTH-WIDTH"):
        models.build(name, DIGIT, 10)


def test_no_such_depth():
    with pytest.raises(ValueError, match=r"6 n \+ 4"):
        models.build("wrn-18-2", DIGIT, 10)


@pytest.mark.parametrize("relu", [True, False])
def test_initialisations(relu):
    gain = 2 if relu else 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 200), nn.Conv2d(40, 60, 3))
    for name in models.INITIALISATIONS:
        models.initialise(model, name, relu)
        linear, convolution = model[0].weight.detach(), model[1].weight.detach()
        assert not model[0].bias.any() and not model[1].bias.any()
        variance = {"msra": gain / 600, "glorot": 2 / 800, "orthogonal": gain / 600}[name]
        assert float(linear.var()) == pytest.approx(variance, rel=0.02)
        if name == "orthogonal":
            torch.testing.assert_close(linear @ linear.T, gain * torch.eye(200), rtol=0, atol=1e-4)
        else:
            variance = {"msra": gain / 360, "glorot": 2 / 900}[name]
            assert float(convolution.var()) == pytest.approx(variance, rel=0.03)
    with pytest.raises(ValueError, match="choose from msra, glorot, orthogonal"):
        models.initialise(model, "he")


# ---- claims at initialisation ---------------------------------------------------------------------------------------


@cache
def lowest_cosine(name: str, init: str, seed: int) -> float:
    """Of 128 digits, before any training."""
    return train(Run("digits", name, init, seed, num_units=128, unit_size=1))["rows"][0]["min_cosine"]


def lowest_cosines(names: list[str], init: str) -> np.ndarray:
    """(seeds, names)."""
    return np.array([[lowest_cosine(name, init, seed) for name in names] for seed in range(4)])


def rises(values: np.ndarray) -> bool:
    """Whether the mean over seeds is monotone, and its ends differ by more than their spread."""
    mean, spread = values.mean(0), values.std(0, ddof=1)
    return bool((np.diff(mean) > 0).all() and mean[-1] - mean[0] > spread[0] + spread[-1])


def test_confusion_grows_with_depth():
    assert rises(-lowest_cosines([f"relu-{depth}-64" for depth in (1, 8, 32)], "msra"))
    assert rises(-lowest_cosines([f"linear-{depth}-64" for depth in (1, 8, 32)], "glorot"))


def test_confusion_shrinks_with_width():
    # From 16 on: at a width of 8 all units of a layer can be dead, which leaves only the last bias a gradient.
    assert rises(lowest_cosines([f"relu-8-{width}" for width in (16, 64, 512)], "msra"))


@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_orthogonal_initialisation_takes_depth_away(activation):
    names = [f"{activation}-{depth}-64" for depth in (1, 32)]
    gaussian, orthogonal = (lowest_cosines(names, init) for init in ("glorot", "orthogonal"))
    assert rises(-gaussian)
    assert not rises(-orthogonal)
    assert rises(np.stack([gaussian[:, 1], orthogonal[:, 1]], axis=1))


# ---- one run --------------------------------------------------------------------------------------------------------

TINY = Run("digits", "linear-1-4", "glorot", seed=1, lr=0.1, epochs=2, batch_size=300, num_units=4, unit_size=100)


def test_a_run_is_plain_sgd():
    """The losses are those of a loop without Lightning over the same batches."""
    record = train(TINY)
    torch.manual_seed(1)
    images, labels, test_images, test_labels = data.load("digits")
    net = models.build("linear-1-4", DIGIT, 10)
    models.initialise(net, "glorot", relu=False)
    rows = []
    for epoch in range(2):
        # as DataLoader draws: a seed for its workers, then one for its sampler
        torch.empty((), dtype=torch.int64).random_()
        seed = int(torch.empty((), dtype=torch.int64).random_())
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(seed))
        losses = []
        for batch in order.split(300):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= 0.1 * 0.1 ** (epoch >= 1) * gradient  # round(0.4 * 2) = 1
            losses.append(loss.item())
        rows.append(np.mean(losses))
    assert [row["loss"] for row in record["rows"][1:]] == pytest.approx(rows, rel=1e-5)
    assert record["accuracy"] == pytest.approx((net(test_images).argmax(1) == test_labels).float().mean().item())
    assert math.isnan(record["rows"][0]["loss"])
    assert len({row["min_cosine"] for row in record["rows"]}) == 3
    assert len(record["cosines"]) == 6
    assert min(record["cosines"]) == pytest.approx(record["rows"][-1]["min_cosine"], abs=1e-4)
    assert record["parameters"] == 64 * 4 + 4 + 4 * 10 + 10
    drawn = torch.randperm(1500, generator=torch.Generator().manual_seed(1))[:1200]
    squared = []
    for i in drawn:
        loss = nn.functional.cross_entropy(net(images[i : i + 1]), labels[i : i + 1])
        squared.append(sum(float(g.double().square().sum()) for g in torch.autograd.grad(loss, list(net.parameters()))))
    ratios = [part.sum() ** 2 / (part**2).sum() for part in np.split(np.array(squared), 4)]
    assert record["samples_in_effect"] == pytest.approx(np.mean(ratios), rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*a gradient is not finite")
def test_a_run_that_diverges_is_a_record_too(tmp_path):
    record = train(replace(TINY, lr=1e30, epochs=9))
    assert len(record["rows"]) < 10
    assert not math.isfinite(record["rows"][-1]["loss"])
    assert moments.final_loss(record) == moments.epochs_to(record, 0.5) == math.inf
    assert moments.failed(record)
    assert math.isfinite(moments.at_initialisation(record))
    assert math.isnan(moments.at_end(record)) and math.isnan(moments.at_loss(record, 0.5))
    sweep.write_csv([record], tmp_path / "runs.csv")
    lines = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [line["epoch"] for line in lines] == [str(epoch) for epoch in range(len(record["rows"]))]
    assert "| 0 of 1 |" in tables.table({"x": [record]}, 0.5) and "diverged" in tables.table({"x": [record]}, 0.5)


# ---- many runs ------------------------------------------------------------------------------------------------------


class Here(Executor):
    """Runs everything at once in this process."""

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, function, /, *args):  # type: ignore[override]
        self.submitted += 1
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_what_is_finished_is_not_done_again(tmp_path, capsys):
    runs = [replace(TINY, epochs=0, seed=seed) for seed in (0, 1, 0)]
    first, again = Here(), Here()
    records = sweep.finish(runs, "x", folder=tmp_path, data_dir=None, pool=first)
    assert first.submitted == 2
    assert [record["run"]["seed"] for record in records] == [0, 1, 0]
    assert sweep.finish(runs, "x", folder=tmp_path, data_dir=None, pool=again)[1]["rows"] == records[1]["rows"]
    assert again.submitted == 0
    assert len(list(tmp_path.iterdir())) == 2  # nothing unfinished is left


def test_a_run_that_fails_is_named(tmp_path, capsys):
    runs = [replace(TINY, epochs=0), replace(TINY, model="cnn-11-1")]
    with pytest.raises(RuntimeError, match=r"model='cnn-11-1'.* failed: depth=11"):
        sweep.finish(runs, "x", folder=tmp_path, data_dir=None, pool=Here())
    assert len(list(tmp_path.iterdir())) == 1


def record_of(
    losses: list[float],
    cosines: list[float],
    seed: int = 0,
    model: str = "cnn-10-1",
    lr: float = 1.0,
    data: str = "digits",
    epochs: int = 3,
) -> dict:
    rows = [{"epoch": i, "loss": x, "min_cosine": c} for i, (x, c) in enumerate(zip(losses, cosines, strict=True))]
    run = {"model": model, "init": "msra", "seed": seed, "lr": lr, "epochs": epochs, "data": data}
    costs = {"parameters": 1, "cpu_seconds": 1.0, "processor": "x"}
    return {"run": run, "rows": rows, "cosines": [0.0, 0.1, 0.2], "accuracy": 0.5, **costs}


def test_moments_of_a_training():
    record = record_of([math.nan, 2.0, 1.0, 0.5], [0.4, 0.2, -0.3, -0.9])
    assert moments.epochs_to(record, 2.5) == 1
    assert moments.epochs_to(record, 1.25) == 1.75
    assert moments.epochs_to(record, 0.4) == math.inf
    assert (moments.at_initialisation(record), moments.early(record), moments.at_end(record)) == (0.4, 0.2, -0.9)
    assert moments.at_loss(record, 1.25) == pytest.approx((0.2 - 0.3 - 0.9) / 3)
    assert moments.at_loss(record, 0.5) == pytest.approx((-0.3 - 0.9) / 2)
    assert math.isnan(moments.at_loss(record, 0.4))
    long = record_of([math.nan, *[1.0] * 40], [0.0, *range(40)], epochs=40)
    assert moments.early(long) == np.mean(range(6))
    assert moments.at_end(long) == np.mean(range(36, 40))
    assert list(moments.moments(1.2)) == ["at initialisation", "early", "at loss 1.2", "at the end"]


def test_a_training_that_ends_at_guessing_failed():
    """Ten classes have a loss of 2.303 by guessing, two 0.693."""
    losses = [math.nan, 2.3, 2.3]
    assert moments.failed(record_of([*losses, 2.2], [0.0] * 4))
    assert not moments.failed(record_of([*losses, 2.0], [0.0] * 4))
    assert moments.failed(record_of([*losses, 0.65], [0.0] * 4, data="digits-parity"))
    assert moments.failed(record_of(losses, [0.0] * 3)), "it diverged"


def test_the_learning_rate_is_chosen_by_the_training_loss_of_another_seed():
    seen = []

    def finish(runs, title):
        seen.append(list(runs))
        loss = {0.01: 0.9, 0.1: 0.2, 1.0: math.nan}
        made = [record_of([math.nan, 2, 2, loss[r.lr]], [0, 0, 0, 0], r.seed, r.model, r.lr) for r in runs]
        return [record | {"run": vars(run)} for record, run in zip(made, runs, strict=True)]

    runs = [replace(TINY, epochs=5), replace(TINY, epochs=5, model="tanh-1-4")]
    plan = replace(protocol.DIGITS, rates=(0.01, 0.1, 1.0), seeds=2, tuning_epochs=3)
    records = sweep.tuned(runs, plan, "x", finish)
    assert [(run.seed, run.epochs) for run in seen[0]] == [(sweep.TUNING_SEED, 3)] * 6
    assert {run.epochs for run in seen[1]} == {5}
    assert [(run.model, run.lr, run.seed) for run in seen[1]] == [
        (model, 0.1, seed) for model in ("linear-1-4", "tanh-1-4") for seed in (0, 1)
    ]
    assert len(records) == 10  # nothing is dropped
    assert len(sweep.chosen(records, "tanh-1-4", "glorot")) == 2


def test_a_trend_is_per_doubling_with_an_interval():
    exact = trends.slope([1, 2, 8], [[1.0, 1.0], [1.5, 1.5], [2.5, 2.5]])
    assert tuple(exact) == pytest.approx((0.5, 0.5, 0.5)), "without noise there is nothing unsure"
    noise = np.random.default_rng(0).normal(size=(5, 4))
    sizes = (1, 2, 4, 8, 16)
    wide, narrow = (trends.slope(sizes, np.arange(5)[:, None] + width * noise) for width in (1.0, 0.1))
    assert wide.low < narrow.low < 1 < narrow.high < wide.high
    assert str(trends.slope([1, 2, 4], [[1.0], [math.nan], [3.0]])) == "too few"
    assert str(trends.Estimate(0.5, -0.25, 1)) == "0.50 [\N{MINUS SIGN}0.25, 1.00]"


def test_seeds_of_one_network_are_not_networks():
    """Two networks far apart with many seeds: to draw networks again makes the interval as wide as both."""
    networks = [[0.0] * 50, [1.0] * 50]
    mean = trends.bootstrap(networks, lambda _, entries: float(np.mean(entries)))
    assert tuple(mean) == (0.5, 0.0, 1.0)


def test_correlation_of_confusion_and_time():
    def network(i, epochs, cosine):
        losses = [math.nan, *(2 - 1.5 * np.arange(3) / (epochs - 1))]  # 0.5 after `epochs`
        return [record_of(losses, [cosine] * 4, seed, f"cnn-{i}-1") for seed in (0, 1)]

    at_initialisation = moments.at_initialisation
    ordered = [record for i in range(6) for record in network(i, 1.8 + i / 10, 0.5 - i / 10)]
    found = speed.correlation(ordered, at_initialisation, 0.5)
    assert found.value == pytest.approx(1) and found.low == pytest.approx(1)
    assert speed.correlation(ordered, lambda record: -at_initialisation(record), 0.5).value == pytest.approx(-1)
    assert str(speed.correlation(ordered[:8], at_initialisation, 0.5)) == "too few"
    assert [len(members) for members in speed.by_network(ordered)] == [2] * 6


def test_a_band_is_mean_and_standard_deviation():
    _, ((axes,),) = figures.canvas(1, 1)
    values = np.array([[1.0, 2.0, np.nan], [3.0, 2.0, np.nan]])
    figures.band(axes, [10, 20, 30], values, "red", "x")
    assert axes.lines[0].get_xydata().tolist() == [[10, 2], [20, 2]]
    extent = axes.collections[0].get_paths()[0].get_extents()
    assert (extent.y0, extent.y1) == pytest.approx((2 - 2**0.5, 2 + 2**0.5))
    axes.set_yscale("log")
    figures.band(axes, [10], [[1.0], [100.0]], "red", "x")
    assert axes.lines[1].get_ydata()[0] == pytest.approx(10)


def test_cells_of_a_table():
    assert tables.spread([1.0, -3.0]) == "\N{MINUS SIGN}1.00 ± 2.83"
    assert tables.spread([0.5, math.inf], 1) == "0.5 (1 diverged)"
    assert tables.spread([math.nan], missing="constant") == "constant"


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_studies_in_processes_of_their_own(tmp_path, capsys):
    """The paper's setting on files of CIFAR-10, shrunk, and the same again from what was kept."""
    write_cifar(tmp_path / "data", 10, samples=16)
    command_line = f"--full --fast --data-dir {tmp_path / 'data'} --save-dir {tmp_path} --workers 1"
    command.main(command_line.split())
    folder = tmp_path / "cifar10-full-fast"
    summary = (folder / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    for name in command.STUDIES:
        assert f"## {name}\n" in summary
        assert name == "theory" or (folder / f"{name}.csv").stat().st_size > 0
    pictures = "init width cnn_depth cnn_width mlp_depth batchnorm_skip orthogonal speed regression concentration"
    assert {path.stem for path in folder.glob("*.png")} == set(pictures.split())
    runs = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert {json.loads(path.read_text())["run"]["data"] for path in runs} == {"cifar10"}
    assert all(json.loads(path.read_text())["processor"] for path in runs)
    command.main(command_line.split())
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == runs
    assert (folder / "summary.md").read_text() == summary


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_a_study_of_other_files(tmp_path, name, capsys):
    write_mnist(tmp_path, train=40, test=20) if name == "mnist" else write_cifar(tmp_path, 100, samples=40)
    plan = protocol.shrunk(protocol.on(protocol.FULL, name))
    finish = partial(sweep.finish, folder=tmp_path / "runs", data_dir=str(tmp_path), pool=Here())
    assert f"\n{name}:\n" in width.study(plan, finish, tmp_path)
    assert {json.loads(path.read_text())["run"]["data"] for path in (tmp_path / "runs").iterdir()} == {name}


def test_the_full_setting_is_the_papers():
    full = protocol.FULL
    assert (full.data, full.channels, full.batch_size, full.epochs, full.seeds) == ("cifar10", 16, 128, 200, 5)
    assert 100 <= full.num_units * (full.num_units - 1) // 2 <= 110
    assert full.run("cnn-16-2").unit_size == 128
    assert full.run("cnn-16-2").batches is None, "an epoch is the whole training set"


def test_other_data_have_their_own_loss_to_compare_at():
    assert protocol.on(protocol.DIGITS, "digits").target == 0.5
    assert protocol.on(protocol.DIGITS, "mnist").target == 0.5
    assert protocol.on(protocol.DIGITS, "digits-noisy") is protocol.DIGITS


def test_missing_files_end_the_command_with_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"cifar\.html"):
        command.main(["--full", "--data-dir", str(tmp_path), "--save-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data-dir FOLDER"):
        command.main(["--data", "mnist", "--save-dir", str(tmp_path)])


def test_no_such_study(capsys):
    with pytest.raises(SystemExit):
        command.main(["depth"])
    assert "choose from init, width, depth_width, batchnorm_skip, orthogonal, speed" in capsys.readouterr().err


# ---- what the theorems say -------------------------------------------------------------------------------------------


def test_a_regression_that_can_fit_all_samples_has_no_floor():
    rates = torch.tensor([0.8], dtype=torch.float64)
    few, many = (theory.descend(dimension, rates, epochs=200, seed=0) for dimension in (40, 300))
    for losses, etas in (few, many):
        assert losses.shape == etas.shape == (theory.RECORDS + 1, 1)
        assert losses.min() > -1e-12, "nothing is below the lowest loss"
    assert few[0][-10:].min() > 1e-3
    assert few[1][-10:].min() > 1e-1
    assert many[0][-10:].max() < 1e-6
    assert many[1][-10:].max() < 1e-6


def test_a_random_network_gives_the_cosines_of_a_plain_loop():
    gram = theory.random_gram(depth=2, width=5, dimension=3, samples=4, activation="tanh", seed=0)
    torch.manual_seed(0)
    model = models.mlp(2, 5, nn.Tanh, (3, 1, 1), 1)
    models.initialise(model, "glorot", relu=False)
    x = torch.randn(4, 3)
    x = x / x.norm(dim=1, keepdim=True) * 3**0.5
    y = torch.randint(2, (4, 1)) * 2.0 - 1
    gradients = []
    for i in range(4):
        parts = torch.autograd.grad((model(x[i : i + 1]) - y[i]).square().sum(), list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5)
