import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradconf import statistics
from lightning_gradconf.statistics import cosine_matrix, gradient_statistics, pairwise_cosines, statistic_names

DEFAULT = ("eta", "min_cosine", "p05_cosine", "mean_cosine", "negative_fraction", "gradient_norm")
FURTHER = (
    *("min_inner_product", "median_cosine", "std_cosine", "gradient_diversity", "coherence"),
    *("noise_scale", "normalized_variance", "gradient_disparity", "participation_ratio"),
)
BY_CLASS = ("within_class_cosine", "between_class_cosine")
COSINES = ("min_cosine", "p05_cosine", "mean_cosine", "negative_fraction", "median_cosine", "std_cosine", *BY_CLASS)
RATIOS = ("gradient_diversity", "coherence", "noise_scale", "normalized_variance", "participation_ratio")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
properties = settings(deadline=None, max_examples=60, database=None)


# The oracle: loops over vectors in Python floats, which are float64.


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a):
    return math.sqrt(dot(a, a))


def mean(values):
    return sum(values) / len(values) if values else math.nan


def quantile(values, q):
    if not values:
        return math.nan
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return below + (above - below) * (position - math.floor(position))


def ratio(a, b):
    return a / b if b else (math.nan if a == 0 else math.copysign(math.inf, a))


def oracle(vectors, labels, unit_size):
    vectors = [[float(x) for x in vector] for vector in vectors]
    n = len(vectors)
    pairs = list(itertools.combinations(range(n), 2))
    products = [dot(vectors[i], vectors[j]) for i, j in pairs]
    cosines, classes = [], {}  # classes: the cosines between two classes, or within one
    for i, j in pairs:
        if norm(vectors[i]) and norm(vectors[j]):
            cosine = dot(vectors[i], vectors[j]) / norm(vectors[i]) / norm(vectors[j])
            cosines.append(cosine)
            classes.setdefault(frozenset((labels[i], labels[j])), []).append(cosine)
    squares = [dot(vector, vector) for vector in vectors]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    frobenius = sum(dot(a, b) ** 2 for a in vectors for b in vectors)
    return {
        "eta": max(0.0, -min(products)),
        "min_cosine": min(cosines, default=math.nan),
        "p05_cosine": quantile(cosines, 0.05),
        "mean_cosine": mean(cosines),
        "negative_fraction": mean([float(cosine < 0) for cosine in cosines]),
        "gradient_norm": mean([norm(vector) for vector in vectors]),
        "min_inner_product": min(products),
        "median_cosine": quantile(cosines, 0.5),
        "std_cosine": math.sqrt(mean([(cosine - mean(cosines)) ** 2 for cosine in cosines])) if cosines else math.nan,
        "gradient_diversity": ratio(sum(squares), dot(total, total)),
        "coherence": ratio(dot(total, total), sum(squares)),
        "noise_scale": ratio(unit_size * (mean(squares) - mean(products)), mean(products)),
        "normalized_variance": ratio(mean(squares) - mean(products), mean(squares)),
        "gradient_disparity": mean(
            [norm([x - y for x, y in zip(vectors[i], vectors[j], strict=True)]) for i, j in pairs]
        ),
        "participation_ratio": ratio(sum(squares) ** 2, frobenius),
        "within_class_cosine": mean([mean(values) for pair, values in classes.items() if len(pair) == 1]),
        "between_class_cosine": mean([mean(values) for pair, values in classes.items() if len(pair) == 2]),
    }


def as_floats(values):
    return {name: value.item() for name, value in values.items()}


def assert_statistics(actual, expected, *, rtol, atol):
    """Every statistic, by name, so that a failure says which."""
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=rtol, abs=atol, nan_ok=True), name


def draw_gradients(n, p, seed=0, zero=()):
    vectors = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[list(zero)] = 0
    return vectors


@st.composite
def gradients(draw, zeros=True):
    n, p = draw(st.integers(2, 7)), draw(st.integers(1, 9))
    zero = draw(st.lists(st.integers(0, n - 1), max_size=2, unique=True)) if zeros else ()
    return draw_gradients(n, p, draw(st.integers(0, 2**32 - 1)), zero)


