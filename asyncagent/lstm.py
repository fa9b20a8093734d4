"""The LSTM over unrolls, whose state restarts wherever an episode begins."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LstmCore(nn.Module):
    """LSTM over [T, N, F] that zeroes its state before rows that open an episode.

    The input projection of all T*N rows is one matrix product, and so is the gradient of the
    recurrent weights; the cell stays in float32.  The forget gate's bias starts at 1, as
    TensorFlow's.
    """

    def __init__(self, num_inputs: int, num_units: int) -> None:
        super().__init__()
        self.num_units = num_units
        self.inputs = nn.Linear(num_inputs, 4 * num_units)
        self.recurrent = nn.Linear(num_units, 4 * num_units, bias=False)
        for layer in (self.inputs, self.recurrent):
            nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(num_inputs + num_units))
        nn.init.zeros_(self.inputs.bias)
        with torch.no_grad():
            self.inputs.bias[num_units : 2 * num_units] = 1.0

    def forward(
        self, features: Tensor, first: Tensor, core_state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs [T, N, num_units] and the state after the last row.

        Args:
          features: [T, N, F].
          first: bool [T, N].
          core_state: (hidden, cell) before row 0, float [N, num_units] each.
        """
        # The products with ``keep`` would carry a state that is no number on for ever, from one
        # episode to the next: who acts comes here with every row.
        begun = first[0].unsqueeze(-1)
        hidden, cell = (part.masked_fill(begun, 0.0) for part in core_state)
        keep = (~first).unsqueeze(-1).to(cell.dtype)
        arguments = (self.inputs(features), self.recurrent.weight, hidden, cell, keep)
        if torch.is_grad_enabled():
            outputs, hidden, cell = _Unroll.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            outputs, hidden, cell, _ = unroll(*arguments)
        return outputs, (hidden, cell)


class Trace(NamedTuple):
    """What the way back needs of the way there."""

    gates: Tensor
    """Input, forget, candidate and output gate after their non-linearities, [T, N, 4H]."""
    hiddens: Tensor
    """Hidden state before each row, zeroed where it had to be, [T, N, H]; of the low dtype."""
    cells: Tensor
    """The same of the cell, [T, N, H]."""
    squashed: Tensor
    """tanh of the cell after each row, [T, N, H]."""


def unroll(
    projected: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor, Trace]:
    """Outputs [T, N, H], hidden and cell after the last row, and the trace.

    Args:
      projected: [T, N, 4H]: what the inputs add to the gates; its dtype is the products'.
      weight: recurrent weights [4H, H].
      hidden, cell: state before row 0, [N, H].
      keep: [T, N, 1]: 0 where the state restarts before the row, else 1.
    """
    steps, rows, units = projected.shape[0], *hidden.shape
    low = weight.to(projected.dtype).t()
    gates = hidden.new_empty(steps, rows, 4 * units)
    hiddens = projected.new_empty(steps, rows, units)
    cells, squashed, outputs = (hidden.new_empty(steps, rows, units) for _ in range(3))
    for t in range(steps):
        hiddens[t] = hidden * keep[t]
        before = torch.mul(cell, keep[t], out=cells[t])
        total = torch.addmm(projected[t], hiddens[t], low).to(hidden.dtype)
        i, f, g, o = torch.sigmoid(total, out=gates[t]).chunk(4, dim=-1)
        torch.tanh(total[:, 2 * units : 3 * units], out=g)
        cell = torch.addcmul(f * before, i, g)
        hidden = torch.mul(o, torch.tanh(cell, out=squashed[t]), out=outputs[t])
    return outputs, hidden, cell, Trace(gates, hiddens, cells, squashed)


class _Unroll(torch.autograd.Function):
    """``unroll`` with a gradient that touches the recurrent weights once, not once per row."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, hidden, cell, trace = unroll(projected, weight, hidden, cell, keep)
        ctx.save_for_backward(weight, keep, *trace)
        return outputs, hidden.clone(), cell

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_outputs, to_hidden, to_cell = gradients
        weight, keep, gates, hiddens, cells, squashed = ctx.saved_tensors
        low = weight.to(hiddens.dtype)
        i, f, g, o = gates.chunk(4, dim=-1)
        # Gate by gate: what it is multiplied by on its way to the cell (the output gate's: to
        # the output), times the slope of its non-linearity.
        slopes = gates * (1 - gates)
        torch.addcmul(torch.ones_like(g), g, g, value=-1, out=slopes.chunk(4, dim=-1)[2])
        factors = (torch.cat([g, cells, i, squashed], dim=-1) * slopes).unflatten(-1, (4, -1))
        to_squashed = o * (1 - squashed.square())
        to_gates = hiddens.new_empty(factors.shape)
        for t in reversed(range(len(gates))):
            to_hidden = to_hidden + to_outputs[t]
            to_cell = torch.addcmul(to_cell, to_hidden, to_squashed[t])
            to_gates[t, :, :3] = to_cell.unsqueeze(1) * factors[t, :, :3]
            to_gates[t, :, 3] = to_hidden * factors[t, :, 3]
            to_hidden = (to_gates[t].flatten(1) @ low).to(keep.dtype) * keep[t]
            to_cell = to_cell * f[t] * keep[t]
        flat = to_gates.flatten(2)
        to_weight = flat.flatten(0, 1).t() @ hiddens.flatten(0, 1)
        return flat, to_weight.to(weight.dtype), to_hidden, to_cell, None
