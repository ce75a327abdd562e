"""Gradient confusion as a torchmetrics metric, for loops that have their gradients in hand."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_gradconf.plots import draw_density, plot_density
from lightning_gradconf.statistics import gradient_statistics, statistic_names


class GradientConfusion(Metric):
    """Statistics of the Gram K_ij = <g_i, g_j> of all gradients g_1, ..., g_n seen since the last reset.

    ``update`` takes m gradients as one tensor ``(m, P)``, or as a sequence of one tensor ``(m, *shape)`` per parameter,
    and keeps a detached copy, in float32 at least. ``compute`` compares every pair, across updates and processes, and
    returns ``{name: 0-dim tensor}``; it raises ``ValueError`` if there are fewer than two gradients. ``forward`` also
    returns the statistics of the given gradients alone, NaN for a single one: it has nothing to be compared with, yet
    counts in ``compute``. All n gradients are held in memory, in ``compute`` under DDP on every process: for a large
    model use ``GradientConfusionCallback``.

    Args:
        names: "default", "all", or the statistics to compute (see ``lightning_gradconf.statistics``); those of classes
            need labels, which a metric does not see.
        unit_size: samples behind each gradient, for ``noise_scale``.
        **kwargs: as for every ``torchmetrics.Metric``.

    >>> metric = GradientConfusion(["eta", "min_cosine"])
    >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> metric.update([torch.tensor([-1.0]), torch.tensor([0.0])])  # two scalar parameters, one gradient
    >>> metric.compute()
    {'eta': tensor(2.), 'min_cosine': tensor(-1.)}
    """

    is_differentiable = False
    full_state_update = False
    gradients: list[Tensor]

    def __init__(
        self, names: Sequence[str] | Literal["default", "all"] = "default", *, unit_size: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(**{"dist_sync_fn": _gather_rows, **kwargs})
        self.names = statistic_names(names)
        self.unit_size = unit_size
        gradient_statistics(torch.eye(2), self.names, unit_size=unit_size)  # fails here rather than after an epoch
        self.add_state("gradients", [], dist_reduce_fx="cat")
        self._in_forward = False

    def update(self, gradients: Tensor | Sequence[Tensor]) -> None:
        """Add m gradients, ``(m, P)`` or one ``(m, *shape)`` per parameter."""
        # cat copies, as it must: gradients are zeroed, clipped and accumulated in place.
        self.gradients.append(torch.cat(self._rows(gradients), dim=1))

    def compute(self) -> dict[str, Tensor]:
        """``{name: statistic}`` of all gradients, on their device."""
        rows = dim_zero_cat(self.gradients) if len(self.gradients) else torch.empty(0, 0, device=self.device)
        if len(rows) >= 2:
            with torch.autocast(rows.device.type, enabled=False):
                self._gram = rows @ rows.T  # for plot
                return gradient_statistics(self._gram, self.names, unit_size=self.unit_size)
        if self._in_forward:
            return {name: rows.new_full((), torch.nan) for name in self.names}
        if self._is_synced:  # torchmetrics would leave the gathered state in place of this process's own
            self.unsync()
        raise ValueError(
            f"Statistics compare pairs of gradients, but there are {len(rows)} of them: "
            "call update() with two gradients or more, or more than once, before compute()."
        )

    def forward(self, gradients: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Add gradients, and return the statistics of these alone."""
        self._rows(gradients)  # torchmetrics sets the state aside during forward: an error in it would lose the state
        self._in_forward = True
        try:
            statistics: dict[str, Tensor] = super().forward(gradients)
        finally:
            self._in_forward = False
        return statistics

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Density of the cosines of all gradients seen, or curves of ``val``, results of ``compute`` or ``forward``.

        ``ax`` is a matplotlib axes to draw in. Returns the figure, or ``None`` if ``ax`` is given, and the axes. Raises
        ``ImportError`` without matplotlib, and without ``val`` what ``compute`` raises.
        """
        if val is not None:
            return self._plot(val, ax)
        self.compute()  # of all processes, and checked
        if ax is not None:
            draw_density(ax, self._gram)
            return None, ax
        figure = plot_density(self._gram)
        return figure, figure.axes[0]

    def _rows(self, gradients: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return one ``(m, p)`` per parameter, checked, in float32 at least."""
        parts = [gradients] if isinstance(gradients, Tensor) else list(gradients)
        if not parts or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
            found = [str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
            raise TypeError(f"Gradients are floating-point tensors, but got {found}: pass (m, P) or one a parameter.")
        if isinstance(gradients, Tensor) and gradients.ndim != 2:
            raise ValueError(
                f"Gradients in one tensor have shape (m, P), but got {tuple(gradients.shape)}: "
                "pass gradient.reshape(1, -1) for a single one."
            )
        if any(part.ndim == 0 or len(part) != len(parts[0]) for part in parts):
            raise ValueError(
                "Gradients of parameters have the number of gradients as their first dimension, but got shapes "
                f"{[tuple(part.shape) for part in parts]}: pass [p.grad[None] for p in ...] for a single gradient."
            )
        parts = [part.detach().to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        rows = [part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts]
        width = sum(part.shape[1] for part in rows)
        if len(self.gradients) and width != self.gradients[-1].shape[-1]:
            raise ValueError(
                f"Gradients have {width} entries, but those before had {self.gradients[-1].shape[-1]}: "
                "pass gradients of the same parameters, or call reset() first."
            )
        return rows


def _gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Return the rows of all processes; for one without any torchmetrics sends 1-D, not to be gathered with 2-D."""
    gathered = gather_all_tensors(rows if rows.ndim == 2 else rows.new_empty(0, 0), group)
    width = max(part.shape[1] for part in gathered)
    return [part if len(part) else part.new_empty(0, width) for part in gathered]