# Against the oracle


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-10, 1e-12), (torch.float32, 1e-4, 1e-5)])
@pytest.mark.parametrize(
    ("n", "p", "zero"), [(2, 3, ()), (3, 1, ()), (5, 40, ()), (22, 7, (3,)), (24, 50, ()), (4, 6, (0, 3))]
)
def test_every_statistic_equals_loops_over_vectors(n, p, zero, dtype, rtol, atol, device):
    vectors = draw_gradients(n, p, seed=n, zero=zero)
    labels = torch.arange(n) % 3
    gram = (vectors @ vectors.T).to(device, dtype)

    actual = gradient_statistics(gram, "all", labels=labels, unit_size=7)

    assert tuple(actual) == (*DEFAULT, *FURTHER, *BY_CLASS)
    assert all(value.shape == () and value.dtype == dtype and value.device == gram.device for value in actual.values())
    expected = oracle(vectors.tolist(), labels.tolist(), unit_size=7)
    assert_statistics(as_floats(actual), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("norms", [(1e-20, 1e-20, 1e-20, 1e-20), (1e19, 1e19, 1e19, 1e19), (1e-18, 1.0, 1e5, 1e18)])
def test_norms_near_the_limits_of_float32(norms):
    directions = torch.nn.functional.normalize(draw_gradients(4, 3, seed=1))
    vectors = directions * torch.tensor(norms, dtype=torch.float64)[:, None]
    expected = oracle(vectors.tolist(), [0, 0, 1, 1], unit_size=1)

    actual = gradient_statistics((vectors @ vectors.T).float(), "all", labels=torch.tensor([0, 0, 1, 1]))

    # The squares of norms of 1e-20 are denormal, with 5 digits.
    assert_statistics(as_floats(actual), expected, rtol=3e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("degrees", [0, 60, 90, 120, 180])
def test_two_gradients_at_a_known_angle(degrees, dtype):
    angle = math.radians(degrees)
    vectors = torch.tensor([[2.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]], dtype=torch.float64)
    gram = (vectors @ vectors.T).to(dtype)

    actual = as_floats(gradient_statistics(gram, "all"))

    cosine, close = round(math.cos(angle), 9), {"rel": 1e-5, "abs": 1e-5}
    for name in ("min_cosine", "p05_cosine", "mean_cosine", "median_cosine"):
        assert actual[name] == pytest.approx(cosine, **close)
    assert actual["eta"] == pytest.approx(max(0.0, -6 * cosine), **close)
    assert actual["min_inner_product"] == pytest.approx(6 * cosine, **close)
    if degrees != 90:
        assert actual["negative_fraction"] == float(degrees > 90)
    assert actual["gradient_norm"] == pytest.approx(2.5, **close)
    assert actual["gradient_disparity"] == pytest.approx(math.sqrt(13 - 12 * cosine), **close)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_simplex_has_the_lowest_mean_cosine(n):
    vectors = torch.eye(n, dtype=torch.float64) - 1 / n  # cosines -1/(n-1), sum 0, rank n-1
    actual = as_floats(gradient_statistics(vectors @ vectors.T, "all"))
    for name in ("min_cosine", "p05_cosine", "mean_cosine", "median_cosine"):
        assert actual[name] == pytest.approx(-1 / (n - 1))
    assert actual["negative_fraction"] == 1
    assert actual["coherence"] == pytest.approx(0, abs=1e-12)
    assert actual["gradient_diversity"] > 1e12
    assert actual["normalized_variance"] == pytest.approx(n / (n - 1))
    assert actual["participation_ratio"] == pytest.approx(n - 1)


def test_equal_and_orthogonal_gradients():
    equal = as_floats(gradient_statistics(torch.full((4, 4), 9.0), "all"))
    assert_statistics(
        equal,
        {
            "coherence": 4,
            "gradient_diversity": 0.25,
            "participation_ratio": 1,
            "noise_scale": 0,
            "normalized_variance": 0,
        }
        | {"eta": 0, "min_cosine": 1, "negative_fraction": 0, "gradient_norm": 3, "gradient_disparity": 0},
        rtol=0,
        atol=0,
    )
    orthogonal = as_floats(gradient_statistics(9 * torch.eye(4), "all"))
    assert_statistics(
        orthogonal,
        {"coherence": 1, "gradient_diversity": 1, "participation_ratio": 4, "noise_scale": math.inf}
        | {"normalized_variance": 1, "min_cosine": 0, "negative_fraction": 0, "gradient_norm": 3},
        rtol=0,
        atol=0,
    )


def test_cancelling_gradients_have_infinite_diversity():
    gram = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
    assert statistics.gradient_diversity(gram) == math.inf
    assert statistics.coherence(gram) == 0
    assert statistics.noise_scale(gram) == -2  # no mean gradient is left to compare the noise with


@pytest.mark.parametrize("unit_size", [1, 2])
def test_noise_scale_has_unbiased_parts(unit_size):
    # A population of four gradients around (3, 1, 0): |G|^2 = 10 and the trace of the covariance is (16 + 4) / 2 = 10.
    population = torch.tensor([[7.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [3.0, 3.0, 0.0], [3.0, -1.0, 0.0]]).double()
    signals, noises = [], []
    for draws in itertools.product(range(4), repeat=2 * unit_size):  # all samples of two units, equally probable
        units = population[list(draws)].reshape(2, unit_size, 3).mean(1)
        gram = units @ units.T
        scale = statistics.noise_scale(gram, unit_size=unit_size)
        # scale = unit_size (m - o) / o with m the mean of the diagonal: solved for o.
        signal = gram.diagonal().mean() / (1 + scale / unit_size)
        signals.append(signal if scale.isfinite() else torch.zeros_like(signal))
        noises.append(unit_size * (gram.diagonal().mean() - signals[-1]))
    torch.testing.assert_close(torch.stack(signals).mean().item(), 10.0, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.stack(noises).mean().item(), 10.0, rtol=1e-9, atol=0)


# Worked out by hand

# Units 0 to 2 are of class 7, 3 and 4 of class 2, 5 of class 4: three pairs within 7, one within 2, none within 4;
# six between 7 and 2, three between 7 and 4, two between 2 and 4.
UNEQUAL = torch.tensor([7, 7, 7, 2, 2, 4])
UNEQUAL_COSINES = [
    [1.0, 0.6, 0.3, -0.1, -0.2, 0.5],
    [0.6, 1.0, 0.0, -0.3, 0.0, 0.1],
    [0.3, 0.0, 1.0, 0.2, -0.2, 0.0],
    [-0.1, -0.3, 0.2, 1.0, 0.9, -0.8],
    [-0.2, 0.0, -0.2, 0.9, 1.0, -0.4],
    [0.5, 0.1, 0.0, -0.8, -0.4, 1.0],
]


def test_every_class_counts_the_same_however_large():
    gram = torch.tensor(UNEQUAL_COSINES, dtype=torch.float64)
    # Within 7: (0.6 + 0.3 + 0.0) / 3 = 0.3; within 2: 0.9. Over pairs it would be 1.8 / 4 = 0.45.
    assert statistics.within_class_cosine(gram, UNEQUAL).item() == pytest.approx((0.3 + 0.9) / 2)
    # 7 and 2: (-0.1 - 0.2 - 0.3 + 0.0 + 0.2 - 0.2) / 6 = -0.1; 7 and 4: 0.6 / 3 = 0.2; 2 and 4: -1.2 / 2 = -0.6.
    # Over pairs it would be -1.2 / 11.
    assert statistics.between_class_cosine(gram, UNEQUAL).item() == pytest.approx((-0.1 + 0.2 - 0.6) / 3)


def test_zero_gradients_are_in_no_class():
    gram = torch.tensor(UNEQUAL_COSINES, dtype=torch.float64)
    gram[[0, 4]] = gram[:, [0, 4]] = 0  # leaves 1, 2 of class 7, 3 of 2 and 5 of 4
    assert statistics.within_class_cosine(gram, UNEQUAL).item() == pytest.approx(0.0)
    expected = ((-0.3 + 0.2) / 2 + (0.1 + 0.0) / 2 - 0.8) / 3
    assert statistics.between_class_cosine(gram, UNEQUAL).item() == pytest.approx(expected)


def test_the_spread_of_cosines():
    gram = torch.eye(3, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 0.6  # cosines 0.6, 0, 0: mean 0.2, squares of deviations 0.16, 0.04, 0.04
    assert statistics.std_cosine(gram).item() == pytest.approx(math.sqrt(0.24 / 3))
    assert statistics.std_cosine(gram[:2, :2]) == 0, "a single pair"


def test_the_participation_ratio_of_two_lengths():
    # Eigenvalues 3 and 1: (3 + 1)^2 / (9 + 1).
    assert statistics.participation_ratio(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(1.6)


# Algebraic properties


@properties
@given(gradients(), st.randoms(use_true_random=False))
def test_the_order_of_units_does_not_matter(vectors, random):
    order = list(range(len(vectors)))
    random.shuffle(order)
    labels = torch.arange(len(vectors)) % 2
    gram = vectors @ vectors.T
    expected = gradient_statistics(gram, "all", labels=labels)
    actual = gradient_statistics(gram[order][:, order], "all", labels=labels[order])
    assert_statistics(as_floats(actual), as_floats(expected), rtol=1e-7, atol=1e-10)


@properties
@given(gradients(zeros=False), st.integers(0, 2**32 - 1))
def test_a_rotation_of_parameters_does_not_matter(vectors, seed):
    p = vectors.shape[1]
    rotation = torch.linalg.qr(draw_gradients(p, p, seed)).Q
    rotated = vectors @ rotation
    expected = gradient_statistics(vectors @ vectors.T, "all")
    actual = gradient_statistics(rotated @ rotated.T, "all")
    assert_statistics(as_floats(actual), as_floats(expected), rtol=1e-6, atol=1e-7)


@properties
@given(gradients(), st.lists(st.floats(1e-3, 1e3), min_size=7, max_size=7))
def test_cosines_do_not_depend_on_norms(vectors, factors):
    scaled = vectors * torch.tensor(factors, dtype=torch.float64)[: len(vectors), None]
    labels = torch.arange(len(vectors)) % 2
    expected = gradient_statistics(vectors @ vectors.T, COSINES, labels=labels)
    actual = gradient_statistics(scaled @ scaled.T, COSINES, labels=labels)
    assert_statistics(as_floats(actual), as_floats(expected), rtol=1e-9, atol=1e-12)


@properties
@given(gradients(), st.floats(1e-3, 1e3))
def test_how_statistics_scale_with_the_loss(vectors, factor):
    gram = vectors @ vectors.T
    before = as_floats(gradient_statistics(gram, "all"))
    after = as_floats(gradient_statistics(factor**2 * gram, "all"))
    expected = {name: before[name] for name in RATIOS}
    expected |= {name: factor * before[name] for name in ("gradient_norm", "gradient_disparity")}
    expected |= {name: factor**2 * before[name] for name in ("eta", "min_inner_product")}
    assert_statistics(after, expected, rtol=1e-6, atol=1e-12)


@properties
@given(gradients(), st.sampled_from([torch.float32, torch.float64]))
def test_ranges(vectors, dtype):
    n, labels = len(vectors), torch.arange(len(vectors)) % 2
    values = as_floats(gradient_statistics((vectors @ vectors.T).to(dtype), "all", labels=labels))
    rounding = 1e-4 if dtype == torch.float32 else 1e-9
    for name, value in values.items():
        if math.isnan(value):
            continue
        if name == "negative_fraction":
            assert 0 <= value <= 1
        elif name.endswith("cosine"):
            assert -1 <= value <= 1, name
        elif name in ("eta", "gradient_norm", "gradient_disparity", "gradient_diversity"):
            assert value >= 0, name
        elif name == "coherence":
            assert 0 <= value <= n * (1 + rounding)
        elif name == "normalized_variance":
            assert -rounding <= value <= n / (n - 1) * (1 + rounding)
        elif name == "participation_ratio":
            assert 1 <= value <= n
    ordered = [values[name] for name in ("min_cosine", "p05_cosine", "median_cosine")]
    assert any(map(math.isnan, ordered)) or ordered == sorted(ordered)
    assert values["eta"] == max(0, -values["min_inner_product"])


@properties
@given(gradients())
def test_coherence_is_the_reciprocal_of_diversity(vectors):
    gram = vectors @ vectors.T
    product = statistics.coherence(gram) * statistics.gradient_diversity(gram)
    assert gram.count_nonzero() == 0 or product == pytest.approx(1)


# Zero, and not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_have_products_but_no_cosines(dtype):
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=dtype)
    gram = vectors @ vectors.T
    actual = as_floats(gradient_statistics(gram, "all"))
    for name in ("min_cosine", "p05_cosine", "mean_cosine", "median_cosine"):
        assert actual[name] == pytest.approx(math.sqrt(0.5))
    assert actual["negative_fraction"] == 0
    assert actual["min_inner_product"] == 0
    assert actual["gradient_norm"] == pytest.approx((1 + math.sqrt(2)) / 3)

    nan, half = math.nan, math.sqrt(0.5)
    expected = torch.tensor([[1.0, nan, half], [nan, nan, nan], [half, nan, 1.0]], dtype=dtype)
    torch.testing.assert_close(cosine_matrix(gram), expected, equal_nan=True)
    torch.testing.assert_close(pairwise_cosines(gram), expected[:1, 2])


def test_one_direction_alone_has_no_cosines():
    actual = as_floats(gradient_statistics(torch.diag(torch.tensor([0.0, 4.0, 0.0])), "all", labels=torch.zeros(3)))
    for name in COSINES:
        assert math.isnan(actual[name]), name
    assert actual["eta"] == 0
    assert actual["gradient_norm"] == pytest.approx(2 / 3)
    assert actual["gradient_disparity"] == pytest.approx(4 / 3)
    assert actual["participation_ratio"] == 1


def test_all_zero_gradients():
    actual = as_floats(gradient_statistics(torch.zeros(3, 3), "all"))
    for name in ("eta", "min_inner_product", "gradient_norm", "gradient_disparity"):
        assert actual.pop(name) == 0, name
    assert all(map(math.isnan, actual.values()))
    assert pairwise_cosines(torch.zeros(3, 3)).shape == (0,)


def test_rounding_may_make_a_zero_gradient_slightly_negative():
    gram = torch.tensor([[1.0, 1e-9, 0.5], [1e-9, -1e-9, 1e-9], [0.5, 1e-9, 1.0]])
    assert pairwise_cosines(gram).tolist() == [0.5]
    assert statistics.gradient_norm(gram) == pytest.approx(2 / 3)


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0), (0, 2), (2, 0)])
def test_an_entry_that_is_not_finite_makes_every_statistic_nan(entry, where):
    gram = torch.eye(4)
    gram[where] = entry
    values = gradient_statistics(gram, "all", labels=torch.tensor([0, 0, 1, 1]))
    assert len(values) == 17
    for name, value in values.items():
        assert value.isnan(), name
    assert cosine_matrix(gram).isnan().all()
    assert pairwise_cosines(gram).shape == (0,)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_eta_is_never_minus_zero(zero):
    value = statistics.eta(torch.tensor([[1.0, zero], [zero, 1.0]]))
    assert value == 0
    assert not value.signbit()


def test_rounding_may_make_a_distance_slightly_negative():
    assert statistics.gradient_disparity(torch.tensor([[1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]])) == 0


def test_cosines_are_clamped():
    gram = torch.tensor([[1.0, 1.0 + 1e-6, -1.0 - 1e-6], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert cosine_matrix(gram)[0].tolist() == [1, 1, -1]


# Shapes, dtypes, sizes


def test_pairwise_cosines_are_row_by_row():
    gram = torch.tensor([[1.0, 0.1, 0.2, 0.3], [0.1, 1.0, 0.4, 0.5], [0.2, 0.4, 1.0, 0.6], [0.3, 0.5, 0.6, 1.0]])
    torch.testing.assert_close(pairwise_cosines(gram), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))


@given(st.integers(0, 2**32 - 1))
@properties
def test_cosine_matrix_is_symmetric_with_unit_diagonal(seed):
    vectors = draw_gradients(6, 4, seed).float()
    gram = vectors @ vectors.T
    cosines = cosine_matrix((gram + gram.T) / 2)
    assert torch.equal(cosines, cosines.T)
    assert torch.equal(cosines.diagonal(), torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    gram = torch.tensor([[250.0, -1.0], [-1.0, 500.0]], dtype=dtype)  # the squares overflow float16
    values = gradient_statistics(gram, "all")
    expected = gradient_statistics(gram.float(), "all")
    for name, value in values.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert cosine_matrix(gram).dtype == torch.float32


def test_quantiles_of_more_pairs_than_torch_quantile_takes():
    vectors = draw_gradients(6000, 3).float()
    gram = vectors @ vectors.T
    cosines = pairwise_cosines(gram)
    assert len(cosines) == 6000 * 5999 // 2 > 2**24
    expected = np.quantile(cosines.numpy(), [0.05, 0.5])
    assert statistics.p05_cosine(gram).item() == pytest.approx(expected[0], rel=1e-6)
    assert statistics.median_cosine(gram).item() == pytest.approx(expected[1], rel=1e-6, abs=1e-7)


def test_the_gram_is_not_changed():
    gram = torch.tensor([[1.0, -2.0], [-2.0, 16.0]])
    before = gram.clone()
    gradient_statistics(gram, "all", labels=torch.tensor([0, 1]))
    cosine_matrix(gram), pairwise_cosines(gram)
    assert torch.equal(gram, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_statistics_do_not_wait_for_the_gpu():
    gram, labels = torch.eye(5, device="cuda"), torch.arange(5, device="cuda")
    gradient_statistics(gram, "all", labels=labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient_statistics(gram, "all", labels=labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Names, labels, errors


def test_names():
    assert statistic_names() == statistic_names("default") == DEFAULT
    assert statistic_names("all") == (*DEFAULT, *FURTHER)
    assert statistic_names("all", with_labels=True) == (*DEFAULT, *FURTHER, *BY_CLASS)
    assert statistic_names(["coherence", "eta"]) == ("coherence", "eta")
    assert tuple(gradient_statistics(torch.eye(2))) == DEFAULT
    assert tuple(gradient_statistics(torch.eye(2), ["coherence", "eta"])) == ("coherence", "eta")
    assert tuple(gradient_statistics(torch.eye(2), "eta")) == ("eta",)


def test_every_name_is_a_public_function_of_the_same_value():
    vectors, labels = draw_gradients(5, 4), torch.tensor([0, 1, 0, 1, 2])
    gram = vectors @ vectors.T
    for name, value in gradient_statistics(gram, "all", labels=labels).items():
        arguments = (gram, labels) if name in BY_CLASS else (gram,)
        torch.testing.assert_close(getattr(statistics, name)(*arguments), value, rtol=0, atol=0)


def test_classes_without_a_pair():
    gram = torch.full((3, 3), 1.0)
    assert statistics.within_class_cosine(gram, torch.tensor([0, 1, 2])).isnan()
    assert statistics.between_class_cosine(gram, torch.tensor([1, 1, 1])).isnan()


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"no statistic \['etta'\].*eta.*participation_ratio.*between_class_cosine"):
        gradient_statistics(torch.eye(2), ["eta", "etta"])


@pytest.mark.parametrize("name", BY_CLASS)
def test_statistics_of_classes_need_labels(name):
    with pytest.raises(ValueError, match=r"there are no labels: pass labels of shape \(n,\)"):
        gradient_statistics(torch.eye(2), ["eta", name])


@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(3, 1), torch.tensor(0)])
@pytest.mark.parametrize("name", BY_CLASS)
def test_labels_of_another_shape(name, labels):
    with pytest.raises(ValueError, match=r"pass labels of shape \(3,\)"):
        gradient_statistics(torch.eye(3), [name], labels=labels)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1), (0, 0), (2, 2, 2)])
@pytest.mark.parametrize("function", [statistics.eta, statistics.participation_ratio, cosine_matrix, pairwise_cosines])
def test_a_gram_of_another_shape(function, shape):
    with pytest.raises(ValueError, match=r"shape \(n, n\), n >= 2.*gradients @ gradients.T"):
        function(torch.zeros(shape))


@pytest.mark.parametrize(
    ("gram", "found"), [(torch.eye(2, dtype=torch.long), "torch.int64"), (np.eye(2), "ndarray"), ([[1.0]], "list")]
)
def test_a_gram_that_is_not_a_floating_tensor(gram, found):
    with pytest.raises(TypeError, match=f"{found}.*torch.as_tensor"):
        gradient_statistics(gram)


@pytest.mark.parametrize("unit_size", [0, -1])
def test_a_unit_has_a_sample(unit_size):
    with pytest.raises(ValueError, match="at least one sample"):
        statistics.noise_scale(torch.eye(2), unit_size=unit_size)
