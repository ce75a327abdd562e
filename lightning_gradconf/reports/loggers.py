"""Numbers for every logger, and pictures and tables for those that can show them.

Lightning has one call for numbers, which all loggers have, and none for the others. TensorBoard, Weights & Biases and
MLflow get them as each wants them, and beside a CSVLogger's file they become files. A logger that is none of these gets
the numbers only.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

BAND = {"mean": None, "p05": 0.05, "p95": 0.95}  # as a margin chart of TensorBoard wants them: value, lower, upper
_BINS = 40
_KINDS = ("TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CSVLogger")


def kind(logger: Any) -> str | None:
    """Return which of the known loggers this is, or is derived from, in either namespace; None if it is none."""
    names = {base.__name__ for base in type(logger).__mro__}
    return next((name for name in _KINDS if name in names), None)


def log_numbers(logger: Any, numbers: Mapping[str, float], step: int, epoch: int) -> None:
    """Log numbers by their keys at a step; rows carry the epoch as Lightning's own do."""
    if kind(logger) != "TensorBoardLogger":  # has no rows, but a curve of each number
        numbers = {**numbers, "epoch": epoch}
    if kind(logger) == "MLFlowLogger":  # keeps keys as files, and cosines/layer cannot be one in a file cosines
        parents = [key for key in numbers if any(other.startswith(f"{key}/") for other in numbers)]
        for parent in parents:
            numbers = {key.replace(f"{parent}/", f"{parent}."): number for key, number in numbers.items()}
    logger.log_metrics(metrics=dict(numbers), step=step)


def show_cosines(logger: Any, tag: str, cosines: Tensor, step: int) -> None:
    """Show the distribution of cosines ``(m,)`` at a step, in TensorBoard and Weights & Biases.

    TensorBoard also has the curves of a band: their mean and their 5 % and 95 % quantiles.
    """
    # TensorBoard's own bins are made for weights: 1500 of them, most of them close to 0.
    edges = torch.linspace(-1, 1, _BINS + 1)
    match kind(logger):
        case "TensorBoardLogger":
            logger.experiment.add_histogram(tag, cosines, step, bins=edges.tolist())
            ordered = cosines.sort().values
            for name, share in BAND.items():
                value = cosines.mean() if share is None else ordered[round(share * (len(ordered) - 1))]
                logger.experiment.add_scalar(f"{tag}/{name}", float(value), step)
        case "WandbLogger":
            import wandb

            counts = torch.histc(cosines.float(), _BINS, -1, 1)
            histogram = wandb.Histogram(np_histogram=(counts.int().numpy(), edges.numpy()))
            logger.log_metrics({tag: histogram}, step=step)


def show_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    """Show a figure at a step; beside a CSVLogger's file it becomes a PNG."""
    match kind(logger):
        case "TensorBoardLogger":  # whose add_figure would import pyplot, and with it a backend with windows
            logger.experiment.add_image(tag, _pixels(figure), step, dataformats="HWC")
        case "WandbLogger":
            logger.log_image(tag, [_pixels(figure)], step=step)
        case "MLFlowLogger":
            logger.experiment.log_figure(logger.run_id, figure, f"{tag}/{step:08d}.png")
        case "CSVLogger":
            figure.savefig(_file(logger, f"{tag}/{step:08d}.png"))


def show_table(logger: Any, tag: str, rows: Sequence[Mapping[str, str]], step: int) -> None:
    """Show rows that have equal keys at a step; beside a CSVLogger's file they go to one CSV for all steps."""
    columns = list(rows[0])
    cells = [[row[column] for column in columns] for row in rows]
    match kind(logger):
        case "TensorBoardLogger":
            logger.experiment.add_text(tag, _markdown(columns, cells), step)
        case "WandbLogger":
            logger.log_text(tag, columns=columns, data=cells, step=step)
        case "MLFlowLogger":
            logger.experiment.log_text(logger.run_id, _markdown(columns, cells), f"{tag}/{step:08d}.md")
        case "CSVLogger":
            file = _file(logger, f"{tag}.csv")
            lines = [["step", *columns]] if not file.exists() else []
            with file.open("a", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([*lines, *([str(step), *row] for row in cells)])


def _pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """Return a figure as ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _file(logger: Any, name: str) -> Path:
    file = Path(logger.log_dir, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
