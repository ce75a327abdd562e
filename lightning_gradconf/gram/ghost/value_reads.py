"""What Python reads of batched tensors: truth values, numbers, text, and results whose size depends on the data.

Where all units have the same value, that value is the answer. Where they differ, Python would go on differently for
each of them, so the pass breaks off with `UnitsDiffer`, and begins again with the units that agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradconf.gram.ghost.agreement import agreed
from lightning_gradconf.gram.ghost.functorch import batched, below_vmap, in_front, is_batched
from lightning_gradconf.gram.ghost.unit_numbers import UnitNumber

if TYPE_CHECKING:
    from lightning_gradconf.gram.ghost.unit_mode import UnitMode


def same(mode: UnitMode, read: Callable[[Tensor], Any], tensor: Tensor, where: str) -> Any:
    """Return what ``read`` returns for every unit.

    Raises:
        UnitsDiffer: It returns different values.
        NotImplementedError: The user's own vmap is around the tensor.
    """
    if not is_batched(tensor):
        return read(tensor)
    rows = _rows(mode, tensor, where)
    with below_vmap(), torch._C.DisableTorchFunction():
        found = [read(value) for value in rows]
    return agreed(mode, found, where)


def _rows(mode: UnitMode, tensor: Tensor, where: str) -> Tensor:
    """Return the values of all units, ``(n, ...)``, on the CPU."""
    rows = in_front(tensor, mode.n)
    if is_batched(rows):
        raise NotImplementedError(f"a value is read inside a vmap of the loss's own ({where})")
    with below_vmap(), torch._C.DisableTorchFunction():
        return rows.detach().cpu()


# ---- calls that read ------------------------------------------------------------------------------------------------


def _number(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
    return same(mode, lambda value: function(value, *args), tensor, function.__name__)


def _item(mode: UnitMode, function: Callable[..., Any], tensor: Tensor) -> Any:
    if tensor.numel() != 1:
        raise ValueError(f"item() of a tensor with {tensor.numel()} elements")
    if not is_batched(tensor):
        return function(tensor)
    if tensor.dtype == torch.bool:
        return same(mode, bool, tensor, "item()")
    return UnitNumber(_rows(mode, tensor.reshape(()), "item()").tolist(), mode)


def _of_first(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a function with the first unit's value. All are compared, but for text of fractions: logs are full of it."""
    if function not in _TEXT or not tensor.is_floating_point():
        same(mode, lambda value: value.tolist(), tensor, function.__name__)
    with below_vmap(), torch._C.DisableTorchFunction():
        return function(in_front(tensor, mode.n)[0].detach(), *args, **kwargs)


