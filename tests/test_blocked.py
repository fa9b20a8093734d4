"""The blocked layout computes what ordinary tensors do, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from asyncagent import blocked
from asyncagent.bodies import Conv2dSame, DeepBody, ShallowBody, max_pool_same
from asyncagent.structs import ArraySpec

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this torch has no oneDNN",
)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def test_float32_is_available() -> None:
    """Where torch has oneDNN, its float32 operators pass the trial."""
    assert blocked.is_available(torch.float32)


def test_a_dtype_that_fails_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises, or computes something else, is not used."""

    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError("no such instruction")

    def blur(x: Tensor) -> Tensor:
        return x.flip(-1).contiguous().to_mkldnn()

    for enter in (refuse, blur):
        monkeypatch.setattr(blocked, "enter", enter)
        assert not blocked.is_available.__wrapped__(torch.float32)


@pytest.mark.parametrize("size", [(84, 84), (21, 21), (9, 16), (11, 12)])
@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (4, 2), (3, 2), (3, 1)])
def test_convolution_and_gradients(size: tuple[int, int], kernel: int, stride: int) -> None:
    """Same padding, odd or even, is the same in both layouts; so is every gradient."""
    torch.manual_seed(0)
    conv = Conv2dSame(3, 16, kernel, stride, scale=0.5)
    x = torch.randn(2, 3, *size, requires_grad=True)
    inputs = [x, conv.weight, conv.bias]
    ordinary, inside = conv(x), blocked.leave(conv(blocked.enter(x)))
    torch.testing.assert_close(inside, ordinary, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(gradients(inside, inputs), gradients(ordinary, inputs), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(84, 84), (21, 21), (84, 21), (11, 42)])
def test_pooling_and_gradient(size: tuple[int, int]) -> None:
    """Even and odd sizes, mixed too; negative, so that a padding with 0 would show."""
    torch.manual_seed(0)
    x = (-torch.rand(2, 16, *size) - 1).requires_grad_()
    ordinary, inside = max_pool_same(x), blocked.leave(max_pool_same(blocked.enter(x)))
    torch.testing.assert_close(inside, ordinary)
    torch.testing.assert_close(gradients(inside, [x]), gradients(ordinary, [x]))


@pytest.mark.parametrize("shape", [(4, 84, 84), (36, 48, 3)])
@pytest.mark.parametrize("make", [ShallowBody, DeepBody])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bodies_are_the_same_in_either_layout(
    make: Callable[[ArraySpec], nn.Module], shape: tuple[int, ...], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Features and gradients of a whole body agree, or are as near to float32's."""
    if not blocked.is_available(dtype):
        pytest.skip(f"no {dtype} in the blocked layout here")
    torch.manual_seed(0)
    body = make(ArraySpec(shape, "uint8")).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randint(0, 256, (8, *shape), dtype=torch.uint8)
    enter = blocked.enter
    times_entered = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal times_entered
        times_entered += 1
        return enter(x)

    def run(dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = body(x).float()
        return [features.detach(), *gradients(features, list(body.parameters()))]

    monkeypatch.setattr(blocked, "enter", counted)
    inside = run(dtype)
    assert times_entered == 1
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        torch.testing.assert_close(body(x).float(), inside[0])
    monkeypatch.setattr(blocked, "is_available", lambda dtype: False)
    ordinary, exact = run(dtype), run(torch.float32)
    assert times_entered == 2
    for got, other, truth in zip(inside, ordinary, exact, strict=True):
        assert (got - truth).norm() <= 1.25 * (other - truth).norm() + 1e-4 * truth.norm()
