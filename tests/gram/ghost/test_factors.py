"""Factors of gradients: every form of their Gram, sums, and units of several passes, against formed gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradconf.gram.ghost import contraction, convolution, factors
from lightning_gradconf.gram.ghost.contraction import Workspace
from lightning_gradconf.gram.ghost.convolution import ConvolutionFactors
from lightning_gradconf.gram.ghost.factor_tensors import joined, of_units
from lightning_gradconf.gram.ghost.factors import (
    Dense,
    GradientFactors,
    IndexedRows,
    Multiples,
    OuterProducts,
    gram_of_sum,
    materialize,
)  # fmt: skip


def check_what_all_factors_do(part: GradientFactors, gradients: Tensor) -> None:
    """Compare with formed gradients ``(n, numel)``."""
    n = len(gradients)
    weights = torch.linspace(-1, 2, n).double()
    torch.testing.assert_close(materialize(part), gradients)
    torch.testing.assert_close(part.weighted(weights), weights @ gradients)
    assert (part.n, part.numel) == gradients.shape
    torch.testing.assert_close(materialize(of_units(part, torch.tensor([1]))), gradients[1:2])
    order = torch.arange(n).flip(0)
    torch.testing.assert_close(materialize(of_units(part, order)), gradients.flip(0))
    groups = [[of_units(part, torch.arange(*some))] for some in ((0, 1), (1, n))]
    torch.testing.assert_close(materialize(*joined(groups)), gradients)


def test_multiples_of_one_direction():
    part = Multiples(torch.tensor([1.0, -2.0, 0.5]).double(), torch.randn(6).double())
    gradients = part.coefficients.outer(part.direction)
    weights = torch.linspace(-1, 2, 3).double()
    torch.testing.assert_close(materialize(part), gradients)
    torch.testing.assert_close(part.weighted(weights), weights @ gradients)
    torch.testing.assert_close(materialize(of_units(part, torch.tensor([1]))), gradients[1:2])
    torch.testing.assert_close(part.gram(Workspace()), gradients @ gradients.T)
    rows = OuterProducts(torch.randn(1, 3, 4, 2).double(), torch.randn(1, 3, 4, 3).double())
    for parts in ([part, rows], [rows, part, part], [part, part]):
        formed = materialize(*parts)
        torch.testing.assert_close(gram_of_sum(parts, Workspace()), formed @ formed.T)


def test_groups_whose_factors_differ_are_joined_as_gradients():
    rows = OuterProducts(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5))
    dense = Dense(torch.randn(3, 20))
    (both,) = joined([[rows], [dense]])
    torch.testing.assert_close(materialize(both), torch.cat([materialize(rows), dense.gradients]))


def test_groups_of_sequences_of_different_lengths_are_joined_with_zeros():
    parts = [OuterProducts(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 5)) for length in (3, 7)]
    (both,) = joined([[part] for part in parts])
    assert isinstance(both, OuterProducts)
    torch.testing.assert_close(materialize(both), torch.cat([materialize(part) for part in parts]))


def test_the_gram_of_a_sum_of_different_factors():
    parts = [
        IndexedRows(torch.randint(6, (3, 4)), torch.randn(3, 4, 5).double(), 6),
        OuterProducts(torch.randn(1, 3, 2, 6).double(), torch.randn(1, 3, 2, 5).double()),
        Dense(torch.randn(3, 30).double()),
    ]
    gradients = materialize(*parts)
    torch.testing.assert_close(gradients, sum(materialize(part) for part in parts))
    for some in (parts, parts[:2], [parts[1], parts[1]]):
        formed = materialize(*some)
        torch.testing.assert_close(gram_of_sum(some, Workspace()), formed @ formed.T)


@given(
    dims=st.integers(1, 3),
    geometry=st.tuples(*[st.integers(1, 3)] * 2, st.integers(0, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
    samples=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_form_of_every_convolution(dims, geometry, groups, transposed, samples, seed):
    torch.manual_seed(seed)
    kernel, stride, padding, dilation = geometry
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    layer = kind(4, 8, kernel, stride, padding, groups=groups, dilation=dilation).double()
    x = torch.randn(3 * samples, 4, *([6, 5, 5][:dims]), dtype=torch.float64)
    weight, forms = layer.weight, []
    out = layer(x)
    if out.numel() == 0:
        return
    delta = torch.randn_like(out)
    want = [
        torch.autograd.grad(layer(a), weight, d)[0].flatten()
        for a, d in zip(x.split(samples), delta.split(samples), strict=True)
    ]
    gram = torch.stack(want) @ torch.stack(want).T
    spatial = [[value] * dims for value in (stride, padding, dilation)]
    part = ConvolutionFactors(x, delta, weight.detach(), 3, *spatial, transposed, [0] * dims, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "cheapest", lambda workspace, key, forms_: forms.append(forms_) or gram)
        part.gram(Workspace())
    assert set(forms[0]) >= {"unit"} | ({"taps", "shifted", "folded"} if groups == 1 and not transposed else set())
    for name, (_, form) in forms[0].items():
        got = contraction.completed(form())
        torch.testing.assert_close(got, gram, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    check_what_all_factors_do(part, torch.stack(want))


@pytest.mark.parametrize("form", ["block", "_folded"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_blocks_of_a_grouped_convolution_end_anywhere_in_a_group(form, rows, monkeypatch):
    x, delta = (torch.randn(3, channels, 5).double() for channels in (4, 8))
    part = ConvolutionFactors(x, delta, torch.empty(8, 2, 3), 3, [1], [1], [1], False, [0], 2)
    gradients = materialize(part)
    monkeypatch.setattr(contraction, "BLOCK", 3 * part.numel * rows // part.major)
    got = contraction.completed(part._blocks(getattr(part, form)))
    torch.testing.assert_close(got, gradients @ gradients.T)


@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_both_forms_of_outer_products(groups, n, rows, p, q):
    part = OuterProducts(torch.randn(groups, n, rows, p).double(), torch.randn(groups, n, rows, q).double())
    gradients = torch.einsum("gnrp,gnrq->ngpq", part.left, part.right).flatten(1)
    want = gradients @ gradients.T
    torch.testing.assert_close(contraction.completed(part._pairs(Workspace())), want)
    torch.testing.assert_close(gram_of_sum([part], Workspace()), want)
    check_what_all_factors_do(part, gradients)


@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_both_forms_of_indexed_rows(n, rows, words, q, seed):
    torch.manual_seed(seed)
    part = IndexedRows(torch.randint(words, (n, rows)), torch.randn(n, rows, q).double(), words)
    table = torch.zeros(n, words, q).double()
    for unit in range(n):
        for row in range(rows):
            table[unit, part.index[unit, row]] += part.values[unit, row]
    want = table.flatten(1) @ table.flatten(1).T
    check_what_all_factors_do(part, table.flatten(1))
    torch.testing.assert_close(part.gram(Workspace()), want)
    with pytest.MonkeyPatch.context() as patch:  # the way for words that most units share
        patch.setattr(factors, "BLOCK", n * words)  # a few columns at a time
        patch.setattr(IndexedRows, "_is_sparse", lambda *_: False)
        torch.testing.assert_close(part.gram(Workspace()), want)
        patch.setattr(IndexedRows, "_is_sparse", lambda *_: True)
        torch.testing.assert_close(part.gram(Workspace()), want)


class Clock:
    """Forms whose parts take given times on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ran = 0.0, list[str]()
        monkeypatch.setattr(contraction.time, "perf_counter", lambda: self.now)

    def form(
        self, name: str, *attempts: list[float], result: float = 1.0
    ) -> tuple[float, Callable[[], contraction.Form]]:
        left = list(attempts)

        def parts() -> contraction.Form:
            times = left.pop(0)
            for i, seconds in enumerate(times):
                self.now += seconds
                self.ran.append(name)
                yield (i + 1) / len(times)
            return torch.full((2, 2), result)

        return 1e9, parts


