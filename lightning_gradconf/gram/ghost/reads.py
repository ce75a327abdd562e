"""What a forward pass does beside the graph: values that Python reads, and samples mixed without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


class Reads(TorchFunctionMode):
    """Notices where Python looks at the values of tensors, and where samples are mixed without a gradient.

    Args:
        batch: The number of samples.
        own: The tensors of the module, which hold no samples.

    Attributes:
        happened: A value was read.
        branched: The truth of something that depends on parameters was asked for.
        mixed: What was computed from several samples without a gradient took part in what has one.
    """

    def __init__(self, batch: int, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.happened = self.branched = self.mixed = False
        self._batch = batch
        self._own = {id(tensor) for tensor in own}
        self._listens = True
        self._computed = WeakIdKeyDictionary()
        self._of_several = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and remember where results without a gradient come from."""
        result = func(*args, **(kwargs or {}))
        if self._listens and func not in _QUIET:
            with torch._C.DisableTorchFunction():  # other modes need not see what is asked here
                self._notice(func, (*args, *(kwargs or {}).values()), result)
        return result

    def _notice(self, func: Callable[..., Any], arguments: Sequence[Any], result: Any) -> None:
        inputs = [*_tensors(arguments)]
        if func in _READS or (isinstance(result, bool) and func in _TESTS):
            self.happened = True
            if isinstance(result, bool) and self._depends(inputs):
                self.branched = True
        elif any(not (v.dim() or v.is_floating_point()) for v in inputs[func not in _FACTORIES :]):
            self.happened = True  # it may be a size
        for output in _tensors((arguments[0] if func is Tensor.__setitem__ else result,)):
            if output.requires_grad:
                self.mixed = self.mixed or any(v in self._of_several for v in inputs)
                continue
            if self._depends(inputs):
                self._computed[output] = True
            if any(v in self._of_several or self._mixes(func, arguments, v, output) for v in inputs):
                self._of_several[output] = True

    def stop(self) -> None:
        """Notice nothing from now on."""
        self._listens = False

    def _depends(self, inputs: Iterable[Tensor]) -> bool:
        return any(v.requires_grad or v in self._computed for v in inputs)

    def _mixes(self, func: Callable[..., Any], arguments: Sequence[Any], v: Tensor, output: Tensor) -> bool:
        """Whether an entry of ``output`` may come from several samples of ``v``, or from another one than it was."""
        if v.dim() == 0:
            return v.requires_grad and id(v) not in self._own  # a loss
        samples = v.shape[0]
        if not samples or samples % self._batch or id(v) in self._own:
            return False
        if output.numel() != v.numel():
            return samples not in output.shape
        if func is Tensor.__getitem__:
            index = arguments[1]
            return isinstance(index[0] if isinstance(index, tuple) and index else index, Tensor | list)
        numbers = [a for value in arguments[1:] for a in (value if isinstance(value, tuple | list) else [value])]
        along = [a for a in numbers if type(a) is int]
        return func in _MOVES and (0 in along or (not along and (v.dim() == 1 or func not in _ALONG_LAST)))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments of a function, or its results."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list) and (len(value) < 16 or isinstance(value[0], Tensor)):
            yield from _tensors(value)
        elif isinstance(value, slice):
            yield from _tensors((value.start, value.stop, value.step))


_READS = {
    Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__, Tensor.__contains__,
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__,
    Tensor.nonzero, Tensor.unique, Tensor.bincount, torch.nonzero, torch.unique, torch.bincount,
}  # fmt: skip
_TESTS = {torch.equal, torch.allclose, torch.is_nonzero, Tensor.equal, Tensor.allclose, Tensor.is_nonzero}
_FACTORIES = {torch.arange, torch.empty, torch.eye, torch.full, torch.ones, torch.zeros}
# These keep the shape and may carry values from one sample to another; some of them along the last dimension if none is
# named.
_ALONG_LAST = {
    getattr(where, name) for where in (torch, Tensor) for name in ("argsort", "sort", "softmax", "log_softmax", "topk")
    if hasattr(where, name)
}  # fmt: skip
_MOVES = _ALONG_LAST | {
    getattr(where, name) for where in (torch, Tensor)
    for name in ("cumprod", "cumsum", "flip", "flipud", "gather", "index_select", "roll", "take_along_dim")
    if hasattr(where, name)
}  # fmt: skip
_QUIET: set[Any] = {Tensor.shape.__get__, Tensor.requires_grad.__get__, Tensor.dtype.__get__, Tensor.device.__get__}  # type: ignore[attr-defined]
