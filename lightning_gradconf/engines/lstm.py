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
    steps = range(len(x))[:: -1 if saved(node, "reverse") else 1]
    before = torch.cat([output[1:], h0[None]] if saved(node, "reverse") else [h0[None], output[:-1]])
    gates = (x @ w_ih.T).add_(before @ w_hh.T)
    if saved(node, "has_biases"):
        gates.add_(b_ih + b_hh)
    gates = gates.unflatten(2, (4, -1))
    i, f, o = (gates[:, :, gate].sigmoid() for gate in (0, 1, 3))
    g = gates[:, :, 2].tanh()
    cells = torch.empty_like(output)
    before_cells = torch.empty_like(output)
    made = i * g
    cell = c0
    for t in steps:
        before_cells[t] = cell
        cell = torch.addcmul(made[t], f[t], cell)
        cells[t] = cell
    tanh = cells.tanh()
    # What the cell's gradient is multiplied with for the first three gates, and the state's for the last.
    from_cell = torch.stack([made * (1 - i), before_cells * f * (1 - f), i * (1 - g * g)], 2)
    from_state, to_cell = tanh * o * (1 - o), o * (1 - tanh * tanh)
    d_output, d_state, d_cell = deltas
    d_state = torch.zeros_like(h0) if d_state is None else d_state
    d_cell = torch.zeros_like(c0) if d_cell is None else d_cell
    result = torch.empty_like(gates)
    for t in reversed(steps):
        if d_output is not None:
            d_state = d_state + d_output[t]
        d_cell = torch.addcmul(d_cell, d_state, to_cell[t])
        torch.mul(from_cell[t], d_cell.unsqueeze(1), out=result[t, :, :3])
        torch.mul(from_state[t], d_state, out=result[t, :, 3])
        d_state = result[t].flatten(1) @ w_hh
        d_cell = d_cell * f[t]
    return result.flatten(2), x, before
