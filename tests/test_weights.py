"""Weights as one buffer: what one net writes another reads, or nothing changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asyncagent.errors import WireError
from asyncagent.models import make_net
from asyncagent.policy import Snapshot
from asyncagent.structs import ArraySpec, Discrete, EnvSpec
from asyncagent.weights import Precision, decode_weights, encode_weights, num_weights


class Mixed(nn.Module):
    """Parameters of several ranks, one in channels-last order, and buffers of several dtypes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.randn((), generator=generator))
        kernel = torch.randn(4, 3, 2, 2, generator=generator)
        self.kernel = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        self.register_buffer("mean", torch.randn(5, generator=generator))
        self.register_buffer("count", torch.tensor(seed))


def snapshot(net: nn.Module) -> Snapshot:
    copies = [tensor.detach().clone() for tensor in (*net.parameters(), *net.buffers())]
    number = len(list(net.parameters()))
    return Snapshot(3, tuple(copies[:number]), tuple(copies[number:]), None)


def values(net: nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (*net.parameters(), *net.buffers())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_float32_is_exact() -> None:
    """In float32 every weight and buffer arrives as it was, in any order of memory."""
    learner, host = Mixed(7), Mixed(8)
    part = encode_weights(snapshot(learner), "float32")
    assert part.dtype == np.uint8 and part.shape == (4 * num_weights(learner),)
    assert num_weights(learner) == 1 + 48 + 5 + 1
    decode_weights(host, part.data, "float32")
    assert same(values(host), values(learner))
    assert host.count.dtype == torch.int64


def test_bfloat16_is_half_the_size() -> None:
    """In bfloat16 two bytes per weight travel, and arrive rounded to it."""
    learner, host = Mixed(7), Mixed(8)
    part = encode_weights(snapshot(learner), "bfloat16")
    assert part.nbytes == 2 * num_weights(learner)
    decode_weights(host, part.data, "bfloat16")
    rounded = [x.to(torch.bfloat16).to(x.dtype) for x in values(learner)]
    assert same(values(host), rounded)


def test_low_precision_snapshots_travel() -> None:
    """Weights published in bfloat16 arrive as what they are, in either precision."""
    learner, host = Mixed(1), Mixed(2)
    low = snapshot(learner)
    low = low._replace(parameters=tuple(x.to(torch.bfloat16) for x in low.parameters))
    for precision in ("float32", "bfloat16"):
        part = encode_weights(low, precision)
        decode_weights(host, part.data, precision)
        for found, sent in zip(host.parameters(), low.parameters, strict=True):
            assert torch.equal(found.detach(), sent.to(torch.float32))


def test_a_real_net() -> None:
    """Two nets of other seeds compute the same once weights have travelled; unaligned bytes do."""
    spec = EnvSpec(ArraySpec((3,), "float32"), Discrete(2), 1)
    learner, host = (make_net("mlp", spec, use_lstm=True, seed=seed) for seed in (1, 2))
    part = encode_weights(snapshot(learner), "float32")
    odd = memoryview(b"x" + part.tobytes())[1:]
    decode_weights(host, odd, "float32")
    assert same(values(host), values(learner))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [-4, -1, 1, 4, None])
def test_other_sizes_are_refused(precision: Precision, change: int | None) -> None:
    """Another size is a WireError that names both sizes, and the net stays as it was."""
    net = Mixed(3)
    before = values(net)
    part = encode_weights(snapshot(Mixed(4)), precision).tobytes()
    wrong = b"" if change is None else (part + bytes(4))[: len(part) + change]
    with pytest.raises(
        WireError, match=rf"^weights of {len(wrong)} bytes, but this net has {len(part)}$"
    ):
        decode_weights(net, wrong, precision)
    assert same(values(net), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_numbers_gone_wrong_are_refused(precision: Precision, bad: float) -> None:
    """One weight that is not finite: a WireError, and no weight at all is written."""
    net, other = Mixed(3), Mixed(4)
    before = values(net)
    broken: Any = other.mean
    broken[-1] = bad
    part = encode_weights(snapshot(other), precision)
    with pytest.raises(WireError, match=r"^weights are not finite$"):
        decode_weights(net, part.data, precision)
    assert same(values(net), before)


def test_the_part_is_not_held_on_to() -> None:
    """Who reuses the received buffer afterwards does not change the net."""
    net, other = Mixed(3), Mixed(4)
    part = bytearray(encode_weights(snapshot(other), "float32"))
    decode_weights(net, part, "float32")
    part[:] = bytes(len(part))
    assert same(values(net), values(other))
