"""Every engine equals plain autograd in four measurements of each case of the zoo, or says why it cannot measure it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gram.oracle import Grams, Messages, error, expected, measure
from gram.zoo import SINGLE, ZOO, Case, cast
from gram.zoo.engines import NOT_YET, VMAP_CANNOT, expected_engine
from torch import nn

from lightning_gradconf.gram import select

UNIT_SIZES = (1, 2, 3)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),  # PyTorch, of a list of slices
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop:UserWarning"
    ),  # vmap, of an operation without a rule
    pytest.mark.filterwarnings("ignore:.*torch.func is not used for:UserWarning"),  # asserted where it belongs
]


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package says while a test runs."""
    log, handler = logging.getLogger("lightning_gradconf"), Messages()
    select._say_once.cache_clear()
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield handler.said
    log.removeHandler(handler)
    log.setLevel(before)


def tolerance(name: str) -> float:
    """Return the error that rounding allows, in units of the norms of two gradients."""
    return 1e-5 if name in SINGLE else 1e-8


def params() -> list[Any]:
    """Return every case at every unit size; what is promised and not there yet has to fail."""
    return [
        pytest.param(name, k, marks=pytest.mark.xfail(strict=True) if k in NOT_YET.get(name, ()) else ())
        for name in ZOO
        for k in UNIT_SIZES
    ]


@pytest.mark.parametrize(("name", "unit_size"), params())
def test_auto_is_right_and_takes_the_engine_of_the_table(name: str, unit_size: int, messages: list[str]) -> None:
    case = ZOO[name]()

    def measured(measurement: int, batch: Any, want: Grams) -> None:
        wanted, reason = expected_engine(name, unit_size, measurement)
        got, engine = measure(case.module, case.loss_fn, batch, unit_size)
        assert error(got, want) < tolerance(name), f"measurement {measurement} by {engine}"
        assert engine == wanted, f"measurement {measurement}: {messages}"
        if wanted == "ghost":
            assert not messages
        else:
            assert_said(messages, reason)

    expected(case, unit_size, measured)


def assert_said(messages: list[str], reason: str) -> None:
    """Check that a reason was among what was said."""
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(" ".join(messages))


@pytest.mark.parametrize(("name", "unit_size"), params())
def test_ghost_is_right_or_refuses(name: str, unit_size: int) -> None:
    case = ZOO[name]()

    def measured(measurement: int, batch: Any, want: Grams) -> None:
        wanted, reason = expected_engine(name, unit_size, measurement)
        if wanted != "ghost":
            with pytest.raises(Exception, match=reason):
                measure(case.module, case.loss_fn, batch, unit_size, "ghost")
            return
        got, _ = measure(case.module, case.loss_fn, batch, unit_size, "ghost")
        assert error(got, want) < tolerance(name), f"measurement {measurement}"

    expected(case, unit_size, measured)


@pytest.mark.parametrize("unit_size", UNIT_SIZES)
@pytest.mark.parametrize("name", ZOO)
def test_loop_is_right(name: str, unit_size: int) -> None:
    case = ZOO[name]()

    def measured(measurement: int, batch: Any, want: Grams) -> None:
        got, _ = measure(case.module, case.loss_fn, batch, unit_size, "loop")
        assert error(got, want) < tolerance(name), f"measurement {measurement}"

    expected(case, unit_size, measured)


@pytest.mark.parametrize("name", ZOO)
def test_vmap_is_right_or_refuses(name: str) -> None:
    refused = 0
    for unit_size in UNIT_SIZES:
        case = ZOO[name]()

        def measured(measurement: int, batch: Any, want: Grams, case: Case = case, unit_size: int = unit_size) -> None:
            nonlocal refused
            try:
                got, _ = measure(case.module, case.loss_fn, batch, unit_size, "vmap")
            except Exception:
                refused += 1
                return
            assert error(got, want) < tolerance(name), f"measurement {measurement} at unit size {unit_size}"

        expected(case, unit_size, measured)
    assert refused or name not in VMAP_CANNOT
    if torch.__version__ >= (2, 13):  # older releases can batch less
        assert not refused or name in VMAP_CANNOT


# ---- precision -------------------------------------------------------------------------------------------------------

# Cases whose batch is floating-point inputs, in layers that autocast casts.
CAST = [
    "mlp",
    "cnn",
    "residual_block_with_groupnorm",
    "batchnorm",
    "batchnorm_in_eval_mode",
    "transformer_encoder",
    "gru_of_two_layers_behind_a_layer",
    "in_batch_negatives",
    "attention_with_time_first",
    "attention_with_weights_and_padding",
    "weight_shared_by_two_layers",
    "contrastive_loss",
    "mean_over_tokens_that_are_not_padding",
    "embedding",
    "tied_embedding_and_head",
    "norms_of_every_kind",
    "item_stored",
    "guard_against_nan",
    "boolean_mask",
    "checkpoint_without_reentry",
    "checkpoint_with_reentry",
    "grouped_dilated_convolutions",
    "transposed_convolution_with_groups",
    "batchnorm_as_a_function",
    "penalty_on_the_weights",
]


