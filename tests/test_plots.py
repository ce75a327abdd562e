import builtins
import math
import sys

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from lightning_gradconf.plots import (  # noqa: E402
    plot_classes,
    plot_curves,
    plot_density,
    plot_gram,
    plot_layers,
    plot_pairs,
    plot_runs,
)

MINUS = "\N{MINUS SIGN}"


def draw_gram(n, seed=0, zero=()):
    vectors = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed))
    vectors[list(zero)] = 0
    return vectors @ vectors.T


def shown(figure):
    """The image of a heatmap, NaN where it is blank."""
    return torch.as_tensor(figure.axes[0].images[0].get_array().filled(math.nan))


def test_plot_gram_shows_the_cosines():
    gram = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    figure = plot_gram(gram)
    nan = math.nan
    expected = torch.tensor([[1.0, -0.5, nan], [-0.5, 1.0, nan], [nan, nan, nan]])
    torch.testing.assert_close(shown(figure), expected, equal_nan=True)
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-1, 1)
    red, blue = image.cmap(0.0), image.cmap(1.0)
    assert red[0] > red[2]  # disagreement is the warm end
    assert blue[2] > blue[0]
    assert image.cmap(math.nan)[3] == 0  # blank: the hatching behind shows
    assert figure.axes[0].get_title() == "3 gradients: min \N{MINUS SIGN}0.50, mean \N{MINUS SIGN}0.50"


def test_plot_gram_orders_units_by_class():
    gram = draw_gram(5)
    figure = plot_gram(gram, labels=torch.tensor([7, 3, 7, 3, 7]))
    order = [1, 3, 0, 2, 4]
    torch.testing.assert_close(shown(figure), shown(plot_gram(gram[order][:, order])))
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3", "7"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["3", "7"]
    assert list(axes.get_xticks()) == [0.5, 3.0]
    lines = sorted(tuple(zip(*line.get_data(), strict=True)) for line in axes.lines)
    assert lines == [((0, 1.5), (1, 1.5)), ((1.5, 0), (1.5, 1))]


def test_plot_gram_of_many_classes_names_none():
    figure = plot_gram(draw_gram(30), labels=torch.arange(30))
    assert figure.axes[0].get_xlabel() == "unit, by class"
    assert not figure.axes[0].lines


def test_plot_gram_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"pass labels of shape \(3,\)"):
        plot_gram(draw_gram(3), labels=torch.zeros(2))


@pytest.mark.parametrize("n", [2, 3, 40])
def test_plot_density_has_area_one_and_marks_the_minimum_and_the_mean(n):
    gram = draw_gram(n)
    axes = plot_density(gram).axes[0]
    norms = gram.diagonal().sqrt()
    cosines = [(gram[i, j] / norms[i] / norms[j]).item() for i in range(n) for j in range(i + 1, n)]
    bins = len(axes.patches)
    assert sum(bar.get_height() for bar in axes.patches) * 2 / bins == pytest.approx(1)
    negative = [bar.get_x() + bar.get_width() / 2 < 0 for bar in axes.patches]
    assert negative == [True] * (bins // 2) + [False] * (bins // 2)
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    below = sum(bar.get_height() for bar in axes.patches[: bins // 2]) * 2 / bins
    assert below == pytest.approx(sum(cosine < 0 for cosine in cosines) / len(cosines))
    lowest, mean = (line.get_xdata()[0] for line in axes.lines[-2:])
    assert lowest == pytest.approx(min(cosines), abs=1e-6)
    assert mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_plot_density_estimates_the_density_of_the_cosines():
    gram = draw_gram(12)
    line = plot_density(gram).axes[0].lines[0]
    points, density = (torch.as_tensor(data) for data in line.get_data())
    norms = gram.double().diagonal().sqrt()
    cosines = [(gram[i, j] / norms[i] / norms[j]).item() for i in range(12) for j in range(i + 1, 12)]
    mean = sum(cosines) / len(cosines)
    deviation = math.sqrt(sum((cosine - mean) ** 2 for cosine in cosines) / (len(cosines) - 1))
    width = deviation * len(cosines) ** -0.2
    for at in (0, 150, 200, 300, 400):
        kernels = 0.0
        for cosine in cosines:  # a kernel that reaches beyond -1 or 1 is folded back
            for image in (cosine, -2 - cosine, 2 - cosine):
                kernels += math.exp(-(((points[at].item() - image) / width) ** 2) / 2)
        expected = kernels / len(cosines) / width / math.sqrt(2 * math.pi)
        assert density[at].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert torch.trapezoid(density, points).item() == pytest.approx(1, abs=1e-4)


def test_plot_density_of_many_pairs_estimates_from_a_part_that_is_spread_evenly():
    gram = draw_gram(200)
    points, density = (torch.as_tensor(data) for data in plot_density(gram).axes[0].lines[0].get_data())
    norms = gram.double().diagonal().sqrt()
    cosines = (gram / norms[:, None] / norms)[tuple(torch.triu_indices(200, 200, offset=1))]
    width = cosines.std() * len(cosines) ** -0.2
    expected = torch.exp(-(((points[:, None] - cosines) / width) ** 2) / 2).mean(1) / width / math.sqrt(2 * math.pi)
    torch.testing.assert_close(density, expected, rtol=0, atol=0.005 * expected.max().item())


@pytest.mark.parametrize("gram", [torch.ones(2, 2), torch.ones(5, 5), draw_gram(2)])
def test_plot_density_of_too_little_has_bars_only(gram):
    axes = plot_density(gram).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == [":", "--"]  # the minimum and the mean
    assert sum(bar.get_height() > 0 for bar in axes.patches) == 1


def test_plot_density_without_scipy_has_bars_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    axes = plot_density(draw_gram(12)).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == [":", "--"]
    assert axes.patches


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), math.nan)])
def test_plot_density_without_cosines_says_so(gram):
    axes = plot_density(gram).axes[0]
    assert not axes.patches
    assert "zero or not finite" in axes.texts[0].get_text()


