"""GradientConfusionCallback: when to measure, and what to log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gradconf.batches.draws import Unit, class_of
from lightning_gradconf.batches.loaders import loaders_in
from lightning_gradconf.batches.sources import Source
from lightning_gradconf.batches.units import copy_of
from lightning_gradconf.gram.memory_budget import bytes_of
from lightning_gradconf.gram.objective import Objective, objective
from lightning_gradconf.gram.ranks import sharded
from lightning_gradconf.gram.ranks.process_group import Ranks, joined
from lightning_gradconf.gram.select import Engine, gram_of_units, in_words
from lightning_gradconf.reports.custom_scalars import add_layout, charts
from lightning_gradconf.reports.loggers import kind, log_numbers
from lightning_gradconf.reports.report import Measurement, Pair, Report
from lightning_gradconf.statistics import statistic_names
from lightning_gradconf.training.compat import Callback, MisconfigurationException, warn
from lightning_gradconf.training.feed import feed_of
from lightning_gradconf.training.progress import shown
from lightning_gradconf.training.training_step import (
    digests,
    prepare_step,
    reason_not_to_measure,
    step_loss,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_MAX_FAILURES = 3


class GradientConfusionCallback(Callback):
    r"""Log how much the gradients of different samples conflict, without changing the run.

    At set steps the callback takes ``num_units`` units of ``unit_size`` samples, computes the gradient of the module's
    own ``training_step`` on each, and logs statistics of their inner products
    :math:`K_{ij} = \langle g_i, g_j \rangle` and cosines :math:`C_{ij}`. Weights are those before the step whose loss
    is logged at the same place; the first batch is always measured.

    Logged Metrics (``statistics="default"``), under ``{prefix}/``:

    * **eta**: :math:`\max(0, -\min_{i \ne j} K_{ij})`, gradient confusion, a squared gradient norm.
    * **min_cosine**: :math:`\min_{i \ne j} C_{ij}`, what the paper plots.
    * **p05_cosine**, **mean_cosine**: 5 % quantile and mean of the cosines.
    * **negative_fraction**: share of the pairs that disagree.
    * **gradient_norm**: mean norm of the units' gradients.

    They go to every logger and to ``trainer.callback_metrics``, so that EarlyStopping and ModelCheckpoint can monitor
    them. The minimum over pairs falls with their number: compare curves of equal ``num_units`` and ``unit_size``.
    Within a run the number is constant.

    The paper's protocol, as we understand it, is
    ``GradientConfusionCallback(every_n_epochs=1, source="fresh", num_units=100, unit_size=128)``. Units are drawn
    without replacement: a dataset of 1797 samples gives 14 of them.

    Under DDP each rank has ``num_units`` units, and all pairs count. Under FSDP2 (``ModelParallelStrategy``) a unit is
    ``unit_size`` samples of each rank.

    Args:
        every_n_train_steps: Measure at every n-th optimizer step. By default, and without ``every_n_epochs``, it is
            the Trainer's ``log_every_n_steps``.
        every_n_epochs: Measure at the end of every n-th training epoch, before validation, as the paper does.
        num_units: How many gradients are compared.
        unit_size: Samples behind each gradient; ``"batch"`` is a whole batch of the loader.
        source: ``"current"`` takes samples of the batch in training, or where one is not enough (``"batch"``,
            ``every_n_epochs``) of the most recent ones; where samples cannot be cut out of a batch, such as graphs, it
            draws like ``"fresh"`` and says so. ``"fresh"`` draws from the training dataset each time, and collates
            each unit alone; ``"fixed"`` draws once; a DataLoader gives its first samples each time.
        engine: How gradients are computed; see `gradient_gram`. All give the same numbers.
        parameters: Glob patterns on names of parameters; None is all that require grad.
        loss_fn: ``loss_fn(module, batch)``, instead of ``training_step``. Needed with manual optimization.
        memory_budget: Bytes, or a text like ``"2GB"``, that each process may fill with gradients beside what a
            training step takes. If not all fit, some are computed again: the values are the same, and take longer.
            None is half of the free memory. ``ghost`` holds none but those of parameters that are transformed before
            they meet the data (weight_norm), and is left if these do not fit.
        dropout: Measure with dropout on. By default its probability is zero while measuring.
        statistics: Names of statistics, ``"default"`` or ``"all"``.
        per_layer: Log ``{prefix}/min_cosine/{submodule}`` too: of each submodule that has parameters (True), or of
            submodules at this depth of names (1 is ``encoder``, 2 is ``encoder.block1``). At the end of the run a
            heatmap of submodules and steps is logged, if matplotlib is installed.
        histogram: Log the distribution of the cosines to TensorBoard and Weights & Biases; in TensorBoard also charts
            of the confusion beside losses and accuracies, under "Custom scalars".
        figures: Log a heatmap and the density of the cosines as images; needs matplotlib.
        top_pairs: Log this many pairs of units, those with the lowest cosines, as a table, and side by side where
            they are images: positions in the batch, or indices in the dataset for ``"fresh"`` and ``"fixed"``.
        labels: Where a batch has its classes, a key, an index or a function of the batch. Adds
            ``within_class_cosine`` and ``between_class_cosine`` to the default statistics, and orders the heatmap by
            class. Needs ``unit_size=1``.
        prefix: First part of every key.
        prog_bar: Show ``min_cosine`` in the progress bar.
        seed: Seed of fresh and fixed draws.
        verify: Compare parameters, buffers, gradients, optimizer state and random states before and after the first
            measurement of a run, and switch off with a warning if it changed any: to be run when in doubt.

    Attributes:
        last_gram: The Gram ``(n, n)`` of the last measurement, on the CPU; None before the first.
        last_statistics: What it logged, by the names of the statistics.
        last_step: The step that it was logged at.
        last_top_pairs: The pairs of the last measurement, with ``cosine``, ``units`` (rows of the Gram), ``origins``
            (whose ``samples`` are positions or indices) and ``labels``; empty without ``top_pairs``.

    Raises:
        ValueError: An argument is out of its range; the message names it.
        MisconfigurationException: ``every_n_train_steps`` and ``every_n_epochs`` are both given.

    Source: `Sankararaman et al. 2020 <https://arxiv.org/abs/1904.06963>`_, Definition 2.1 and Section 7.

    Example::

        >>> import torch, pytorch_lightning as pl
        >>> from pytorch_lightning.demos.boring_classes import BoringModel
        >>> confusion = GradientConfusionCallback(num_units=4)
        >>> trainer = pl.Trainer(max_steps=1, callbacks=[confusion], logger=False, enable_checkpointing=False,
        ...                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
        >>> class Model(BoringModel):
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=8)
        >>> trainer.fit(Model())
        >>> confusion.last_gram.shape
        torch.Size([4, 4])
    """

    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_units: int = 32,
        unit_size: int | Literal["batch"] = 1,
        source: Literal["current", "fresh", "fixed"] | DataLoader = "current",  # type: ignore[type-arg]
        engine: Engine = "auto",
        memory_budget: int | str | None = None,
        parameters: str | Sequence[str] | None = None,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        dropout: bool = False,
        statistics: Sequence[str] | Literal["default", "all"] = "default",
        per_layer: bool | int = False,
        histogram: bool = True,
        figures: bool = False,
        top_pairs: int = 0,
        labels: str | int | Callable[[Any], Any] | None = None,
        prefix: str = "gradient_confusion",
        prog_bar: bool = False,
        seed: int = 0,
        verify: bool = False,
    ) -> None:
        super().__init__()
        if every_n_train_steps is not None and every_n_epochs is not None:
            raise MisconfigurationException(
                f"every_n_train_steps={every_n_train_steps} and every_n_epochs={every_n_epochs} exclude each other; "
                "give one of them"
            )
        _check_at_least(1, every_n_train_steps=every_n_train_steps, every_n_epochs=every_n_epochs)
        _check_at_least(2, num_units=num_units)
        _check_at_least(1, unit_size=None if unit_size == "batch" else unit_size)
        if memory_budget is not None:
            bytes_of(memory_budget)
        _check_at_least(0, per_layer=int(per_layer) if isinstance(per_layer, bool) else per_layer, seed=seed)
        _check_at_least(0, top_pairs=top_pairs)
        if not isinstance(source, DataLoader) and source not in ("current", "fresh", "fixed"):
            raise ValueError(f"source={source!r} is not 'current', 'fresh', 'fixed' or a DataLoader")
        if engine not in get_args(Engine):
            raise ValueError(f"engine={engine!r} is not one of {', '.join(map(repr, get_args(Engine)))}")
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"loss_fn={loss_fn!r} is not a function of a module and a batch")
        if figures and find_spec("matplotlib") is None:
            raise ValueError('figures=True needs matplotlib: pip install "lightning_gradconf[plots]"')
        if labels is not None and unit_size != 1:
            raise ValueError(f"labels= gives each unit one class, so it needs unit_size=1, found {unit_size!r}")
        if not isinstance(prefix, str) or not prefix:
            raise ValueError(f"prefix={prefix!r} must be a non-empty string")
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs
        self.num_units = num_units
        self.unit_size = unit_size
        self.source = source
        self.engine = engine
        self.memory_budget = memory_budget
        self.parameters = parameters
        self.loss_fn = loss_fn
        self.dropout = dropout
        self.statistics = statistic_names(statistics, with_labels=labels is not None)
        if statistics == "default" and labels is not None:
            self.statistics += ("within_class_cosine", "between_class_cosine")
        self.per_layer = per_layer
        self.histogram = histogram
        self.figures = figures
        self.top_pairs = top_pairs
        self.labels = labels
        self.prefix = prefix
        self.prog_bar = prog_bar
        self.seed = seed
        self.verify = verify
        self.last_gram: Tensor | None = None
        self.last_statistics: dict[str, float] = {}
        self.last_step: int | None = None
        self.last_top_pairs: list[Pair] = []
        self._start_run()

    @property
    def state_key(self) -> str:
        """Distinct for each prefix, so that a Trainer takes several of these callbacks."""
        return f"{type(self).__qualname__}{{'prefix': {self.prefix!r}}}"

    def _start_run(self) -> None:
        """Forget what belongs to one call of ``fit``."""
        self._enabled = False
        self._pending = True
        self._n: int | None = None
        self._engine: str = self.engine
        self._source = Source(
            self.source, self.unit_size, self.num_units, self.seed, over_batches=self.every_n_epochs is not None
        )
        self._measured_at: int | None = None
        self._ranks = Ranks(torch.device("cpu"))
        self._sharded = False
        self._report = Report(
            self.statistics, self.per_layer, self.histogram, self.figures, self.top_pairs, self.prefix
        )
        self._logged: set[str] | None = None
        self._failures = 0
        self._hint = ""
        self._warned: set[str] = set()

    # ---- when -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide once whether this run can be measured."""
        self._start_run()
        self._sharded = sharded.is_sharded(pl_module)
        reason = reason_not_to_measure(trainer, pl_module, self.loss_fn)
        if reason is None and any(self.source is loader for loader in loaders_in(trainer.train_dataloader).values()):
            reason = "source= is the training loader itself, whose order would change; use source='fresh'"
        if reason is None and self.every_n_epochs is None and self._every(trainer) == 0:
            reason = "Trainer(log_every_n_steps=0) means never; pass every_n_train_steps= to measure"
        self._enabled = reason is None
        if reason is None and trainer.world_size > 1:
            self._ranks = joined(pl_module.device, getattr(trainer.strategy, "_timeout", None))
        if reason is not None:
            self._warn_once(f"measures nothing in this run. {reason}.")
        elif self._sharded and (self.labels is not None or self.top_pairs):
            self._warn_once("labels= and top_pairs= say nothing in this run: with FSDP a unit spans all ranks.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the weights before the step of this batch, if it is time."""
        if not self._enabled or trainer.fit_loop._skip_backward:  # the extra epoch of SWA does not train
            return
        due = self._pending or (self.every_n_epochs is None and self._step_is_due(trainer))
        if due and self._measured_at == _step(trainer):  # while gradients accumulate, the step stays the same
            due = self._pending = False
        self._source.see(feed_of(trainer, pl_module), batch, batch_idx, due)
        if due and (self._n is not None or self._ranks.minimum(self._source.ready())):
            self._guarded(lambda: self._measure_or_collate(trainer, pl_module, batch, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the weights at the end of an epoch, if it is time."""
        if not self._enabled or self.every_n_epochs is None or trainer.fit_loop._skip_backward:
            return
        finished = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if finished and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._guarded(lambda: self._measure_or_collate(trainer, pl_module, batch, batch_idx))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was ever measured, and release the batches kept."""
        if self._enabled and self._n is None and not self._warned:
            self._warn_once(
                f"no measurement took place: {self._source.seen} units of unit_size={self.unit_size!r} were seen, "
                "too few. Lower num_units or unit_size, or train longer."
            )
        if self._enabled and trainer.global_rank == 0:
            self._guarded(lambda: self._conclude(trainer), logging=True)
        self._source.forget()
        self._ranks.leave()

    def _every(self, trainer: Trainer) -> int:
        logged = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        return logged if self.every_n_train_steps is None else self.every_n_train_steps

    def _step_is_due(self, trainer: Trainer) -> bool:
        """The phase of Trainer(log_every_n_steps), at the batch that completes the optimizer step."""
        return (_step(trainer) + 1) % self._every(trainer) == 0 and not trainer.fit_loop._should_accumulate()

    # ---- what -------------------------------------------------------------------------------------------------------

    def _measure_or_collate(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure; where that fails on samples that keep the padding of their batch, on units collated alone."""
        try:
            self._measure(trainer, pl_module, batch, batch_idx)
        except Exception as error:
            feed = feed_of(trainer, pl_module)
            if self._ranks.minimum(not self._source.pads(feed, _step(trainer))):
                self._hint = self._hint or self._advice(trainer, pl_module, batch, batch_idx)
                raise
            self._source.collate_instead(feed, in_words(error))
            try:
                self._measure(trainer, pl_module, batch, batch_idx)
            except Exception:
                self._source.cut_again()
                raise error from None
        if self._source.remark is not None and self._n is not None:
            self._warn_once(self._source.remark)

    def _advice(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> str:
        """What to do about a module that fails on a batch of one sample and not on one of two."""
        if self.unit_size != 1 or self._failures or self._ranks.size > 1:
            return ""
        feed, loss = feed_of(trainer, pl_module), step_loss(trainer, pl_module, self.loss_fn, batch_idx, [])
        for size in (2, 1):
            source, works = Source(self.source, size, 1, self.seed, over_batches=False), True
            try:
                source.see(feed, batch, batch_idx, due=True)
                with feed.isolated(source.reads(feed)):
                    target = objective(pl_module, loss, self.parameters)
                    (unit,) = source.units(feed, 1, _step(trainer))
                    gram_of_units(self._ranks, target, [unit.batch], size, "loop", dropout=self.dropout)
            except Exception:
                works = False
            if works == (size == 1):
                return ""
        return "The module fails on a single sample and not on two: pass unit_size=2."

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = _step(trainer)
        self._pending = True  # until there is a measurement
        if self._sharded:
            sharded.rest(pl_module)
        given: list[bool] = []
        feed = feed_of(trainer, pl_module)
        loss = step_loss(trainer, pl_module, self.loss_fn, batch_idx, given)
        before = digests(trainer, pl_module) if self.verify and self._n is None else {}

        def prepare() -> tuple[list[Unit], list[int]] | None:
            if not prepare_step(pl_module, copy_of(batch), batch_idx):
                return None
            found = self._source.units(feed, self._n or self.num_units, step)
            return found, self._classes(found)

        with ExitStack() as stack:
            isolated = feed.isolated(self._source.reads(feed))
            self._ranks.on_all(lambda: stack.enter_context(isolated))
            prepared = self._ranks.on_all(prepare)
            n = self._ranks.minimum(-1 if prepared is None else len(prepared[0]))
            if prepared is None or n < 0:  # the module skips this batch
                return
            units, classes = prepared[0][-n:], prepared[1][-n:]
            if enough := n >= (self._n or (1 if self._ranks.size > 1 and not self._sharded else 2)):
                unit_size = units[0].size
                target = objective(pl_module, loss, self.parameters)
                how = (target, [unit.batch for unit in units], unit_size)
                grams, used = self._grams(trainer, *how, self._source.samples_of(feed, batch, batch_idx))
        if before and not self._verified(before, digests(trainer, pl_module)):
            return
        if not enough:
            return self._too_few(n)
        if self._ranks.minimum(not any(given)):  # training_step skips this batch
            return
        if used == "loop":  # do not try again what failed
            self._engine = used
        self._n = n
        self._pending = False
        self._measured_at = step
        self._failures = 0
        if self._sharded:  # a unit has such a part on each rank
            unit_size = None if unit_size is None else unit_size * self._ranks.size
        measured = self._described(trainer, Measurement(grams, unit_size, step), units, classes)
        self._guarded(lambda: self._log(trainer, pl_module, measured), logging=True)

    def _grams(
        self, trainer: Trainer, target: Objective, batches: list[Any], unit_size: int | None, usual: int | None
    ) -> tuple[dict[str, Tensor], str]:
        """The Gram of each parameter, and the engine that made them."""
        with shown(trainer) as progress:
            options: dict[str, Any] = {
                "dropout": self.dropout, "memory_budget": self.memory_budget, "progress": progress,
            }  # fmt: skip
            if self._sharded:
                return sharded.gram_of_units(self._ranks, target, batches, unit_size, **options), "loop"
            how = (self._ranks, target, batches, unit_size, self._engine)
            return gram_of_units(*how, **options, ordinary=usual)

    def _classes(self, units: list[Unit]) -> list[int]:
        """The class of each unit, none without ``labels``."""
        return [] if self.labels is None else [class_of(unit.batch, self.labels) for unit in units]

    def _described(self, trainer: Trainer, measured: Measurement, units: list[Unit], classes: list[int]) -> Measurement:
        """The measurement with what is to be told of its units, of all ranks."""
        if self._sharded:
            return measured
        if self.labels is not None:
            measured = replace(measured, labels=torch.tensor(self._ranks.gather(classes)))
        if self.top_pairs > 0:
            alone = self._ranks.size == 1
            rank = None if alone else trainer.global_rank
            origins = self._ranks.gather([unit.origin._replace(rank=rank) for unit in units])
            # Images of other ranks would have to travel.
            measured = replace(measured, origins=origins, units=[unit.batch for unit in units] if alone else ())
        return measured

    def _too_few(self, n: int) -> None:
        """The first measurement shows what the source can give; later ones wait for a batch that is large enough."""
        if self._n is None:
            self._enabled = False
            self._warn_once(
                f"measures nothing in this run. source={self.source!r} gives {n} unit(s) of unit_size="
                f"{self.unit_size!r}, and it takes two to disagree; use a smaller unit_size, unit_size='batch', or "
                "source='fresh'."
            )

    def _log(self, trainer: Trainer, pl_module: LightningModule, measured: Measurement) -> None:
        values = self._report.values(measured)
        self.last_top_pairs = self._report.pairs(measured)
        self.last_gram, self.last_statistics, self.last_step = measured.gram, values, measured.step
        metrics = {f"{self.prefix}/{name}": value for name, value in values.items()}
        for layer, value in self._report.of_layers(measured).items():
            metrics[f"{self.prefix}/min_cosine/{layer}"] = value
        if not bool(self.last_gram.isfinite().all()):
            self._warn_once(
                "a gradient is not finite; such measurements are logged as NaN.", f" First at step {measured.step}."
            )
        # Not by pl_module.log, which would repeat values or drop them between Lightning's own logging steps.
        device = pl_module.device
        trainer.callback_metrics.update({key: torch.tensor(value, device=device) for key, value in metrics.items()})
        if self.prog_bar and "min_cosine" in values:
            key = f"{self.prefix}/min_cosine"
            pl_module.log(key, metrics[key], prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            self._guarded(partial(log_numbers, logger, metrics, measured.step), logging=True)
        if trainer.global_rank == 0:
            figures = self._report.figures_of(measured, self.last_top_pairs)
            for logger in loggers:
                show = partial(self._report.show, logger, measured, figures, self.last_top_pairs)
                self._guarded(show, logging=True)
            self._arrange(trainer)

    def _arrange(self, trainer: Trainer) -> None:
        """Lay out the page of charts anew when the module logs something that it did not before."""
        logged = set(trainer._logger_connector._logged_metrics)  # the public property would compute metrics
        if not self.histogram or logged == self._logged:
            return
        self._logged = logged
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        prefixes = [c.prefix for c in callbacks if isinstance(c, GradientConfusionCallback) and c.histogram]
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            if kind(logger) == "TensorBoardLogger":
                add_layout(logger.experiment, [charts(prefix, sorted(logged)) for prefix in prefixes])

    def _conclude(self, trainer: Trainer) -> None:
        """What is told of the run as a whole."""
        if self.last_step is not None:
            self._arrange(trainer)
            self._report.show_layers(trainer.loggers)

    # ---- when it goes wrong -----------------------------------------------------------------------------------------

    def _verified(self, before: dict[str, bytes], after: dict[str, bytes]) -> bool:
        """Whether the first measurement left no trace; the callback switches itself off if it did."""
        changed = [name for name in before if before[name] != after.get(name)]
        self._enabled = bool(self._ranks.minimum(not changed))
        if not self._enabled:
            self._warn_once(
                f"the first measurement changed {', '.join(changed) or 'something on another rank'}; it measures "
                "nothing more in this run, which is not the run without it. Pass a loss_fn that only computes the loss."
            )
        return self._enabled

    def _guarded(self, action: Callable[[], None], logging: bool = False) -> None:
        """Run a part of a measurement; an error in it never reaches the training."""
        try:
            action()
        except Exception as error:
            what, advice = "logging a measurement failed", "The values are in last_statistics."
            if not logging:  # of which a logger's rank alone knows, so it cannot switch anything off
                self._failures += 1
                self._pending = False
                self._enabled = self._failures < _MAX_FAILURES
                what, advice = (
                    "a measurement failed",
                    (
                        self._hint
                        or f"After {_MAX_FAILURES} failures in a row it stops trying; to see the whole error, run "
                        "gradient_gram on this module and a batch."
                    ),
                )
            self._warn_once(f"{what} and training goes on as without it. {in_words(error)}. {advice}", all_ranks=True)

    def _warn_once(self, message: str, detail: str = "", all_ranks: bool = False) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message + detail, all_ranks)


def _step(trainer: Trainer) -> int:
    """The step that loggers write this batch at."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _check_at_least(least: int, **arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
