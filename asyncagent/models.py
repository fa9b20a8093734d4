"""The networks: a body for the observation, an optional LSTM, and float32 heads.

A net, ours or the user's, is an ``nn.Module`` with

* ``initial_state(num_rows) -> core_state``: nest of float32 [num_rows, ...]; ``()`` without
  recurrence;
* ``forward(observation, reward, last_action, first, core_state) -> NetOutput`` over time-major
  rows ``[T, N, ...]`` (acting is ``T = 1``), zeroing the core state before every row whose
  ``first`` is True.  ``observation`` is a nest of tensors as ``EnvSpec.observation`` says.

``make_net`` accepts ``module:callable`` where ``callable(spec: EnvSpec, use_lstm: bool)`` builds
such a module, and checks what it answers before anything runs.  Convolutions and matrix products
run in bfloat16 when the caller opens an autocast region; heads always compute in float32.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asyncagent.bodies import (
    AncestorBody,
    Body,
    DeepBody,
    JoinedBody,
    MixedBody,
    MlpBody,
    ShallowBody,
    has_image,
    linear,
    make_body,
)
from asyncagent.distributions import encode, num_inputs
from asyncagent.errors import CheckpointError, UsageError
from asyncagent.lstm import LstmCore
from asyncagent.structs import ActionSpace, ArraySpec, Box, EnvSpec, Nest, map_nest


class NetOutput(NamedTuple):
    """What a net answers for rows [T, N]."""

    logits: Tensor
    """float32 [T, N, A]."""
    values: Tensor
    """float32 [T, N]."""
    core_state: Nest
    """State after the last row, float32 [N, ...] per leaf."""


class GaussianHead(nn.Module):
    """Logits of a ``Box``: means of the features, deviations that are the same in every state."""

    def __init__(self, num_inputs: int, num_dims: int) -> None:
        super().__init__()
        self.mean = linear(num_inputs, num_dims, gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(num_dims))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        return torch.cat([mean, self.log_std.expand_as(mean)], dim=-1)


class ActorCritic(nn.Module):
    """Body, optional LSTM core, and float32 policy and value heads.

    The core also sees the last reward, clipped to +-1, and the last action.
    """

    def __init__(self, body: Body, actions: ActionSpace, lstm_units: int) -> None:
        """``lstm_units`` of 0 leaves the LSTM out."""
        super().__init__()
        self.body = body
        self.actions = actions
        num_features = body.num_features + 1 + num_inputs(actions)
        self.core = LstmCore(num_features, lstm_units) if lstm_units else None
        head_inputs = lstm_units or body.num_features
        self.policy: nn.Module
        if isinstance(actions, Box):
            self.policy = GaussianHead(head_inputs, actions.num_dims)
        else:
            self.policy = linear(head_inputs, actions.num_logits, gain=0.01)
        self.baseline = linear(head_inputs, 1, gain=1.0)

    def initial_state(self, num_rows: int) -> Nest:
        """Zeros, float32 [num_rows, units] for hidden and cell; () without LSTM."""
        if self.core is None:
            return ()
        return tuple(torch.zeros(num_rows, self.core.num_units) for _ in range(2))

    def low_precision_parameters(self) -> set[str]:
        """Names of the parameters whose inference copy may be held in bfloat16."""
        return {
            name
            for name, _ in self.named_parameters()
            if not name.startswith(("policy.", "baseline."))
        }

    def forward(
        self, observation: Nest, reward: Tensor, last_action: Tensor, first: Tensor,
        core_state: Nest,
    ) -> NetOutput:  # fmt: skip
        """See the module's docstring; observation and last_action [T, N, ...], the rest [T, N]."""
        steps, rows = reward.shape
        features = self.body(map_nest(lambda leaf: leaf.flatten(0, 1), observation))
        features = features.view(steps, rows, -1)
        if self.core is not None:
            extras = (reward.clamp(-1, 1).unsqueeze(-1), encode(self.actions, last_action))
            seen = [features, *(extra.to(features.dtype) for extra in extras)]
            features, core_state = self.core(torch.cat(seen, dim=-1), first, core_state)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            logits = self.policy(features)
            values = self.baseline(features).squeeze(-1)
        return NetOutput(logits, values, core_state)


