"""Where the samples of a batch lie: along which dimension of each tensor, or along which lists.

`SamplePlaces` names each leaf of a batch by the expression that leads to it, and says of each where its samples lie:
the dimension of a tensor, the entries of a list, or None where all samples share it. `layout` learns these places from
what ``collate_fn`` makes of one, two and three items; without items they are assumed to be dimension 0 (`assume`).
Batches are cut into units along them (`cut`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from torch import Tensor

from lightning_gradconf.batches.structure import children, copy_of, is_array, leaves, rebuild

Where = int | Literal["entries"] | None
SamplePlaces = dict[str, Where]

ENTRIES: Final = "entries"
# The batch of one loader: its place in a batch of several is the expression that leads to it.
WHOLE: Final = "batch"


def assume(batch: Any, batch_size: int | None = None, path: str = WHOLE) -> SamplePlaces:
    """Return where samples lie in a batch that nothing is known about: on dimension 0.

    A tensor without dimensions, or with a first dimension of 1 beside larger ones, is shared by all samples, and so is
    everything that is no tensor, but for a list as long as the batch, which holds one entry a sample. Detectors keep
    images of different sizes in lists, ``(images, targets)`` or ``[{"image": ..., ...}, ...]``: there the samples lie
    along the lists. A tuple of dictionaries whose tensors all have one first dimension is a batch of several loaders.

    Args:
        batch: The batch.
        batch_size: That of its loader, if known.
        path: What to call the batch.

    Raises:
        ValueError: No tensor has a dimension, first dimensions differ, or their size contradicts ``batch_size``.
    """
    if (size := _samples_of_lists(batch)) is not None and not _is_tuple_of_inputs(batch):
        if _is_list_of_mappings(batch):
            return {path: ENTRIES}
        return {path + key: ENTRIES for key, _ in children(batch)}
    found = list(leaves(batch, path))
    sized = {at: leaf for at, leaf in found if isinstance(leaf, Tensor) and leaf.dim() > 0}
    if not sized:
        raise ValueError(
            f"found no tensor with a sample dimension in a batch of type {type(batch).__name__}, so its samples "
            "cannot be told apart; give a batch in which dimension 0 of the tensors counts the samples"
        )
    distinct = {leaf.shape[0] for leaf in sized.values()} - {1}
    if len(distinct) > 1:
        raise ValueError(
            f"the tensors of the batch differ in their first dimension ({_shapes(sized)}), so its samples cannot be "
            "told apart; put the samples on dimension 0 of every tensor, or select those tensors in `loss_fn`"
        )
    size = distinct.pop() if distinct else 1
    if batch_size is not None and size != batch_size:
        # Fewer may be the last batch of an epoch, or of a worker.
        elsewhere = all(batch_size in leaf.shape[1:] for leaf in sized.values())
        if size > batch_size or elsewhere:
            raise ValueError(
                f"dimension 0 counts {size} samples, but the loader's batch_size is {batch_size} ({_shapes(sized)}); "
                "put the samples on dimension 0 of every tensor, or pass unit_size='batch'"
            )
    places: SamplePlaces = {}
    for at, leaf in found:
        if isinstance(leaf, Tensor):
            places[at] = 0 if leaf.dim() > 0 and leaf.shape[0] == size else None
        else:
            places[at] = (0 if is_array(leaf) else ENTRIES) if _one_a_sample(leaf, size) else None
    return places


def count(batch: Any, places: SamplePlaces, parts: Sequence[str] = (WHOLE,)) -> dict[str, int]:
    """Return how many samples there are in each part of a batch that is not None.

    Raises:
        ValueError: The batch is not of the structure of the places, or its sizes contradict one another.
    """
    sizes: dict[str, dict[str, int]] = {part: {} for part in parts}
    seen: dict[str, Any] = {}

    def visit(node: Any, path: str) -> None:
        if path in places:
            seen[path] = node
            where = places[path]
            if where is not None:
                size = len(node) if where == ENTRIES else node.shape[where]
                sizes[part_of(path, parts)][path] = int(size)
            return
        entries = children(node)
        if not entries and not (node is None and path in sizes):
            raise ValueError(f"{path} is not in the batches that collate_fn makes of single items")
        for key, child in entries:
            visit(child, path + key)

    visit(batch, WHOLE)
    missing = [path for path in places if path not in seen and part(batch, part_of(path, parts)) is not None]
    if missing:
        raise ValueError(f"{missing[0]} is missing in the batch")
    for found in sizes.values():
        if len(set(found.values())) > 1:
            shapes = _shapes({path: seen[path] for path in found})
            raise ValueError(f"the parts of the batch count different numbers of samples ({shapes})")
    return {part: next(iter(found.values())) for part, found in sizes.items() if found}


def cut(batch: Any, places: SamplePlaces, sizes: Mapping[str, int], num_units: int | None = None) -> list[Any]:
    """Return a batch as a list of units: copies, so that no unit aliases the batch.

    Args:
        batch: The batch.
        places: Where its samples lie.
        sizes: The samples that a unit takes of each part of the batch, the parts named by the expressions that lead
            to them; ``{"batch": k}`` where it has only one.
        num_units: Take only the first so many units; None takes all that are full.

    Raises:
        ValueError: The batch does not fit the places.
    """
    parts = tuple(sizes)
    available = min(size // sizes[part] for part, size in count(batch, places, parts).items())
    n = available if num_units is None else min(num_units, available)

    def own(node: Any, path: str) -> list[Any]:
        """Return what each unit has of a part of the batch."""
        if path in places:
            where = places[path]
            if where is None:
                return [node.clone() if isinstance(node, Tensor) else node for _ in range(n)]
            k = sizes[part_of(path, parts)]
            slices = [slice(i * k, (i + 1) * k) for i in range(n)]
            if where == ENTRIES:
                return [copy_of(node[samples]) for samples in slices]
            before = (slice(None),) * where
            cuts = [node[(*before, samples)] for samples in slices]
            return [piece.clone() if isinstance(piece, Tensor) else piece.copy() for piece in cuts]
        entries = children(node)
        if not entries:  # the part of a loader that has come to its end
            return [node] * n
        columns = [own(child, path + key) for key, child in entries]
        return [rebuild(node, [column[i] for column in columns]) for i in range(n)]

    return own(batch, WHOLE)


def part_of(path: str, parts: Sequence[str]) -> str:
    """Return the part of the batch that a leaf belongs to.

    Raises:
        ValueError: It belongs to none.
    """
    for part in parts:
        if path == part or path.startswith((f"{part}[", f"{part}.")):
            return part
    raise ValueError(f"{path} belongs to none of the loaders, whose batches are {', '.join(parts)}")


def part(batch: Any, path: str) -> Any:
    """Return the part of a batch at an expression, None if there is none.

    >>> part({"a": [1, 2]}, "batch['a'][1]")
    2
    """
    todo = [(WHOLE, batch)]
    while todo:
        at, node = todo.pop()
        if at == path:
            return node
        todo.extend((at + key, child) for key, child in children(node) if path.startswith(at + key))
    return None


def _samples_of_lists(batch: Any) -> int | None:
    """Return the number of samples where they lie along lists, not along dimension 0 of tensors; None elsewhere.

    Only a list of mappings tells: a list of tensors may as well be several inputs, each of many samples.
    """
    if _is_list_of_mappings(batch):
        return len(batch)
    columns = [] if isinstance(batch, Tensor | Mapping) else [child for _, child in children(batch)]
    if not any(map(_is_list_of_mappings, columns)) or not all(isinstance(column, list | tuple) for column in columns):
        return None
    lengths = {len(column) for column in columns}
    return lengths.pop() if len(lengths) == 1 else None


def _is_tuple_of_inputs(batch: Any) -> bool:
    """Return whether a tuple of dictionaries has one for each of several inputs: all tensors count the same samples."""
    if not isinstance(batch, tuple) or not _is_list_of_mappings(batch):
        return False
    sizes = {leaf.shape[:1] for _, leaf in leaves(batch) if isinstance(leaf, Tensor)}
    return len(sizes) == 1 and () not in sizes


def _is_list_of_mappings(node: Any) -> bool:
    """Return whether ``node`` is a list of dictionaries, one a sample."""
    return isinstance(node, list | tuple) and bool(node) and all(isinstance(entry, Mapping) for entry in node)


def _one_a_sample(leaf: Any, size: int) -> bool:
    """Return whether a leaf that is no tensor holds one entry for each of ``size`` samples."""
    return (isinstance(leaf, list | tuple) or hasattr(leaf, "__array__")) and len(leaf) == size


def _shapes(found: Mapping[str, Any]) -> str:
    words = [f"{path} {tuple(leaf.shape) if hasattr(leaf, 'shape') else len(leaf)}" for path, leaf in found.items()]
    return ", ".join(words)
