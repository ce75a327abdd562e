"""Which engine measures: a function of the module, its loss and n units, for one process and for several.

All engines give the same numbers, and ``auto`` takes the first that can:

* ``ghost``: one pass over all units, and inner products from the factors of their gradients.
* ``vmap``: the gradients of all units at once, through torch.func.
* ``loop``: one autograd pass a unit. Works wherever training works.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from textwrap import shorten
from typing import Any, Literal

from torch import Tensor, nn

from lightning_gradconf.batches.units import num_samples, split
from lightning_gradconf.gram import loop, vmap
from lightning_gradconf.gram.blockwise import Progress, Rows, make_plan, repeatable
from lightning_gradconf.gram.findings import Findings, findings_of
from lightning_gradconf.gram.ghost import engine as ghost
from lightning_gradconf.gram.measurement_mode import MeasurementMode
from lightning_gradconf.gram.memory_budget import units_at_once
from lightning_gradconf.gram.metric_answers import answered
from lightning_gradconf.gram.module_state import untouched
from lightning_gradconf.gram.noise_layers import without_noise
from lightning_gradconf.gram.objective import LossFn, Objective, objective, sizes
from lightning_gradconf.gram.ranks.collectives import without_collectives
from lightning_gradconf.gram.ranks.data_parallel import agreed_budget, contract, gram_of_factors
from lightning_gradconf.gram.ranks.process_group import Ranks

Engine = Literal["auto", "ghost", "vmap", "loop"]
_ENGINES = ("ghost", "vmap", "loop")
_TRIES = 2  # of an engine that fails, before it is left alone
_LONGEST = 200  # characters of a reason; torch.func says whole paragraphs
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
            ``"loop"`` one after the other; ``"auto"`` is the first of them that can. What the first call verifies,
            later calls for the same module and kind of batch use.
        parameters: Glob patterns on the names of parameters; None is all that require grad.
        dropout: Leave dropout and stochastic depth on, with masks of its own for each unit.
        memory_budget: Bytes, or a text like ``"2GB"``, that ``vmap`` and ``loop`` may fill with gradients, beside what
            an ordinary forward and backward pass takes. If not all fit, a block of them is held and the others are
            computed again: the answer is the same and takes longer. None is half of the free memory. ``ghost`` holds no
            gradients, except those of parameters that are transformed before they meet the data (weight_norm). If these
            do not fit, ``ghost`` does not apply.

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
        options: dict[str, Any] = {"dropout": dropout, "memory_budget": memory_budget}
        grams, _ = gram_of_units(Ranks(target.device), target, units, unit_size, engine, **options)
    return grams


def gram_of_units(
    ranks: Ranks,
    objective: Objective,
    units: Sequence[Any],
    unit_size: int | None,
    engine: str = "auto",
    *,
    dropout: bool = False,
    memory_budget: int | str | None = None,
    progress: Progress | None = None,
    train_batch_size: int | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Return the Gram ``(ranks * n, ranks * n)`` of each parameter in rank order, and the engine that made them.

    All ranks use the same engine, also where only one of them has to fall back. With ``engine="auto"`` the reason for
    a slower engine is logged once.

    Args:
        ranks: The processes that measure; without a group it is one.
        objective: What to differentiate.
        units: This rank's n units.
        unit_size: Samples in each unit, None if they cannot be counted.
        engine: One of `Engine`.
        dropout: Leave dropout on.
        memory_budget: What each rank may fill with gradients; all follow the plan of the least.
        progress: Called while gradients are computed one after the other, with their number so far and in all.
        train_batch_size: Samples in an ordinary pass, if all units together may be too many for one.
    """
    if engine != "auto" and engine not in _ENGINES:
        raise ValueError(f"engine={engine!r} is not one of 'auto', {', '.join(map(repr, _ENGINES))}")
    budget = agreed_budget(ranks, memory_budget, sizes(objective.parameters.values()))
    mode = MeasurementMode(running_statistics=unit_size == 1, dropout=dropout)
    findings = findings_of(objective.module, objective.loss_fn)
    with ExitStack() as stack:
        if not dropout:
            stack.enter_context(without_noise(objective.module))
        with mode:
            objective = stack.enter_context(answered(objective, units[0]))
            together = len(units)
            if engine != "loop":
                how = (objective, units, unit_size, train_batch_size, budget)
                together = ranks.minimum(ranks.run_on_all_ranks(lambda: units_at_once(*how)))
        call = _Call(ranks, objective, units, engine, mode, findings, budget, together, progress)
        return call.by_first_that_can() if engine == "auto" else (call.by(engine), engine)


