"""The fused LSTM layer of a CPU, one node of the graph for all time steps of one layer in one direction.

It keeps no gates. All that they are made of is known, though, so they are made again, and the recursion of their
gradients is short.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradconf.engines.nodes import saved


def rows(node: Node, deltas: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates ``(time, batch, 4 * hidden)``, the inputs and the previous hidden states."""
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
    return gates.flatten(2), x, before