def test_plot_classes_shows_mean_cosines_and_counts():
    gram, labels = draw_gram(9, zero=(4,)).double(), [7, 3, 7, 3, 3, 9, 9, 3, 7]
    norms = gram.diagonal().sqrt()
    figure = plot_classes(gram, torch.tensor(labels))
    texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    for row, a in enumerate((3, 7, 9)):
        for column, b in enumerate((3, 7, 9)):
            cosines = [
                (gram[i, j] / norms[i] / norms[j]).item()
                for i in range(9)
                for j in range(9)
                if labels[i] == a and labels[j] == b and 4 not in (i, j) and (i < j if a == b else True)
            ]
            mean = sum(cosines) / len(cosines)
            assert shown(figure)[row, column].item() == pytest.approx(mean)
            assert texts[column, row] == f"{mean:.2f}\n{len(cosines)}".replace("-", MINUS)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["3", "7", "9"]


def test_plot_classes_hatches_classes_without_a_pair():
    figure = plot_classes(draw_gram(4), torch.tensor([0, 0, 0, 1]))
    assert shown(figure).isnan().tolist() == [[False, False], [False, True]]
    assert len(figure.axes[0].texts) == 3
    assert shown(plot_classes(torch.full((3, 3), math.nan), torch.arange(3))).isnan().all()


def test_plot_classes_of_many_classes_writes_no_numbers():
    axes = plot_classes(draw_gram(60), torch.arange(60) % 30).axes[0]
    assert not axes.texts


def test_plot_classes_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"pass labels of shape \(3,\)"):
        plot_classes(draw_gram(3), torch.zeros(2))


def test_plot_layers_shows_the_first_layer_on_top_and_nan_blank():
    figure = plot_layers({"stem": [0.5, -0.25], "head": [math.nan, 1.0]}, [0, 49])
    torch.testing.assert_close(shown(figure), torch.tensor([[0.5, -0.25], [math.nan, 1.0]]), equal_nan=True)
    axes = figure.axes[0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # row 0 is on top
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stem", "head"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "49"]
    assert axes.images[0].get_clim() == (-1, 1)


@pytest.mark.parametrize(("layers", "steps"), [(60, 40), (300, 3)])
def test_plot_layers_of_many_layers_has_names_that_do_not_touch(layers, steps):
    names = [f"encoder.layer.{number}." + "attention.self." * (number % 5) + "query" for number in range(layers)]
    figure = plot_layers({name: [0.0] * steps for name in names}, list(range(steps)))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) >= 60
    assert all(not boxes[i].overlaps(boxes[i + 1]) for i in range(len(boxes) - 1))
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) in range(3, 9)
    assert figure.get_size_inches()[1] < 15


@pytest.mark.parametrize(("values", "steps"), [({}, [0]), ({"a": []}, []), ({"a": [0.1]}, [0, 1])])
def test_plot_layers_refuses_what_does_not_fit(values, steps):
    with pytest.raises(ValueError, match=r"measure first|pass one for each step"):
        plot_layers(values, steps)


