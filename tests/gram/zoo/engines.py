"""Which engine measures each case of the zoo with ``engine="auto"``: ghost, but for these exceptions."""

from __future__ import annotations

from typing import NamedTuple

from gram.zoo.registry import ZOO


class NotGhost(NamedTuple):
    """Another engine than ghost.

    Attributes:
        engine: The one that measures.
        reason: A regular expression that the message has.
        unit_sizes: Where it is so.
        since: The first measurement at which it is so.
    """

    engine: str
    reason: str
    unit_sizes: tuple[int, ...] = (1, 2, 3)
    since: int = 0


HOOK = "the loss calls register_hook on a tensor"
MODULE_HOOK = "backward hook"
ALONE = "a unit by itself has another gradient"
BY_PARAMETERS = "the loss differentiates with respect to parameters itself"
WAYS = "more than 4 different ways"

EXCEPTIONS = {
    "backward_hook_of_a_module": NotGhost("loop", MODULE_HOOK),
    "backward_hook_that_changes": NotGhost("loop", MODULE_HOOK),
    "backward_within_a_backward": NotGhost("loop", ALONE),
    "backward_within_a_backward_of_a_shared_layer": NotGhost("loop", ALONE),
    "complex_layers": NotGhost("vmap", ""),
    "counter_that_scales": NotGhost("loop", ALONE),
    "custom_function_with_a_parameter": NotGhost("loop", "NormsBackward|the weighted sum of gradients is wrong"),
    "embeddings_with_options": NotGhost("loop", ALONE),
    "frequencies": NotGhost("vmap", ""),
    "generator_frozen_in_the_step": NotGhost("loop", r"requires_grad_"),
    "gradients_of_parameters_in_the_loss": NotGhost("vmap", BY_PARAMETERS),
    "hook_of_a_module_that_comes_later": NotGhost("loop", MODULE_HOOK, since=2),
    "hook_on_a_tensor": NotGhost("vmap", HOOK),
    "hook_that_comes_later": NotGhost("vmap", HOOK, since=2),
    "hook_that_normalises": NotGhost("vmap", HOOK),
    "lengths_in_a_list": NotGhost("loop", "is no tensor and differs between units", since=1),
    "more_ways_than_passes": NotGhost("loop", WAYS),
    "norm_of_the_gradient_of_parameters": NotGhost("vmap", BY_PARAMETERS),
    "packed_sequences": NotGhost("loop", ""),
    "recurrent_cells_in_a_loop_of_python": NotGhost("loop", "aten::lstm_cell"),
    "retained_gradient": NotGhost("loop", "the loss calls retain_grad on a tensor"),
}

assert EXCEPTIONS.keys() <= ZOO.keys()


def expected_engine(name: str, unit_size: int, measurement: int) -> tuple[str, str]:
    """Return the engine that has to measure a case, and the reason if it is not ghost."""
    found = EXCEPTIONS.get(name)
    if found is None or unit_size not in found.unit_sizes or measurement < found.since:
        return "ghost", ""
    return found.engine, found.reason


NOT_YET: dict[str, tuple[int, ...]] = {}
VMAP_CANNOT: dict[tuple[str, int], int] = {}
