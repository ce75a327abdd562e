import builtins
import math
import sys

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")

from lightning_gradconf.plots import plot_density, plot_gram  # noqa: E402


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
    lowest, mean = (line.get_xdata()[0] for line in axes.lines)
    assert lowest == pytest.approx(min(cosines), abs=1e-6)
    assert mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), math.nan)])
def test_plot_density_without_cosines_says_so(gram):
    axes = plot_density(gram).axes[0]
    assert not axes.patches
    assert "zero or not finite" in axes.texts[0].get_text()


@pytest.mark.parametrize("plot", [plot_gram, plot_density])
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


@pytest.mark.parametrize("plot", [plot_gram, plot_density])
def test_without_matplotlib_the_error_says_how_to_get_it(plot, monkeypatch):
    import_module = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return import_module(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "lightning_gradconf\[plots\]"'):
        plot(draw_gram(3))