@dataclass(frozen=True)
class _Call:
    """A call of `gram_of_units`, with what it has agreed upon: ``together`` is how many units may share a pass."""

    ranks: Ranks
    objective: Objective
    units: Sequence[Any]
    engine: str
    mode: MeasurementMode
    findings: Findings
    budget: int
    together: int
    progress: Progress | None

    def by_first_that_can(self) -> tuple[dict[str, Tensor], str]:
        """Measure with the fastest engine that can, and say why with none faster."""
        reasons: list[str] = []
        failures = self.findings.failures
        for name in _ENGINES[:-1]:
            if (reason := self._reason_to_skip(name)) is None:
                try:
                    # A pass that fails halfway may leave half a state behind; one that has worked should go on to.
                    with nullcontext() if failures.get(name) == [] else untouched(self.objective.module):
                        grams = self.by(name)
                except Exception as error:
                    reason = shorten(in_words(error), _LONGEST, placeholder=" ...")
                    failures.setdefault(name, []).append(reason)
                else:
                    failures[name] = []
                    _say_why(self.objective, name, reasons)
                    return grams, name
            reasons.append(f"{name}: {reason}")
        grams = self.by("loop")  # an error that is the user's own comes up again here
        _say_why(self.objective, "loop", reasons)
        return grams, "loop"

    def by(self, engine: str) -> dict[str, Tensor]:
        """Measure with one engine."""
        if engine == "ghost":
            return self._by_factors()
        if engine == "vmap":
            at_once = self.together if self.together < len(self.units) else None
            return self._by_gradients(lambda: vmap.differentiator(self._of_units_together), at_once)
        return self._by_gradients(lambda: loop.Differentiator(self.objective), 1)

    @property
    def _of_units_together(self) -> Objective:
        return self.objective if self.ranks.size == 1 else without_collectives(self.objective)

    def _by_factors(self) -> dict[str, Tensor]:
        how = (self._of_units_together, self.units, self.mode, self.findings, self.budget)
        if self.ranks.size == 1:
            return ghost.unit_grams(*how)
        factors = self.ranks.run_on_all_ranks(lambda: ghost.unit_factors(*how))
        workspace = self.findings.workspace
        return gram_of_factors(self.ranks, self.objective.parameters, factors, len(self.units), workspace)

    def _by_gradients(
        self, differentiator: Callable[[], Callable[[Sequence[Any]], Rows]], at_once: int | None
    ) -> dict[str, Tensor]:
        bytes_of_each = sizes(self.objective.parameters.values())
        plan = make_plan(len(self.units), bytes_of_each, self.budget, at_once)
        if self.engine == "auto" and at_once is None and plan.chunk == 1 and plan.block < len(self.units):
            raise RuntimeError("the memory budget has no room for gradients of several units beside those held")
        with self.mode:
            gradients = repeatable(self.ranks.run_on_all_ranks(differentiator), self.units, plan)
            compute = lambda i, j: self.ranks.run_on_all_ranks(lambda: gradients(i, j))  # noqa: E731
            return contract(self.ranks, len(self.units), compute, plan, sum(bytes_of_each), self.progress)

    def _reason_to_skip(self, engine: str) -> str | None:
        """Return why an engine need not be tried, None if it may work."""
        n = len(self.units)
        if n < 2:
            return "a single unit is measured as it is"
        if self.together < (n if engine == "ghost" else 2):
            return "a pass of several units does not fit the memory budget"
        failures = self.findings.failures.get(engine, [])
        return self.findings.refused or (failures[-1] if len(failures) >= _TRIES else None)


def in_words(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _say_why(objective: Objective, engine: str, reasons: Sequence[str]) -> None:
    """Say, once for all measurements, why not a faster engine than this one."""
    if reasons:
        _say_once(
            f"{type(objective.module).__name__} is measured with engine={engine!r}, as faster ones do not apply "
            f"({'; '.join(reasons)}). Pass engine={engine!r} to choose this without trying."
        )


@lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    log.info(message)
