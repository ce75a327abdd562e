"""Random models: whatever is put together, every engine is right in four measurements, or refuses."""

from __future__ import annotations

import random

import pytest
from gram.random_graphs import LAYOUTS, LOSSES, OPERATIONS, Recipe, deviation, draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.func is not used for:UserWarning"),
]
STEP = st.tuples(st.sampled_from([*OPERATIONS]), st.sampled_from(LAYOUTS), st.integers(0, 1), st.booleans())
LENGTHS = st.one_of(st.sampled_from([(5,) * 4, (6,) * 4, (3,) * 4]), st.tuples(*[st.sampled_from((1, 2, 3, 5, 6))] * 4))
RECIPES = st.builds(
    Recipe,
    st.lists(STEP, min_size=1, max_size=6).map(tuple),
    st.sampled_from([*LOSSES]),
    st.sampled_from((2, 3, 4, 6)),
    LENGTHS,
    st.sampled_from((1, 2, 3)),
    st.integers(0, 999),
)


@given(RECIPES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_engine_is_right_or_refuses(recipe: Recipe) -> None:
    for engine in ("auto", "ghost", "vmap", "loop"):
        wrong, _ = deviation(recipe, engine)
        assert wrong is None


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_operation_alone_is_measured_by_ghost(name: str, layout: str) -> None:
    """Between layers, so that there are parameters on both sides of it."""
    steps = ("linear", "bsf", 0, False), (name, layout, 1, True), ("gain", "sbf", 1, False)
    for unit_size in (1, 2, 3):
        wrong, used = deviation(Recipe(steps, "mean square", 4, (5, 6, unit_size, 5), unit_size, 0))
        assert wrong is None
        assert used == ["ghost"] * 4


@pytest.mark.slow
def test_hundreds_of_random_models() -> None:
    rng, engines = random.Random(0), []
    for _ in range(300):
        recipe = draw(rng)
        wrong, used = deviation(recipe)
        assert wrong is None, recipe
        engines += used
    assert engines.count("ghost") > 0.95 * len(engines)