def forward(
    net: nn.Module, batch: Nest, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A learner's pass: logits float32 [T+1, B, A] and values float32 [T+1, B].

    Args:
      batch: an Unroll of tensors on ``device``.
      dtype: of convolutions and matrix products.
    """
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = net(
            batch.observation, batch.reward, batch.last_action, batch.first, batch.core_state
        )
    return output[0].float(), output[1].float()  # a user's heads may answer in bfloat16 here


class _Kind(NamedTuple):
    image_body: Callable[[ArraySpec], Body]
    lstm_units: int
    needs_image: bool


NETS: dict[str, _Kind] = {
    "auto": _Kind(ShallowBody, 256, False),
    "shallow": _Kind(ShallowBody, 256, True),
    "deep": _Kind(DeepBody, 256, True),
    "ancestor": _Kind(AncestorBody, 512, True),
    "mlp": _Kind(MlpBody, 128, False),
}


def make_net(name: str, spec: EnvSpec, use_lstm: bool, seed: int) -> nn.Module:
    """Build a network on the CPU with weights from ``seed``, and check that it keeps its contract.

    Raises:
      UsageError: an observation that the net cannot take, or a user's net that cannot be imported
        or does not answer as the module's docstring says.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name not in NETS:
            net = _users_net(name, spec, use_lstm)
        else:
            kind = NETS[name]
            if kind.needs_image and not has_image(spec.observation):
                raise UsageError(
                    f"net={name} takes images; there is none in {spec.observation}: use --net=mlp"
                )
            body = make_body(spec.observation, kind.image_body)
            if not use_lstm and isinstance(body, JoinedBody):
                body = MixedBody(body)
            net = ActorCritic(body, spec.actions, kind.lstm_units if use_lstm else 0)
    check_net(net, spec, name)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _users_net(name: str, spec: EnvSpec, use_lstm: bool) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's path begins with its own folder
    try:
        build = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise UsageError(
            f"net={name}: {_brief(error)}; give module:callable, importable from here"
        ) from error
    try:
        net = build(spec, use_lstm)
    except Exception as error:
        raise UsageError(f"net={name} cannot be built: {_brief(error)}") from error
    if not isinstance(net, nn.Module):
        raise UsageError(f"net={name} built {type(net).__name__}, not a torch.nn.Module")
    return net


def load_weights(net: nn.Module, state: dict[str, Any]) -> None:
    """Load a checkpoint's weights; CheckpointError, one line, where they are another net's."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"the checkpoint's weights are another net's: {' '.join(lines[1:3])}"
        ) from None


def _brief(error: Exception) -> str:
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first}"


def example_inputs(spec: EnvSpec, steps: int, rows: int) -> tuple[Nest, Tensor, Tensor, Tensor]:
    """Zero observation, reward, last_action and first of shape [steps, rows, ...]."""

    def zeros(leaf: ArraySpec) -> Tensor:
        return torch.zeros(steps, rows, *leaf.shape, dtype=getattr(torch, leaf.dtype))

    return (
        map_nest(zeros, spec.observation),
        torch.zeros(steps, rows),
        zeros(spec.actions.array),
        torch.zeros(steps, rows, dtype=torch.bool),
    )


def check_net(net: nn.Module, spec: EnvSpec, name: str) -> None:
    """UsageError, naming what is wrong, unless ``net`` keeps the contract for T=2, N=3."""
    steps, rows = 2, 3
    try:
        state = net.initial_state(rows)  # type: ignore[operator]
        with torch.no_grad():
            output = NetOutput(*net(*example_inputs(spec, steps, rows), state))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"net={name} failed on rows [T=2, N=3]: {_brief(error)}") from error
    wanted = (steps, rows, spec.actions.num_logits)
    if tuple(output.logits.shape) != wanted or output.logits.dtype != torch.float32:
        raise UsageError(
            f"net={name}: logits are {output.logits.dtype} {tuple(output.logits.shape)}, "
            f"must be torch.float32 {wanted}"
        )
    if tuple(output.values.shape) != wanted[:2] or output.values.dtype != torch.float32:
        raise UsageError(
            f"net={name}: values are {output.values.dtype} {tuple(output.values.shape)}, "
            f"must be torch.float32 {wanted[:2]}"
        )
    before = map_nest(lambda leaf: (tuple(leaf.shape), leaf.dtype), state)
    after = map_nest(lambda leaf: (tuple(leaf.shape), leaf.dtype), output.core_state)
    if before != after:
        raise UsageError(f"net={name}: core_state comes back as {after}, was given as {before}")
