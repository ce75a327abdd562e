"""The fused LSTM on a CPU: one autograd node for all time steps of one layer in one direction.

The node does not save the gates, but all from which they can be computed again. From the gates we compute the gradients
of the layer's inputs ourselves. This takes the place of the layer's own backward pass, which is slow and computes the
gradients of the weights even if nobody needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lightning_gradconf.gram.ghost.nodes import saved

NAME = "MkldnnRnnLayerBackward0"


class Gates(NamedTuple):
    """What the backward pass of a layer is made of, time outermost.

    Attributes:
        deltas: Gradients of the gates, ``(time, batch, 4 * hidden)``.
        input: Of the layer, at each time.
        before: The hidden states before each time.
        d_state, d_cell: Gradients of the first hidden and cell states, ``(batch, hidden)``.
    """

    deltas: Tensor
    input: Tensor
    before: Tensor
    d_state: Tensor
    d_cell: Tensor


def shorten(node: Node, known: Callable[[], Gates | None]) -> list[RemovableHandle]:
    """Let the backward pass of a layer be made of its gates, if they are known when its turn comes."""
    context = ExitStack()

    def before(deltas: Any) -> None:
        if (gates := known()) is not None:
            inputs = gates.deltas @ saved(node, "weight0")
            context.enter_context(_Answer((inputs, None, None, None, None, gates.d_state, gates.d_cell)))

    def after(gradients: Any, deltas: Any) -> None:
        context.close()

    return [node.register_prehook(before), node.register_hook(after)]


class _Answer(TorchDispatchMode):
    """Has the result of a layer's backward pass already."""

    def __init__(self, gradients: tuple[Tensor | None, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gradients = gradients

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise it would be imported, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call ``func``, unless it is the backward pass."""
        if func is torch.ops.aten.mkldnn_rnn_layer_backward.default:
            return self._gradients
        return func(*args, **(kwargs or {}))


def gates(node: Node, deltas: tuple[Tensor | None, ...]) -> Gates:
    """Return the gradients of the gates, and what belongs to them."""
    if saved(node, "mode") != 2:
        raise NotImplementedError("the fused recurrent layer is no LSTM")
    w_ih, w_hh, b_ih, b_hh = (saved(node, f"weight{i}") for i in range(4))
    x, output, h0, c0 = (saved(node, key) for key in ("input", "result0", "hx_", "cx_"))
    reverse = saved(node, "reverse")
    before = torch.cat([output[1:], h0[None]] if reverse else [h0[None], output[:-1]])
    # Written to again and again: memory that is new costs more than the arithmetic here.
    gates = (x @ w_ih.T).flatten(0, 1).addmm_(before.flatten(0, 1), w_hh.T).unflatten(0, x.shape[:2])
    if saved(node, "has_biases"):
        gates.add_(b_ih + b_hh)
    gates = gates.unflatten(2, (4, -1))
    i, f, g, o = gates.unbind(2)
    gates[:, :, :2].sigmoid_()
    g.tanh_()
    o.sigmoid_()
    made = i * g
    states = torch.empty(len(x) + 1, *c0.shape, dtype=c0.dtype, device=c0.device)  # of the cell, over time
    before_cells, cells = (states[1:], states[:-1]) if reverse else (states[:-1], states[1:])
    steps = range(len(x))[:: -1 if reverse else 1]
    states[-1 if reverse else 0] = c0
    for t in steps:
        torch.addcmul(made[t], f[t], before_cells[t], out=cells[t])
    tanh = cells.tanh()
    kept, to_cell = f.clone(), o * (1 - tanh * tanh)
    # In the place of the gates, what their gradients are made of: the cell's for the first three, the state's for o.
    g.mul_(g).neg_().add_(1).mul_(i)
    i.neg_().add_(1).mul_(made)
    f.mul_(1 - f).mul_(before_cells)
    o.mul_(1 - o).mul_(tanh)
    d_output, d_state, d_cell = deltas
    d_state = torch.zeros_like(h0) if d_state is None else d_state
    d_cell = torch.zeros_like(c0) if d_cell is None else d_cell
    for t in reversed(steps):
        if d_output is not None:
            d_state = d_state + d_output[t]
        d_cell = torch.addcmul(d_cell, d_state, to_cell[t])
        gates[t, :, :3].mul_(d_cell.unsqueeze(1))
        o[t].mul_(d_state)
        d_state = gates[t].flatten(1) @ w_hh
        d_cell = d_cell * kept[t]
    return Gates(gates.flatten(2), x, before, d_state, d_cell)
