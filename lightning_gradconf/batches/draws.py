"""Where units come from: the batches of the training itself, draws from its dataset, or a loader of the user's.

Nothing here touches the training loader: an iterator of its own would draw from the random state, or restart its
workers. Draws go through a new loader over the same dataset, in the main process, within `probe.no_trace`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_gradconf.batches import units

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Origin(NamedTuple):
    """Where the samples of a unit come from.

    Attributes:
        samples: Their positions in a batch, or without one, their indices in the dataset.
        batch: The index of that batch in its loader, None for samples of a dataset.
        rank: The process that has them.

    >>> str(Origin((3,), batch=12)), str(Origin((40, 7)))
    ('batch 12, sample 3', 'dataset[40, 7]')
    """

    samples: tuple[int, ...]
    batch: int | None = None
    rank: int | None = None

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.samples[:4])) + (", ..." if len(self.samples) > 4 else "")
        if not self.samples:
            shown = "?"
        where = f"dataset[{shown}]" if self.batch is None else f"batch {self.batch}, sample {shown}"
        return where if self.rank is None else f"rank {self.rank}, {where}"


class Unit(NamedTuple):
    """A batch that one gradient belongs to, and where it comes from."""

    batch: Any
    origin: Origin


def units_of(batch: Any, batch_idx: int, unit_size: int | str, num_units: int | None = None) -> list[Unit]:
    """Return copies of the units in a batch; with ``unit_size="batch"`` it is one."""
    if unit_size == "batch":
        return [Unit(units.copy_of(batch), Origin(tuple(range(size_of(batch) or 0)), batch_idx))]
    k = int(unit_size)
    parts = units.split(batch, k, num_units)
    return [Unit(part, Origin(tuple(range(i * k, (i + 1) * k)), batch_idx)) for i, part in enumerate(parts)]


def class_of(batch: Any, labels: str | int | Callable[[Any], Any]) -> int:
    """Return the class of the one sample in a batch.

    Args:
        batch: The batch.
        labels: The key or index of the classes in it, or a function of it.

    Raises:
        ValueError: There is nothing, or not one whole number.
    """
    try:
        found = labels(batch) if callable(labels) else batch[labels]
    except (KeyError, IndexError, TypeError) as error:
        if callable(labels):
            raise
        raise ValueError(f"labels={labels!r} is not in the batch, {_entries(batch)}") from error
    label = torch.as_tensor(found)
    if label.numel() != 1 or label.is_floating_point():
        raise ValueError(
            f"labels={labels!r} must give one whole number for a batch of one sample, found {label.dtype} "
            f"{tuple(label.shape)}; pass a function of the batch that gives its class"
        )
    return int(label)


def _entries(batch: Any) -> str:
    """What a batch has its classes under, in words."""
    if isinstance(batch, Mapping):
        return f"which has the keys {', '.join(map(repr, batch))}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {len(batch)}: give an index such as labels={len(batch) - 1}"
    return f"a {type(batch).__name__}: give a function of the batch that returns its class"


def size_of(batch: Any) -> int | None:
    """Return the number of samples in a batch, None if they cannot be told."""
    try:
        return units.num_samples(batch)
    except ValueError:
        return None


def draw(
    trainer: Trainer,
    module: LightningModule,
    num_units: int,
    unit_size: int | str,
    seed: Sequence[int],
    indices: Sequence[Sequence[int]] | None = None,
) -> list[Unit]:
    """Return units of samples drawn from the training dataset without replacement, on the module's device.

    Args:
        trainer: The running Trainer.
        module: Its LightningModule.
        num_units: How many units; fewer if the dataset is smaller.
        unit_size: Samples in a unit; ``"batch"`` is the batch size of the training loader.
        seed: Whatever the draw shall depend on, and nothing else does it depend on.
        indices: Those of an earlier draw, for each unit; None draws them.

    Raises:
        ValueError: The training data are no single DataLoader with a dataset that can be indexed.
    """
    loader: Any = trainer.train_dataloader
    batches = getattr(loader, "batch_sampler", None)
    size = getattr(batches, "batch_size", None) if unit_size == "batch" else int(unit_size)
    if batches is None or size is None or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"source='fresh' and 'fixed' draw from the dataset of one DataLoader with a batch size, found "
            f"{type(loader).__name__} over {type(getattr(loader, 'dataset', None)).__name__}; use source='current', "
            "or pass a DataLoader as source"
        )
    _seed_everything(seed)
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, RandomSampler | SequentialSampler):
        population: Sequence[int] = range(len(loader.dataset))
    else:  # one that keeps to a part of the dataset, or prefers some of it
        population = list(chain.from_iterable(batches) if sampler is None else sampler)
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit > 0:  # the first batches are all that is trained on, in the order of the dataset
        population = population[: int(trainer.num_training_batches) * batches.batch_size]
    if indices is None:
        n = min(num_units, len(population) // size)
        drawn_indices = random.sample(population, n * size)
        indices = [drawn_indices[i * size : (i + 1) * size] for i in range(n)]
    origins = [Origin(tuple(own)) for own in indices]
    # One batch for units of one sample, so that padding gives them one shape.
    chunks = [list(chain.from_iterable(indices))] if size == 1 else [list(own) for own in indices]
    drawn = DataLoader(loader.dataset, batch_sampler=chunks, collate_fn=loader.collate_fn)
    batches = [on_device(trainer, module, batch) for batch in drawn]
    parts = units.split(batches[0], 1) if size == 1 else [units.copy_of(batch) for batch in batches]
    if len(parts) != len(origins):  # the user's collate_fn leaves samples out, and does not say which
        origins = [Origin(())] * len(parts)
    return [Unit(part, origin) for part, origin in zip(parts, origins, strict=True)]


def read(
    trainer: Trainer,
    module: LightningModule,
    loader: DataLoader[Any],
    num_units: int,
    unit_size: int | str,
    seed: Sequence[int],
) -> list[Unit]:
    """Return the first units of a loader of the user's, started anew, on the module's device."""
    _seed_everything(seed)
    found: list[Unit] = []
    for batch_idx, batch in enumerate(loader):
        found += units_of(on_device(trainer, module, batch), batch_idx, unit_size, num_units - len(found))
        if len(found) == num_units:
            break
    return found


def state_of(loader: Any) -> list[Any]:
    """Return what drawing from a loader's dataset changes: random generators, and what the parts of it hold."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    parts = [getattr(loader, name, None) for name in ("generator", "dataset", "collate_fn")]
    return [*parts, *(vars(part) for part in samplers if hasattr(part, "__dict__"))]


def training_loaders(trainer: Trainer) -> Iterator[Any]:
    """Yield the loaders that the Trainer trains on."""
    todo = [trainer.train_dataloader]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)
        else:
            yield item


def on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Return a batch as the Trainer would hand it to ``training_step``."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _seed_everything(seed: Sequence[int]) -> None:
    """Make draws and augmentations depend on ``seed`` alone; the caller has remembered the random state."""
    number = random.Random(",".join(map(str, seed))).getrandbits(32)
    random.seed(number)
    torch.manual_seed(number)
    try:
        import numpy as np
    except ImportError:
        return
    np.random.seed(number)