def under_autocast(case: Case, dtype: torch.dtype) -> Case:
    """Return a case in float32, with its loss under autocast."""

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return case.loss_fn(module, batch)

    return as_floats(case)._replace(loss_fn=loss)


def as_floats(case: Case) -> Case:
    """Return a case in float32."""
    return case._replace(module=case.module.float(), batches=[cast(batch, torch.float32) for batch in case.batches])


# Over two samples, a BatchNorm gives one and minus one whatever the data, and gradients before it are rounding.
OF_TWO = {"batchnorm", "checkpoint_with_reentry", "checkpoint_without_reentry"}
CAST_SIZES = [(name, k) for name in CAST for k in UNIT_SIZES if k != 2 or name not in OF_TWO]


@pytest.mark.parametrize(("name", "unit_size"), CAST_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(name: str, dtype: torch.dtype, unit_size: int) -> None:
    """As near to float64 as a loop under the same autocast is."""
    truths: list[Grams] = []
    expected(ZOO[name](), unit_size, lambda measurement, batch, want: truths.append(want))
    case = under_autocast(ZOO[name](), dtype)

    def measured(measurement: int, batch: Any, loop: Grams) -> None:
        got, engine = measure(case.module, case.loss_fn, batch, unit_size)
        assert engine == "ghost"
        assert all(gram.dtype == torch.float32 for gram in got.values())
        truth = truths[measurement]
        assert error(got, truth) < 2 * error(loop, truth) + 8 * torch.finfo(dtype).eps

    expected(case, unit_size, measured)


@pytest.mark.parametrize("unit_size", UNIT_SIZES)
@pytest.mark.parametrize("name", CAST)
def test_in_float32(name: str, unit_size: int) -> None:
    case = as_floats(ZOO[name]())

    def measured(measurement: int, batch: Any, want: Grams) -> None:
        got, engine = measure(case.module, case.loss_fn, batch, unit_size)
        assert engine == "ghost"
        assert error(got, want) < 1e-5

    expected(case, unit_size, measured)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop", "auto"])
def test_dropout_has_a_mask_of_its_own_for_each_unit(engine: str) -> None:
    """Of ones, the gradient of a linear layer is the mask: what two units share is counted, and half of the rest."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(1000, 1, bias=False)).double()
    x = torch.ones(6, 1000, dtype=torch.float64)
    (gram,) = measure(module, lambda m, x: m(x).sum(), x, 1, engine, dropout=True)[0].values()
    kept = gram / 4
    ones = kept.diagonal()
    assert torch.equal(kept, kept.round()) and ones.unique().numel() > 1
    assert ((ones > 400) & (ones < 600)).all(), "half of a mask"
    shared = kept[torch.ones(6, 6).triu(1) > 0]
    assert ((shared > 180) & (shared < 320)).all(), "a quarter is in two masks that have nothing to do with each other"


@pytest.mark.parametrize("engine", ["ghost", "auto"])
@pytest.mark.parametrize(
    "name",
    [
        "dropout",
        "bidirectional_gru_with_dropout",
        "transformer_encoder",
        "attention_with_time_first",
        "scaled_dot_product_attention_with_dropout",
        "transformer",
        "decoder_that_attends_to_memory",
    ],
)
def test_with_dropout_ghost_measures_and_draws_anew(name: str, engine: str) -> None:
    """The masks are others each time and the random state is put back, so nothing else can be compared."""
    case = ZOO[name]()
    off, _ = measure(case.module, case.loss_fn, case.batches[0], 2, engine)
    before = torch.get_rng_state()
    on, used = measure(case.module, case.loss_fn, case.batches[0], 2, engine, dropout=True)
    assert used == "ghost"
    assert torch.equal(before, torch.get_rng_state())
    assert error(on, {name: gram.double() for name, gram in off.items()}) > 1e-6
    again, _ = measure(case.module, case.loss_fn, case.batches[0], 2, engine, dropout=True)
    torch.testing.assert_close(again, on, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "embedding", "cross_entropy_with_everything", "boolean_mask"])
@pytest.mark.parametrize("unit_size", UNIT_SIZES)
def test_with_dropout_on_and_none_in_the_module(name: str, unit_size: int) -> None:
    case = ZOO[name]()

    def measured(measurement: int, batch: Any, want: Grams) -> None:
        got, engine = measure(case.module, case.loss_fn, batch, unit_size, dropout=True)
        assert engine == "ghost"
        assert error(got, want) < 1e-8

    expected(case, unit_size, measured)