def test_plot_pairs_shows_both_images_in_their_own_range():
    first, second = torch.tensor([[0.0, 10.0], [5.0, 10.0]]), torch.tensor([[-3.0, -1.0], [-2.0, -3.0]])
    figure = plot_pairs(torch.stack([first, second])[None, :, None], ["a pair"])
    (axes,) = figure.axes
    image = torch.as_tensor(axes.images[0].get_array().data)
    assert axes.get_title() == "a pair"
    torch.testing.assert_close(image[:, :2], first / 10)
    torch.testing.assert_close(image[:, 2], torch.ones(2))  # between the two
    torch.testing.assert_close(image[:, 3:], (second + 3) / 2)


@pytest.mark.parametrize(
    ("pairs", "channels", "dtype"),
    [(1, 1, torch.float32), (4, 3, torch.uint8), (5, 4, torch.bfloat16), (9, 2, torch.float64), (2, 1, torch.bool)],
)
def test_plot_pairs_of_any_images(pairs, channels, dtype, tmp_path):
    images = (torch.rand(pairs, 2, channels, 6, 9) * 2).to(dtype)
    figure = plot_pairs(images, [str(number) for number in range(pairs)])
    figure.savefig(tmp_path / "figure.png")
    assert [axes.get_title() for axes in figure.axes] == [str(number) for number in range(pairs)]
    assert all(axes.images[0].get_array().ndim == (3 if channels == 3 else 2) for axes in figure.axes)


def test_plot_pairs_leaves_room_for_captions_of_several_lines():
    figure = plot_pairs(torch.rand(6, 2, 1, 8, 8), ["cosine\nlabels\nmore"] * 6)
    figure.draw_without_rendering()
    assert all(axes.title.get_window_extent().y1 <= figure.bbox.y1 for axes in figure.axes)
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == 2  # three and three


@pytest.mark.parametrize(("shape", "captions"), [((2, 2, 1, 4, 4), 1), ((2, 1, 4, 4), 2), ((0, 2, 1, 4, 4), 0)])
def test_plot_pairs_refuses_what_does_not_fit(shape, captions):
    with pytest.raises(ValueError, match=r"\(k, 2, C, H, W\)"):
        plot_pairs(torch.zeros(shape), ["caption"] * captions)


RUN = {
    "gradient_confusion/min_cosine": {0: -0.1, 50: -0.5, 100: math.nan},
    "gradient_confusion/p05_cosine": {0: 0.0, 50: -0.25, 100: math.nan},
    "gradient_confusion/mean_cosine": {0: 0.5, 50: 0.125, 100: math.nan},
    "gradient_confusion/eta": {0: 1.0, 50: 2.0, 100: math.nan},
    "train_loss": {50: 2.3, 100: 1.2},
    "val_loss": {74: 2.5},
    "val_acc": {74: 0.5},
    "lr-Adam": {50: 1e-3},
}


def curve(line):
    return list(zip(*(data.tolist() for data in line.get_data()), strict=True))


def test_plot_runs_of_one_run():
    cosines, eta, loss, accuracy = plot_runs({"a": RUN}).axes
    assert curve(cosines.lines[1])[:2] == [(0, -0.1), (50, -0.5)]
    low, high = cosines.collections[0].get_paths()[0].vertices.T[1].min(), 0.5
    assert (low, cosines.collections[0].get_paths()[0].vertices.T[1].max()) == (-0.25, high)
    assert cosines.get_title() == "line: min_cosine, band: p05_cosine to mean_cosine\na"
    assert (eta.get_ylabel(), loss.get_ylabel(), accuracy.get_ylabel()) == ("eta\n(squared norm)", "loss", "val_acc")
    assert [curve(line) for line in loss.lines[:2]] == [[(50, 2.3), (100, 1.2)], [(74, 2.5)]]
    assert loss.lines[1].get_marker() == "."  # a single point has no line
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train_loss", "val_loss"]
    assert curve(accuracy.lines[0]) == [(74, 0.5)]


def test_plot_runs_of_several_has_a_colour_for_each():
    sparse = {"gradient_confusion/min_cosine": {0: 0.2}}
    figure = plot_runs({"a": RUN, "b": sparse, "c": RUN})
    lines = figure.axes[0].lines[1:]
    assert len({line.get_color() for line in lines}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]


