"""Which engine measures each case of the zoo with ``engine="auto"``: ghost, but for these exceptions."""

from __future__ import annotations

from typing import NamedTuple

import torch
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
SEED = "sets the seed of its random numbers"

EXCEPTIONS = {
    "float_stored": NotGhost("loop", WAYS, unit_sizes=(1,)),
    "guard_by_math": NotGhost("loop", WAYS, unit_sizes=(1,)),
    "numpy_stored": NotGhost("loop", WAYS, unit_sizes=(1,)),
    "backward_hook_of_a_module": NotGhost("loop", MODULE_HOOK),
    "backward_hook_that_changes": NotGhost("loop", MODULE_HOOK),
    "backward_within_a_backward": NotGhost("loop", ALONE),
    "backward_within_a_backward_of_a_shared_layer": NotGhost("loop", ALONE),
    "custom_function_of_a_parameter_that_draws": NotGhost("loop", "of parameters alone draws random numbers"),
    "embeddings_with_options": NotGhost("loop", ALONE),
    "generator_frozen_in_the_step": NotGhost("loop", r"requires_grad_"),
    "gradients_of_parameters_in_the_loss": NotGhost("vmap", BY_PARAMETERS),
    "hook_of_a_module_that_comes_later": NotGhost("loop", MODULE_HOOK, since=2),
    "hook_on_a_tensor": NotGhost("vmap", HOOK),
    "hook_that_comes_later": NotGhost("vmap", HOOK, since=2),
    "hook_that_normalises": NotGhost("vmap", HOOK),
    "generator_made_in_the_loss": NotGhost("loop", ALONE),
    "names_that_are_read": NotGhost("loop", WAYS, unit_sizes=(1,)),
    "more_ways_than_passes": NotGhost("loop", WAYS, unit_sizes=(1,)),
    "norm_of_the_gradient_of_parameters": NotGhost("vmap", BY_PARAMETERS),
    "parameters_as_keys": NotGhost("loop", "KeyError|requires_grad=True"),
    "seed_set_between_two_draws": NotGhost("loop", SEED),
    "seed_set_in_a_fork": NotGhost("loop", SEED),
    "seed_set_in_the_loss": NotGhost("loop", SEED),
    "state_of_the_generator_set_in_the_loss": NotGhost("loop", SEED),
    "packed_sequences": NotGhost("loop", "stack expects each tensor to be equal size"),
    "retained_gradient": NotGhost("loop", "the loss calls retain_grad on a tensor"),
}

if torch.__version__ < (2, 7):  # where factories take no number but Python's own
    EXCEPTIONS["item_that_fills_and_scales"] = NotGhost("loop", "invalid combination of arguments|must be Number")

if torch.__version__ >= (2, 15):  # where `apply` is written in C, and cannot be replaced where user code has kept it
    EXCEPTIONS["custom_function_by_another_name"] = NotGhost("loop", "it must override the setup_context")

assert EXCEPTIONS.keys() <= ZOO.keys()


def expected_engine(name: str, unit_size: int, measurement: int) -> tuple[str, str]:
    """Return the engine that has to measure a case, and the reason if it is not ghost."""
    found = EXCEPTIONS.get(name)
    if found is None or unit_size not in found.unit_sizes or measurement < found.since:
        return "ghost", ""
    return found.engine, found.reason


# Promised, and not there yet: the test has to fail, and the line to go when it does not.
NOT_YET: dict[str, tuple[int, ...]] = {}