def test_each_measurement_tries_one_form_more(monkeypatch):
    """A form is completed once it is begun if its second part, in memory that is not new, promises to be faster.

    Then it is compared with the form that was used before.
    """
    clock, workspace = Clock(monkeypatch), Workspace()
    forms = {
        "usual": clock.form("usual", *[[0.4, 0.2, 0.2]] * 4),
        "slow": clock.form("slow", [0.3, 0.3, 0.3]),
        "fast": clock.form("fast", [0.5, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]),
    }
    ran = []
    for tries in (False, False, True, True, True):
        workspace.tries = tries
        del clock.ran[:]
        contraction.cheapest(workspace, "shape", forms)
        ran.append(clock.ran[:])
    usual, fast = ["usual"] * 3, ["fast"] * 4
    assert ran == [usual, usual, ["slow"] * 2 + usual, fast + usual, fast]


def test_a_form_that_is_wrong_is_left(monkeypatch, caplog):
    clock, workspace = Clock(monkeypatch), Workspace()
    forms = {
        "usual": clock.form("usual", *[[0.2, 0.2]] * 4),
        "wrong": clock.form("wrong", [0.1, 0.1], result=1.01),
    }
    for workspace.tries in (False, True, True, True):
        gram = contraction.cheapest(workspace, "shape", forms)
        assert float(gram[0, 0]) == 1
    (record,) = caplog.records
    assert "'wrong' of a contraction is wrong" in record.getMessage()


@pytest.mark.parametrize("scale", [1.0, 1e-42])
def test_forms_may_keep_different_roundings_of_next_to_nothing(scale):
    """Of a unit whose gradient is the rounding of a zero, and of squares that float32 can hardly hold."""
    exact = scale * torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert contraction._agree(exact + scale * torch.tensor([[1e-3, 0], [0, 0]]), exact) == (scale < 1)
    assert contraction._agree(exact + scale * torch.tensor([[0, 1e-8], [1e-8, 1e-8]]), exact)


def test_a_form_of_one_part_is_begun_again_if_it_may_have_been_slow_as_it_was_new(monkeypatch):
    clock, workspace = Clock(monkeypatch), Workspace()
    forms = {
        "usual": clock.form("usual", [0.004], [0.004], [0.004]),
        "slow": clock.form("slow", [0.5]),
        "new": clock.form("new", [0.012], [0.001], [0.001]),
    }
    for workspace.tries in (False, True, True, True):
        contraction.cheapest(workspace, "shape", forms)
    assert clock.ran == ["usual", "slow", "usual", "new", "new", "usual", "new"]


def test_what_has_many_more_operations_or_is_small_is_not_tried(monkeypatch):
    clock, workspace = Clock(monkeypatch), Workspace(tries=True)
    times = [[1.0]] * 3
    _, many = clock.form("many", *times)
    _, few = clock.form("few", *times)
    for _ in range(3):
        contraction.cheapest(workspace, "large", {"many": (5e9, many), "few": (1e9, few)})
        contraction.cheapest(workspace, "small", {"few": (9e5, iter_of_one), "many": (9e5, many)})
    assert clock.ran == ["few"] * 3


def iter_of_one() -> contraction.Form:
    """A form of one part that takes no time."""
    yield 1.0
    return torch.zeros(2, 2)
