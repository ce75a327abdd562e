"""The page "Custom scalars" of TensorBoard: confusion, loss and accuracy in one chart, and a band of the cosines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_gradconf.reports.saved_runs import accuracy_keys, loss_keys

Layout = dict[str, dict[str, list[str | list[str]]]]
_BAND = {"mean": None, "p05": 0.05, "p95": 0.95}  # as a margin chart wants them: value, lower, upper


def charts(prefix: str, logged: Sequence[str]) -> Layout:
    """Return the charts of one callback, in the form of ``SummaryWriter.add_custom_scalars``.

    Args:
        prefix: That of the callback.
        logged: Keys that the module logs; losses and accuracies are told by their names.

    >>> charts("confusion", ["train_loss", "val_acc", "lr"])["confusion"]["with loss and accuracy"]
    ['Multiline', ['confusion/min_cosine$', 'train_loss$', 'val_acc$']]
    """
    keys = [f"{prefix}/min_cosine", *loss_keys(logged), *accuracy_keys(logged)]
    return {
        prefix: {
            "with loss and accuracy": ["Multiline", [f"{re.escape(key)}$" for key in keys]],
            "cosines, 5 % to 95 %": ["Margin", [f"{prefix}/cosines/{name}" for name in _BAND]],
        }
    }


def add_band(experiment: Any, prefix: str, cosines: Tensor, step: int) -> None:
    """Log the three curves of the band: mean, 5 % and 95 % quantile of the cosines ``(m,)``."""
    for name, share in _BAND.items():
        ordered = cosines.sort().values
        value = cosines.mean() if share is None else ordered[round(share * (len(ordered) - 1))]
        experiment.add_scalar(f"{prefix}/cosines/{name}", float(value), step)


def add_layout(experiment: Any, layouts: Sequence[Layout]) -> None:
    """Write the page of a run, unless the user has one already: of several, TensorBoard shows the last."""
    ours = {category: named for layout in layouts for category, named in layout.items()}
    if _categories(experiment) <= ours.keys():
        experiment.add_custom_scalars(ours)


def _categories(experiment: Any) -> set[str]:
    """The headings of the page that was written last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    folder = Path(experiment.log_dir)
    if not folder.is_dir():  # a bucket, for example, which would take long to read
        return set()
    experiment.flush()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 1})
    events.Reload()
    if metadata.CONFIG_SUMMARY_TAG not in events.Tags()["tensors"]:
        return set()
    content = events.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1].tensor_proto.string_val[0]
    return {category.title for category in layout_pb2.Layout.FromString(content).category}