def test_plot_runs_with_quantiles_has_a_band_between_them():
    quantiles = {"gradient_confusion/cosines/p05": {0: -0.75, 50: -0.5}, "gradient_confusion/cosines/p95": {0: 0.875}}
    axes = plot_runs({"a": RUN | quantiles}).axes[0]
    heights = axes.collections[0].get_paths()[0].vertices.T[1]
    assert (heights.min(), heights.max()) == (-0.75, 0.875)
    assert axes.get_title() == "line: min_cosine, band: 5 % to 95 % of the cosines\na"


def test_plot_runs_of_given_keys():
    figure = plot_runs({"a": RUN}, ["lr-Adam", "val_loss"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["cosine", "eta\n(squared norm)", "lr-Adam", "val_loss"]


def test_plot_runs_marks_a_key_as_it_is_drawn():
    runs = {name: {"gradient_confusion/min_cosine": {0: 0.5}, key: {0: 1.0}} for name, key in (("a", "x"), ("b", "y"))}
    axes = plot_runs(runs, ["x", "y"]).axes[1:]
    assert [panel.get_ylabel() for panel in axes] == ["x", "y"]
    runs = {name: curves | {"shared_loss": {0: 1.0}, f"{name}_loss": {0: 2.0}} for name, curves in runs.items()}
    loss = plot_runs(runs).axes[1]
    drawn = {(line.get_color(), line.get_linestyle()) for line in loss.lines if len(line.get_xdata())}
    marks = {
        text.get_text(): (line.get_color(), line.get_linestyle())
        for text, line in zip(loss.get_legend().get_texts(), loss.get_legend().get_lines(), strict=True)
    }
    assert {marks["a_loss"], marks["b_loss"]} <= drawn
    assert marks["shared_loss"][0] not in {colour for colour, _ in drawn}


def test_plot_runs_of_few_steps_has_whole_steps_on_its_axis():
    figure = plot_runs({"a": {"gradient_confusion/min_cosine": {0: 0.5, 1: 0.25, 2: 0.0}}})
    assert all(float(tick).is_integer() for tick in figure.axes[-1].get_xticks())


def test_plot_curves_reads_what_the_csv_logger_wrote(tmp_path):
    for name, lowest in (("one", -0.5), ("two", -0.25)):
        (tmp_path / name).mkdir()
        text = f"epoch,step,gradient_confusion/min_cosine,train_loss\n0,0,{lowest},\n0,49,,2.5\n"
        (tmp_path / name / "metrics.csv").write_text(text)
    one = tmp_path / "one" / "metrics.csv"
    for source, expected in (
        (one, ["one"]),
        (str(tmp_path), ["one", "two"]),
        ([tmp_path / "two", one], ["one", "two"]),
        ({"wide": one, "deep": tmp_path / "two"}, ["wide", "deep"]),
        ({"all": tmp_path}, ["all/one", "all/two"]),
    ):
        figure = plot_curves(source)
        assert [line.get_label() for line in figure.axes[0].lines[1:]] == expected
        assert curve(figure.axes[1].lines[0]) == [(49, 2.5)]
    with pytest.raises(ValueError, match=r"No run has other/min_cosine, only .*train_loss.*prefix that it logged with"):
        plot_curves(one, prefix="other")
    with pytest.raises(ValueError, match=r"No run has accuracy: choose from .*train_loss"):
        plot_curves(one, ["accuracy", "train_loss"])


@pytest.mark.parametrize("plot", [plot_gram, plot_density, lambda gram: plot_classes(gram, torch.arange(len(gram)))])
@pytest.mark.parametrize(
    "gram",
    [
        *(draw_gram(32, zero=(3,)), draw_gram(200), torch.ones(2, 2), torch.zeros(2, 2), torch.full((2, 2), math.nan)),
        *(draw_gram(4).to(torch.bfloat16), draw_gram(4).double(), draw_gram(4).requires_grad_()),
    ],
)
def test_figures_render_without_pyplot(plot, gram, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    figure = plot(gram)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    "plot",
    [
        *(plot_gram, plot_density, lambda gram: plot_classes(gram, torch.arange(len(gram)))),
        *(lambda _: plot_layers({"a": [0.0]}, [0]), lambda _: plot_pairs(torch.zeros(1, 2, 1, 2, 2), [""])),
        lambda _: plot_runs({"a": RUN}),
    ],
)
def test_without_matplotlib_the_error_says_how_to_get_it(plot, monkeypatch):
    import_module = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return import_module(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot(draw_gram(3))