# What torch.func alone cannot transform, in one of the four measurements at least.
VMAP_CANNOT = set(
    [
        "accuracy_by_item",
        "arithmetic_of_small_integers",
        "item_as_a_key",
        "mask_in_a_cache",
        "tasks_by_text",
        "adversarial_and_gradient_reversal",
        "adversarial_step",
        "backward_hook_of_a_module",
        "backward_hook_that_changes",
        "backward_within_a_backward",
        "backward_within_a_backward_of_a_shared_layer",
        "bidirectional_gru_with_dropout",
        "boolean_mask",
        "boolean_mask_written",
        "branch_on_the_class",
        "center_set_by_data",
        "queue_beside_a_moving_average",
        "checkpoint_with_reentry",
        "codebook_by_moving_average",
        "one_hot_by_scatter",
        "written_by_other_operations_in_place",
        "checkpoint_without_reentry",
        "checkpoints_of_a_sequence",
        "connectionist_temporal_classification",
        "count_of_a_mask",
        "count_of_at_least_one",
        "counter_and_list_in_forward",
        "cross_entropy_of_probabilities",
        "custom_autograd_function",
        "custom_function_by_another_name",
        "custom_function_of_a_parameter_that_draws",
        "custom_function_with_a_parameter",
        "custom_function_of_a_number_that_is_read",
        "custom_function_that_differentiates_at_once",
        "custom_functions_of_parameters_alone",
        "experts_without_tokens",
        "gru_of_two_layers_behind_a_layer",
        "head_and_loss_in_one",
        "head_that_is_transposed_and_its_loss_in_one",
        "item_as_an_argument",
        "item_in_numpy",
        "item_that_fills_and_scales",
        "meter_beside_the_module",
        "cut_by_a_loop",
        "cut_by_a_slice",
        "cut_by_arange",
        "cut_by_narrow",
        "data_dependent_branch",
        "decoder_that_attends_to_memory",
        "decoder_that_only_gets_a_state",
        "sum_that_starts_as_a_leaf",
        "target_network_written_by_data",
        "everything_padded_or_nothing",
        "experts_chosen_by_the_data",
        "float_stored",
        "forces_from_an_energy",
        "forces_through_a_last_group_norm",
        "forces_through_a_last_layer_norm",
        "frozen_parameter_written_in_forward",
        "function_of_torchmetrics",
        "generator_frozen_in_the_step",
        "gradient_penalty",
        "gradient_penalty_through_a_batch_norm",
        "gradient_penalty_through_a_layer_norm",
        "gradient_penalty_through_convolutions",
        "gradient_penalty_through_running_statistics",
        "gru_in_float32",
        "guard_against_nan",
        "guard_by_assert",
        "guard_by_math",
        "guard_that_returns_another_loss",
        "hook_of_a_module_that_comes_later",
        "item_in_a_deque",
        "item_in_a_text",
        "item_in_the_loss",
        "item_stored",
        "lengths_in_a_list",
        "lengths_that_differ_later",
        "list_stored",
        "losses_for_regression",
        "lstm",
        "lstm_with_a_projection",
        "mask_that_selects_samples",
        "masked_select_and_nonzero",
        "more_ways_than_passes",
        "moving_average_in_a_buffer",
        "names_beside_the_tensors",
        "names_that_are_read",
        "numpy_stored",
        "other_losses_for_classes",
        "packed_sequences",
        "parameters_kept_in_a_list",
        "physics_with_second_derivatives",
        "physics_with_two_inputs",
        "queue_of_negatives",
        "recurrent_cells_in_a_loop_of_python",
        "recurrent_cells_that_begin_by_themselves",
        "recurrent_layer_with_time_first",
        "retained_gradient",
        "rnn_of_rectified_units",
        "parameters_as_keys",
        "running_mean_of_python",
        "seed_set_between_two_draws",
        "seed_set_in_a_fork",
        "seed_set_in_the_loss",
        "state_of_the_generator_set_in_the_loss",
        "generator_made_in_the_loss",
        "saved_tensors_packed",
        "score_matching",
        "sparse_embedding",
        "unique_classes",
        "unit_that_goes_its_own_way_alone",
        "words_counted_by_index_add",
        "written_into_a_constant",
        "written_into_empty",
        "written_into_full_and_arange",
        "written_into_zeros",
    ]
)
assert NOT_YET.keys() | VMAP_CANNOT <= ZOO.keys()
if torch.__version__ >= (2, 15):  # which batches writing where a mask says so
    VMAP_CANNOT -= {"boolean_mask_written", "function_of_torchmetrics"}
