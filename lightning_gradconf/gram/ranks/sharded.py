"""FSDP2: units that span the ranks, and Grams of the shards that each rank holds; no gradient is ever gathered.

A module sharded by ``fully_shard`` only runs on all ranks together, and its backward pass gives each rank its shard of
the gradient of the mean of all ranks' losses. So unit j is the j-th unit of every rank taken together. Each rank
contracts its shards, and an all-reduce of ``(n, n)`` adds them up.

A rank that fails within a forward or backward pass leaves the others waiting in it, as in training; what can be agreed
upon between passes is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.blockwise import Progress, Rows, blockwise, make_plan, repeatable
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.module_state import rewinder
from lightning_gradconf.gram.noise_layers import without_noise
from lightning_gradconf.gram.objective import Objective, as_rows, checked, empty_rows, run_backward, sizes
from lightning_gradconf.gram.ranks.data_parallel import agreed_budget
from lightning_gradconf.gram.ranks.process_group import Ranks


def is_sharded(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was applied to a part of the module."""
    return bool(_sharded_parts(module))


def reason_not_to_measure(module: nn.Module) -> str | None:
    """Return why the parameters' shards cannot be read and what to do about it, None if they can."""
    from torch.distributed.tensor import DTensor, Shard

    reshard(module)
    managed = {id(p) for part in _sharded_parts(module) for p in part.parameters()}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) not in managed or not isinstance(p, DTensor):
            return f"parameter {name!r} is not sharded by fully_shard, so no gradient is that of all ranks' samples"
        mesh = p.device_mesh
        if mesh.ndim != 1 or mesh.size() != dist.get_world_size() or not isinstance(p.placements[0], Shard):
            return f"parameter {name!r} is not sharded over all ranks; hybrid and tensor parallel are not supported yet"
    return None


def reshard(module: nn.Module) -> None:
    """Release what is gathered, so that the module's parameters are the shards: after a forward pass some are not."""
    for part in _sharded_parts(module):
        part.reshard()


def gram_of_units(
    ranks: Ranks,
    target: Objective,
    units: Sequence[Any],
    unit_size: int | None,
    dropout: bool,
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the Gram ``(n, n)`` of each parameter, by one forward and backward pass a unit on all ranks together.

    Args:
        ranks: That measure, and hold the shards.
        target: What to differentiate; its parameters are sharded over all ranks.
        units: This rank's part of each of the n units.
        unit_size: Samples in such a part, None if they cannot be told.
        dropout: Leave dropout on.
        memory_budget: What each rank may fill with shards of gradients.
        progress: As for `blockwise`.
    """
    n = len(units)
    shards = sizes(_largest_shard(p) for p in target.parameters.values())
    plan = make_plan(n, shards, agreed_budget(ranks, memory_budget, shards), at_once=1)
    mode = MeasurementMode(running_statistics=unit_size == 1, dropout=dropout)
    noise = nullcontext() if dropout else without_noise(target.module)
    with mode, noise, _apart(target.module) as put_back:

        def gradients(some: Sequence[Any]) -> Rows:
            rows = _gradients(ranks, target, some)
            put_back()
            return rows

        compute = repeatable(gradients, units, plan)
        grams = blockwise(n, lambda i, j: ranks.run_on_all_ranks(lambda: compute(i, j)), plan, progress=progress)
    return ranks.add_up(grams)


def _gradients(ranks: Ranks, target: Objective, units: Sequence[Any]) -> Rows:
    """Return this rank's shards of the gradient of one unit, ``(1, numel)``."""
    (unit,) = units
    # That all ranks have a loss is agreed upon before any of them waits for the others in the backward pass.
    loss = ranks.run_on_all_ranks(lambda: checked(target.loss_fn(target.module, copy_of(unit))))
    run_backward(loss, (), keep_graph=False)
    rows = {
        name: empty_rows(_local(p), 1) if p.grad is None else as_rows(_local(p.grad), 1)
        for name, p in target.parameters.items()
    }
    for p in target.module.parameters():
        p.grad = None
    return rows


@contextmanager
def _apart(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Within this context the parameters have no gradients; theirs, and the buffers, are put back in the end.

    Yields what puts the buffers and the Python state of the module back, to be called between units.
    """
    held = [(p, p.grad) for p in module.parameters()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    rewind = rewinder(module)

    def put_back() -> None:
        reshard(module)
        rewind()
        for buffer, saved in buffers:
            buffer.data.copy_(saved)

    for p, _ in held:
        p.grad = None
    try:
        yield put_back
    except BaseException:
        _forget_pass(module)
        raise
    finally:
        for p, gradient in held:
            p.grad = gradient
        put_back()


def _forget_pass(module: nn.Module) -> None:
    """Reset the state of FSDP after a pass that was interrupted; FSDP has no public function for this."""
    reshard(module)
    for part in _sharded_parts(module):
        state = part._get_fsdp_state()
        state._state_ctx.iter_forward_root = None
        vars(state._comm_ctx).get("post_forward_order", []).clear()


def _sharded_parts(module: nn.Module) -> list[Any]:
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _largest_shard(p: Any) -> Tensor:
    """Return a tensor without memory, of the size that the first rank's shard has."""
    along = p.placements[0].dim
    rows = -(-p.shape[along] // p.device_mesh.size())
    return torch.empty(rows, p.numel() // max(1, p.shape[along]), dtype=p.dtype, device="meta")


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local()
    return local