def _compare(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return agreed(mode, _by_unit(mode, function, args, kwargs), function.__name__)


def _of_data_size(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the results of units one by one, stacked, where they have one shape.

    Raises:
        UnitsDiffer: They have different shapes.
    """
    results = _by_unit(mode, function, args, kwargs)
    columns = [*zip(*results, strict=True)] if isinstance(results[0], tuple) else [results]
    shapes = [tuple(tuple(part.shape) for part in parts) for parts in zip(*columns, strict=True)]
    agreed(mode, shapes, f"the size of {getattr(function, '__name__', 'a mask')}")
    with below_vmap():
        stacked = tuple(batched(torch.stack(column)) for column in columns)
    return stacked if isinstance(results[0], tuple) else stacked[0]


def _by_unit(mode: UnitMode, function: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    rows = [in_front(a, mode.n) if isinstance(a, Tensor) else a for a in args]
    if any(map(is_batched, rows)):
        raise NotImplementedError(f"{function.__name__} inside a vmap of the loss's own")
    with below_vmap():
        return [function(*(a[i] if isinstance(a, Tensor) else a for a in rows), **kwargs) for i in range(mode.n)]


def _where(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if len(args) + len(kwargs) != 1:
        return NotImplemented
    return tuple(_of_data_size(mode, torch.nonzero, *args, **kwargs).unbind(-1))


def _index(mode: UnitMode, index: Any) -> Any:
    """Return an index without slices up to a tensor, and with positions in the place of masks."""
    if isinstance(index, list):  # which may mean a tuple or a tensor, by what is in it
        return index
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if is_batched(part) and part.dtype == torch.bool:
            found += _of_data_size(mode, torch.nonzero, part).unbind(-1)
        elif isinstance(part, slice):
            found.append(slice(*(_whole(mode, bound) for bound in (part.start, part.stop, part.step))))
        else:
            found.append(part)
    return tuple(found)


def _whole(mode: UnitMode, bound: Any) -> Any:
    return same(mode, int, bound, "a slice") if isinstance(bound, Tensor) else bound


def _with_numbers(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of numbers that was given tensors."""
    numbers = [same(mode, Tensor.item, arg, function.__name__) if is_batched(arg) else arg for arg in args]
    return function(*numbers, **kwargs)


def _new(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a new tensor of a number that each unit has."""
    if not args or not is_batched(args[-1]) or kwargs.pop("requires_grad", False):
        return NotImplemented
    if function is Tensor.new_tensor:
        kwargs.setdefault("dtype", args[0].dtype)
    return args[-1].detach().clone().to(**kwargs)


def _full(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Fill a tensor with a number that each unit has."""
    if "fill_value" in kwargs:
        args = (*args, kwargs.pop("fill_value"))
    *others, number = args
    if not is_batched(number) or kwargs.get("requires_grad"):
        return NotImplemented
    if function is torch.full:
        kwargs.setdefault("dtype", number.dtype)
    like = function(*others, 0, **kwargs)
    return number.to(like).expand(like.shape).clone()


def _add(mode: UnitMode, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Multiply a term by a number that each unit has, as PyTorch takes only one number there."""
    by = kwargs.pop("value" if function in _OF_PRODUCTS else "alpha", None)
    if not is_batched(by):
        return NotImplemented
    input, term, *others = args
    return function(input, term * by, *others, **kwargs)


def _select(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, index: Any) -> Any:
    return function(tensor, _index(mode, index))


def _assign(mode: UnitMode, function: Callable[..., Any], tensor: Tensor, index: Any, value: Any) -> Any:
    if type(value) is UnitNumber:
        value = value.beside(tensor)
    if isinstance(value, Tensor) and value.dim() and not isinstance(index, tuple):
        index = _index(mode, index)
    elif is_batched(index) and index.dtype == torch.bool:  # one value wherever the mask says so
        return tensor.masked_fill_(index.reshape(index.shape + (1,) * (tensor.dim() - index.dim())), value)
    return function(tensor, index, value)


_NUMBERS = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__complex__)
_TEXT = (Tensor.__format__, Tensor.__repr__)
_SIZED = (
    torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.masked_select, Tensor.masked_select,
    torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount, Tensor.bincount,
)  # fmt: skip
_SUMS = (torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_)
_OF_PRODUCTS = (torch.addcmul, Tensor.addcmul, Tensor.addcmul_, torch.addcdiv, Tensor.addcdiv, Tensor.addcdiv_)
READS: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((*_NUMBERS, Tensor.tolist, Tensor.is_nonzero, torch.is_nonzero), _number),
    **dict.fromkeys(_SIZED, _of_data_size),
    **dict.fromkeys((torch.equal, Tensor.equal, torch.allclose, Tensor.allclose), _compare),
    **dict.fromkeys((*_TEXT, Tensor.numpy, Tensor.__array__), _of_first),
    **dict.fromkeys((torch.arange, torch.linspace, torch.eye, torch.zeros, torch.ones, torch.empty), _with_numbers),
    **dict.fromkeys((torch.tensor, Tensor.new_tensor), _new),
    **dict.fromkeys((torch.full, torch.full_like, Tensor.new_full), _full),
    **dict.fromkeys((*_SUMS, *_OF_PRODUCTS), _add),
    Tensor.item: _item,
    Tensor.__contains__: _compare,
    torch.where: _where,
    Tensor.__getitem__: _select,
    Tensor.__setitem__: _assign,
}
