"""The LSTM's unroll and its gradient, against one that autograd differentiates row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncagent.lstm import LstmCore

T, N, F, H = 5, 3, 4, 6


def plain(
    core: LstmCore, features: Tensor, first: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As the equations have it, one row after another."""
    outputs = []
    for t in range(len(features)):
        if first[t].any():
            hidden = torch.where(first[t, :, None], 0.0, hidden)
            cell = torch.where(first[t, :, None], 0.0, cell)
        i, f, g, o = (core.inputs(features[t]) + core.recurrent(hidden)).chunk(4, dim=-1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs), hidden, cell


def case(dtype: torch.dtype) -> tuple[LstmCore, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    core = LstmCore(F, H).to(dtype)
    features = torch.randn(T, N, F, dtype=dtype, requires_grad=True)
    first = torch.zeros(T, N, dtype=torch.bool)
    first[0, 1] = first[3, 0] = first[4, 2] = True
    hidden, cell = (torch.randn(N, H, dtype=dtype, requires_grad=True) for _ in range(2))
    return core, features, first, hidden, cell


def weigh(*tensors: Tensor) -> Tensor:
    """A number that depends on every element differently."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    return (flat * torch.linspace(-1, 2, flat.numel(), dtype=flat.dtype)).sum()


def test_gradients_of_everything() -> None:
    """Outputs, states and all gradients, with resets, in float64."""
    core, features, first, hidden, cell = case(torch.float64)
    inputs = [features, hidden, cell, *core.parameters()]
    outputs, state = core(features, first, (hidden, cell))
    expected = plain(core, features, first, hidden, cell)
    for got, wanted in zip((outputs, *state), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    got_gradients = torch.autograd.grad(weigh(outputs, *state), inputs)
    for got, wanted in zip(
        got_gradients, torch.autograd.grad(weigh(*expected), inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_without_gradient_it_is_the_same() -> None:
    """Acting computes what learning does."""
    core, features, first, hidden, cell = case(torch.float32)
    outputs, state = core(features, first, (hidden, cell))
    with torch.inference_mode():
        acting, acting_state = core(features, first, (hidden, cell))
    torch.testing.assert_close(acting, outputs)
    torch.testing.assert_close(acting_state, state)


def test_low_precision_is_close() -> None:
    """In bfloat16 the products lose digits; the cell and the gradients' sums stay float32."""
    core, features, first, hidden, cell = case(torch.float32)
    inputs = [features, *core.parameters()]
    expected, *_ = plain(core, features, first, hidden, cell)
    wanted_gradients = torch.autograd.grad(weigh(expected), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = core(features, first, (hidden, cell))
    assert outputs.dtype == state[1].dtype == torch.float32
    torch.testing.assert_close(outputs, expected, rtol=0.05, atol=0.02)
    for got, wanted in zip(
        torch.autograd.grad(weigh(outputs), inputs), wanted_gradients, strict=True
    ):
        assert got.dtype == torch.float32
        assert float((got - wanted).norm()) < 0.03 * float(wanted.norm())


def test_a_state_that_is_no_number_ends_with_its_episode() -> None:
    """Where an episode begins, whatever the state was before is forgotten; other rows keep it."""
    core, features, first, hidden, cell = case(torch.float32)
    first[:] = False
    first[0, 1] = True
    for broken in (torch.nan, torch.inf):
        with torch.no_grad():
            spoilt = [part.index_fill(0, torch.tensor([1, 2]), broken) for part in (hidden, cell)]
            outputs, state = core(features, first, tuple(spoilt))
            expected, _ = core(features, first, (hidden, cell))
        torch.testing.assert_close(outputs[:, :2], expected[:, :2])
        assert all(bool(part[:2].isfinite().all()) for part in state)
        assert not bool(outputs[:, 2].isfinite().all()) or broken == torch.inf
