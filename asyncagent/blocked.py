"""Convolution and pooling in oneDNN's blocked layout, which a CPU computes fastest in.

``torch.Tensor.to_mkldnn`` makes an opaque tensor; every layer between ``enter`` and ``leave`` then
keeps the layout that oneDNN likes best, in which max-pooling, relu and sums are several times
faster than over channels_last, and convolutions somewhat.  torch has the forward operators and all
gradients but the convolution's, which is ``_Conv2d`` here.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def is_blocked(x: Tensor) -> bool:
    """Whether ``x`` came from ``enter``."""
    return x.is_mkldnn


def enter(x: Tensor) -> Tensor:
    """Floats [N, C, H, W] in the blocked layout."""
    return x.contiguous().to_mkldnn()


def leave(x: Tensor) -> Tensor:
    """A blocked tensor as an ordinary, contiguous one [N, C, H, W]."""
    return x.to_dense()


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """``F.conv2d`` of a blocked ``x``, in the dtype of ``x``; weight and bias are ordinary."""
    if torch.is_grad_enabled():
        out: Tensor = _Conv2d.apply(x, weight, bias, stride, padding)  # type: ignore[no-untyped-call]
        return out
    return _forward(x, weight, bias, stride, padding)


def max_pool2d(x: Tensor, kernel: int, stride: int, padding: Pair) -> Tensor:
    """``F.max_pool2d`` of a blocked ``x``, with ceil_mode."""
    pool = cast(Any, torch).mkldnn_max_pool2d
    out: Tensor = pool(x, (kernel, kernel), (stride, stride), padding, (1, 1), True)
    return out


@functools.cache
def is_available(dtype: torch.dtype) -> bool:
    """Whether all of this works here, and agrees with torch's other operators; tried once."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(2, 4, 12, 12), torch.randn(16, 4, 3, 3), torch.randn(16)
        weight.requires_grad_()
        ordinary = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, 1, 1)), 3, 2, ceil_mode=True)
        ordinary.square().sum().backward()  # type: ignore[no-untyped-call]
        expected, weight.grad = weight.grad, None
        try:
            blocked = conv2d(enter(x.to(dtype)), weight, bias, (1, 1), (1, 1))
            pooled = leave(max_pool2d(F.relu(blocked), 3, 2, (0, 0))).float()
            pooled.square().sum().backward()  # type: ignore[no-untyped-call]
        except RuntimeError:  # e.g. a CPU without this dtype
            return False
    assert weight.grad is not None and expected is not None
    scale = float(expected.abs().max())
    close = torch.allclose(pooled, ordinary, rtol=0.05, atol=0.1)
    return close and torch.allclose(weight.grad, expected, rtol=0.1, atol=0.05 * scale)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair) -> Tensor:
    packed = weight.to(x.dtype).contiguous().to_mkldnn()
    return F.conv2d(x, packed, bias.to(x.dtype).to_mkldnn(), stride, padding)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return _forward(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        low = weight.to(x.dtype)
        to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
            gradients[0], x, low, [len(weight)], ctx.stride, ctx.padding, (1, 1),
            False, (0, 0), 1, [ctx.needs_input_grad[0], True, True],
        )  # fmt: skip
        return to_x, _ordinary(to_weight, weight), _ordinary(to_bias, weight), None, None


def _ordinary(gradient: Tensor, weight: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_mkldnn else gradient).to(weight.dtype)
