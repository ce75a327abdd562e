"""GradientConfusionCallback: its arguments, and the hooks of Lightning that it listens to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gradconf.gram.select import Engine
from lightning_gradconf.reports.report import Pair, Reading
from lightning_gradconf.training import arguments as check
from lightning_gradconf.training.compat import Callback, MisconfigurationException, add_metrics, warn
from lightning_gradconf.training.publish import add_charts
from lightning_gradconf.training.session import Session
from lightning_gradconf.training.unsupported import reason_not_to_start

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class GradientConfusionCallback(Callback):
    r"""Log how much the gradients of different samples conflict, without changing the run.

    At set steps the callback takes ``num_units`` units of ``unit_size`` samples, computes the gradient of the module's
    own ``training_step`` on each, and logs statistics of their inner products
    :math:`K_{ij} = \langle g_i, g_j \rangle` and cosines :math:`C_{ij}`. All gradients are taken at the weights before
    the optimizer step. Values are logged at the step of the batch's own loss. The first measurement is at the first
    batch, or as soon as there are enough units.

    Logged Metrics (``statistics="default"``), under ``{prefix}/``:

    * **eta**: :math:`\max(0, -\min_{i \ne j} K_{ij})`, gradient confusion, a squared gradient norm.
    * **min_cosine**: :math:`\min_{i \ne j} C_{ij}`, what the paper plots.
    * **p05_cosine**, **mean_cosine**: 5 % quantile and mean of the cosines.
    * **negative_fraction**: share of the pairs that disagree.
    * **gradient_norm**: mean norm of the units' gradients.

    They go to every logger and to ``trainer.callback_metrics``, so that EarlyStopping and ModelCheckpoint can monitor
    them. The minimum is lower the more pairs there are: compare curves of equal ``num_units`` and ``unit_size``. Within
    a run the number of units never changes.

    The paper's protocol, as we understand it, is
    ``GradientConfusionCallback(every_n_epochs=1, source="fresh", num_units=15, unit_size=128)``: 15 units have 105
    pairs, and the paper draws 100 pairs of mini-batches an epoch. Units are drawn without replacement: a dataset of
    1797 samples gives 14 of them.

    A checkpoint holds the number of units and the schedule. So a resumed run is measured at the same steps, and with as
    many units, as an uninterrupted run.

    With manual optimization, the loss is what ``training_step`` passes to ``manual_backward``. Several losses are
    measured at the same weights, each for the parameters of its optimizer, and logged under
    ``{prefix}/{optimizer index}/``. If an optimizer has several losses, they are numbered in their order.

    Under DDP each rank has ``num_units`` units, and all pairs count. Under FSDP2 (``ModelParallelStrategy``) a unit is
    ``unit_size`` samples of each rank.

    Args:
        every_n_train_steps: Measure at every n-th optimizer step. If you give neither this nor ``every_n_epochs``, the
            interval is the Trainer's ``log_every_n_steps``, or a multiple of it (see ``max_overhead``).
        every_n_epochs: Measure at the end of every n-th training epoch, however it ends and before its validation, as
            the paper does.
        max_overhead: The largest part of the run's time that measuring may take, if you give no interval: 0.05 is 5 %.
            The default interval is doubled until measuring keeps to it, from the times that measurements and steps
            take. None never doubles it.
        num_units: How many gradients are compared.
        unit_size: Samples behind each gradient; ``"batch"`` is a whole batch of the loader.
        source: Where samples come from. ``"current"``: the batch in training, or the most recent batches if one is not
            enough (``unit_size="batch"``, ``every_n_epochs``). If samples cannot be cut out of a batch, such as graphs,
            they are drawn as with ``"fresh"``, and a warning says so. ``"fresh"``: new samples of the training dataset
            at each measurement. ``"fixed"``: samples drawn once. A DataLoader: its first samples at each measurement.
        engine: How gradients are computed; see `gradient_gram`. All give the same numbers.
        parameters: Glob patterns on names of parameters; None is all that require grad.
        loss_fn: ``loss_fn(module, batch)``, instead of ``training_step``.
        memory_budget: Bytes, or a text like ``"2GB"``, that each process may fill with gradients beside what a
            training step takes. If not all fit, some are computed again: the values are the same, and take longer.
            None is half of the free memory. The engine ``"ghost"`` holds no gradients, except those of parameters that
            are transformed before they meet the data (weight_norm); if these do not fit, ``"auto"`` takes another one.
        dropout: Measure with dropout on. By default its probability is zero while measuring, and layers that add noise
            only in training, such as stochastic depth, add none.
        statistics: Which statistics to log: ``"default"``, ``"all"``, or a list of names in place of the default ones.
            Among all are ``num_units``, the n of this run, and ``seconds``, the time that a measurement took.
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
            measurement of a run, and switch off with a warning if it changed any. Use it when in doubt.

    Attributes:
        last_gram: The Gram ``(n, n)`` of the last measurement, on the CPU; None before the first. If a step has several
            losses, it is that of the last one.
        last_statistics: What it logged, by the names of the statistics; of several losses all, as ``0/eta``, ``1/eta``.
        last_step: The step that it was logged at.
        last_engine: The engine that computed it.
        last_seconds: The time it took.
        last_top_pairs: The pairs of the last measurement, with ``cosine``, ``units`` (rows of the Gram), ``origins``
            (whose ``samples`` are positions or indices) and ``labels``; empty without ``top_pairs``.

    Raises:
        ValueError: An argument is out of its range; the message names it.
        TypeError: An argument is passed by position, or has an unknown name.
        MisconfigurationException: ``every_n_train_steps`` and ``every_n_epochs`` are both given, or two callbacks of a
            Trainer have one ``prefix``.

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

    _given: dict[str, Any]  # the arguments that differ from their defaults

    @check.keywords_only
    def __init__(
        self,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.05,
        num_units: int = 32,
        unit_size: int | Literal["batch"] = 1,
        source: Literal["current", "fresh", "fixed"] | DataLoader = "current",  # type: ignore[type-arg]
        engine: Engine = "auto",
        memory_budget: int | str | None = None,
        parameters: str | Sequence[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        dropout: bool = False,
        statistics: Sequence[str] | Literal["default", "all"] = "default",
        per_layer: bool | int = False,
        histogram: bool = True,
        figures: bool = False,
        top_pairs: int = 0,
        labels: int | Callable[..., Any] | str | None = None,
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
        self.every_n_train_steps = check.interval(every_n_train_steps=every_n_train_steps)
        self.every_n_epochs = check.interval(every_n_epochs=every_n_epochs)
        self.max_overhead = check.share(max_overhead)
        self.num_units = check.integer(2, num_units=num_units)
        self.unit_size = check.size_of_unit(unit_size)
        self.source = check.data_source(source)
        self.engine = check.engine_name(engine)
        self.memory_budget = check.budget(memory_budget)
        self.parameters = check.patterns(parameters)
        self.loss_fn = check.loss_function(loss_fn)
        self.dropout = check.flag(dropout=dropout)
        self.labels = check.place_of_labels(labels, unit_size)
        self.statistics = check.names_of_statistics(statistics, with_labels=labels is not None)
        self.per_layer = check.depth(per_layer)
        self.histogram = check.flag(histogram=histogram)
        self.figures = check.with_matplotlib(figures)
        self.top_pairs = check.integer(0, top_pairs=top_pairs)
        self.prefix = check.first_part_of_keys(prefix)
        self.prog_bar = check.flag(prog_bar=prog_bar)
        self.seed = check.integer(0, seed=seed)
        self.verify = check.flag(verify=verify)
        self._state: dict[str, Any] = {}
        self.last_gram: Tensor | None = None
        self.last_statistics: dict[str, float] = {}
        self.last_step: int | None = None
        self.last_engine: str | None = None
        self.last_seconds: float | None = None
        self.last_top_pairs: list[Pair] = []
        self._logged: dict[str, float] = {}  # by the last measurement
        self._session: Session | None = None

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={check.shown(value)}" for name, value in self._given.items())
        return f"{type(self).__name__}({given})"

    @property
    def state_key(self) -> str:
        """Distinct for each prefix, so that a Trainer takes several of these callbacks."""
        return f"{type(self).__qualname__}{{'prefix': {self.prefix!r}}}"

    def should_measure(self, trainer: Trainer) -> bool:
        """Return whether to measure at a step that is due; to be overridden.

        It is asked before each measurement, on every rank, and all ranks must agree. This one measures while the
        network still learns::

            class WhileLearning(GradientConfusionCallback):
                def should_measure(self, trainer):
                    return trainer.callback_metrics.get("train_loss", math.inf) > 0.1
        """
        return True

    # ---- hooks of Lightning -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run before a checkpoint is read, and lay out TensorBoard's charts of this one."""
        self._state = {} if stage == "fit" else self._state
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        all_of_us = [callback for callback in callbacks if isinstance(callback, GradientConfusionCallback)]
        if sum(callback.prefix == self.prefix for callback in all_of_us) > 1:
            raise MisconfigurationException(
                f"two GradientConfusionCallbacks log to the same keys {self.prefix}/...; give each its own prefix="
            )
        if stage == "fit" and all_of_us[:1] == [self]:
            add_charts(trainer, [callback.prefix for callback in all_of_us if callback.histogram])

    @wraps(Callback.state_dict)  # or Lightning itself refuses two of one prefix, without a word about prefix=
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return what a resumed run needs to go on, for the checkpoint."""
        state = self._state if self._session is None else self._session.state_dict()
        last = {"last_step": self.last_step, "last_statistics": self.last_statistics, "logged": self._logged}
        return state and state | last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._state, self._logged = state_dict, state_dict.get("logged", {})  # 0.1.0 wrote none
        self.last_step, self.last_statistics = state_dict["last_step"], state_dict["last_statistics"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide once whether this run can be measured."""
        if (reason := reason_not_to_start(self, trainer, pl_module)) is not None:
            warn(f"measures nothing in this run. {reason}.")
            return
        self._session = Session(self, trainer, pl_module, self._state)
        if self._state:  # callbacks that monitor a key have the values from before until there are new ones
            add_metrics(trainer, self._logged)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the weights before the step of this batch, if it is time."""
        if self._session is not None:
            self._keep(self._session.before_step(batch, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the weights at the end of an epoch, if it is time and validation is still to come."""
        if self._session is not None:
            self._keep(self._session.after_step(batch, batch_idx))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights at the end of an epoch that did not end with a batch."""
        if self._session is not None:
            self._keep(self._session.at_end_of_epoch())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the run as a whole, or say that nothing was ever measured, and release what was kept for it."""
        if self._session is not None:
            self._session.end()
            self._end_session()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget a run that ends with an error or an interrupt; Lightning calls no `teardown` then."""
        self._end_session()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run, also one that ended before it trained."""
        self._end_session()

    def _end_session(self) -> None:
        if self._session is not None:
            self._state, self._session = self._session.state_dict(), None

    def _keep(self, readings: Sequence[Reading]) -> None:
        """Keep what the last measurement has found, where there was one."""
        if readings:
            self.last_statistics, self._logged = {}, {}
        for reading in readings:
            measurement = reading.measurement
            self.last_gram, self.last_step, self.last_top_pairs = measurement.gram, measurement.step, reading.pairs
            self.last_engine, self.last_seconds = measurement.engine, measurement.seconds
            of_loss = measurement.name and f"{measurement.name}/"
            self.last_statistics |= {f"{of_loss}{name}": value for name, value in reading.statistics.items()}
            self._logged |= reading.metrics
