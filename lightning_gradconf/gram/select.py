"""Engines: from a module, its loss and n units to the Gram of the units' gradients.

Each engine is a function of an objective and units, and all give the same numbers. `gradient_gram` chooses one:

* ``ghost``: one pass over all units, and inner products from the factors of their gradients. Needs units that do not
  influence one another; that is checked.
* ``vmap``: all units at once through torch.func. Needs a module that torch.func can transform and units of one shape.
* ``loop``: one autograd pass a unit. Works wherever training works.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor, nn

from lightning_gradconf.batches.units import num_samples, split
from lightning_gradconf.gram import loop, vmap
from lightning_gradconf.gram.blockwise import Progress, Rows, blockwise, least, plan, repeatable
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.measurement_mode import MeasuredLayers
from lightning_gradconf.gram.memory_budget import bytes_for_gradients, units_at_once
from lightning_gradconf.gram.metric_answers import answered
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.objective import LossFn, Objective, objective, sizes

Engine = Literal["auto", "ghost", "vmap", "loop"]
log = logging.getLogger("lightning_gradconf")


def gradient_gram(
    module: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    unit_size: int = 1,
    engine: Engine = "auto",
    parameters: str | Sequence[str] | None = None,
    dropout: bool = False,
    memory_budget: int | str | None = None,
) -> dict[str, Tensor]:
    r"""Return the inner products of the units' gradients, :math:`K_{ij} = \langle g_i, g_j \rangle`, per parameter.

    A unit is ``unit_size`` samples of the batch, and its gradient that of ``loss_fn`` on these samples alone. The sum
    over the parameters is the Gram of the whole gradients; `gradient_statistics` turns it into numbers.

    BatchNorm uses its running statistics if ``unit_size`` is 1, where statistics of the batch do not exist, and is
    otherwise in the module's own mode, with the statistics of each unit. The module, its buffers, its gradients and
    the random state are left as they were.

    Args:
        module: Any module.
        loss_fn: ``loss_fn(module, batch)``, the scalar loss of a batch.
        batch: Any nesting of tuples, lists, mappings and dataclasses of tensors with the samples on dimension 0; their
            number must be a multiple of ``unit_size``.
        unit_size: Samples behind each gradient.
        engine: ``"ghost"`` takes one pass over all units and never holds all gradients, ``"vmap"`` forms all,
            ``"loop"`` one after the other; ``"auto"`` is the first of them that can.
        parameters: Glob patterns on the names of parameters; None is all that require grad.
        dropout: Leave dropout on, with masks of its own for each unit.
        memory_budget: Bytes, or a text like ``"2GB"``, that ``vmap`` and ``loop`` may fill with gradients, beside what
            an ordinary forward and backward pass takes. If not all fit, a block of them is held and the others are
            computed again: the answer is the same and takes longer. None is half of the free memory. ``ghost`` holds
            none but those of parameters that are transformed before they meet the data, and does not apply if these do
            not fit.

    Returns:
        ``{parameter name: (n, n)}`` on the module's device, float64 for double parameters and float32 for all others.

    Raises:
        ValueError: The samples cannot be told, no parameter is left, the loss is no scalar, or ``memory_budget`` has no
            room for two gradients.

    Source: Definition 2.1 of `Sankararaman et al. 2020 <https://arxiv.org/abs/1904.06963>`_.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> grams = gradient_gram(model, lambda model, x: model(x).sum(), torch.tensor([[1.0, 0.0], [-3.0, 4.0]]))
        >>> grams["weight"]
        tensor([[ 1., -3.],
                [-3., 25.]])
    """
    samples = num_samples(batch)
    if not isinstance(unit_size, int) or unit_size < 1 or samples % unit_size:
        raise ValueError(
            f"a batch of {samples} samples does not divide into units of unit_size={unit_size}; "
            "give a batch of a multiple of unit_size samples"
        )
    target = objective(module, loss_fn, parameters)
    with untouched(module):
        units = split(batch, unit_size)
        grams, _ = gram_of_units(target, units, unit_size, engine, dropout, memory_budget=memory_budget)
    return grams


def gram_of_units(
    target: Objective,
    units: Sequence[Any],
    unit_size: int | None,
    engine: str = "auto",
    dropout: bool = False,
    memory: ghost.Memory | None = None,
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
    usual: int | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram of each parameter, and the name of the engine that made them.

    ``unit_size`` is the samples in each unit, None if they cannot be told. With ``engine="auto"``, what cannot be
    measured in one pass goes through torch.func, and what torch.func cannot transform through the loop; the reason is
    logged once. Give the same ``memory`` to all measurements of a run. ``progress`` is called while gradients are
    computed one after the other, with their number so far and in all. ``usual`` is the samples in an ordinary pass, if
    all units together may be too many for one; None if they are not.
    """
    n, bytes_of_each = len(units), sizes(target.parameters.values())
    budget = bytes_for_gradients(memory_budget, least(bytes_of_each), target.device)

    def by(gradients: Callable[[Sequence[Any]], Rows], chunk_size: int | None = None) -> dict[str, Tensor]:
        made = plan(n, bytes_of_each, budget, chunk_size)
        if engine == "auto" and chunk_size is None and made.chunk == 1 and made.block < n:
            raise RuntimeError("the memory budget has no room for gradients of several units beside those held")
        return blockwise(n, repeatable(gradients, units, made), made, progress=progress)

    engines: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ghost": lambda: ghost.unit_grams(target, units, unit_size, memory, budget),
        "vmap": lambda: by(vmap.differentiator(target), at_once if at_once < n else None),
        "loop": lambda: by(loop.differentiator(target), 1),
    }
    if engine != "auto" and engine not in engines:
        raise ValueError(f"engine={engine!r} is not one of 'auto', {', '.join(map(repr, engines))}")
    reasons = []
    layers = MeasuredLayers(running_statistics=unit_size == 1, dropout=dropout)
    with layers, answered(target, units[0]) as target:
        at_once = n if engine == "loop" else units_at_once(target, units, unit_size, usual, budget)
        for name in engines if engine == "auto" else [engine]:
            if name == "ghost" and engine == "auto" and (n < 2 or dropout):
                continue  # a mask for all units is not the mask of each
            if engine == "auto" and at_once < {"ghost": n, "vmap": min(n, 2), "loop": 1}[name]:
                reasons.append(f"{name}: a pass of several units does not fit the memory budget")
                continue
            try:
                # A pass that fails halfway may leave half a state to the next one; one that has worked may be trusted.
                tentative = engine == "auto" and name != "loop" and not (memory and name == memory.engine)
                with untouched(target.module) if tentative else nullcontext():
                    grams = engines[name]()
                break
            except Exception as error:
                if name == "loop" or engine != "auto":
                    raise
                reasons.append(f"{name}: {in_words(error)}")
    say_why(target, name, reasons)  # only now: an error that is the user's own has come up again in the loop
    if memory is not None:
        memory.engine = name
    return grams, name


def in_words(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def say_why(target: Objective, engine: str, reasons: Sequence[str]) -> None:
    """Say, once for all measurements, why not a faster engine than this one."""
    if reasons:
        _say_once(
            f"{type(target.module).__name__} is measured with engine={engine!r}, as faster ones do not apply "
            f"({'; '.join(reasons)}). Pass engine={engine!r} to choose this without trying."
        )


@lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    log.info(message)
