"""A policy's weights as one buffer, for the actor hosts."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from asyncagent.cuda import wait_for
from asyncagent.errors import WireError
from asyncagent.policy import Snapshot

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Precision = Literal["float32", "bfloat16"]


def num_weights(net: nn.Module) -> int:
    """Numbers in a buffer of this net's weights."""
    return sum(tensor.numel() for tensor in _tensors(net))


def encode_weights(snapshot: Snapshot, precision: Precision) -> np.ndarray[Any, Any]:
    """uint8 [n]: all weights, one after the other; waits for their device."""
    wait_for(snapshot.ready)
    tensors = (*snapshot.parameters, *snapshot.buffers)
    together = torch.cat([tensor.reshape(-1).to(_DTYPES[precision]) for tensor in tensors])
    encoded: np.ndarray[Any, Any] = together.cpu().view(torch.uint8).numpy()
    return encoded


def decode_weights(net: nn.Module, part: Any, precision: Precision) -> None:
    """Write the weights to ``net``; WireError, and nothing written, if they do not fit it."""
    dtype = _DTYPES[precision]
    size = len(memoryview(part).cast("B"))
    expected = num_weights(net) * dtype.itemsize
    if size != expected:
        raise WireError(f"weights of {size} bytes, but this net has {expected}")
    values = torch.from_numpy(np.frombuffer(part, np.uint8).copy()).view(dtype)
    if not bool(torch.isfinite(values).all()):
        raise WireError("weights are not finite")
    tensors = _tensors(net)
    pieces = torch.split(values, [tensor.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
