"""The networks: a body per kind of observation, an optional LSTM, and float32 heads.

A net, ours or the user's, is an ``nn.Module`` with

* ``initial_state(num_rows) -> core_state``: nest of float32 [num_rows, ...]; ``()`` without
  recurrence;
* ``forward(observation, reward, last_action, first, core_state) -> NetOutput`` over time-major
  rows ``[T, N, ...]`` (acting is ``T = 1``), zeroing the core state before every row whose
  ``first`` is True.

``make_net`` accepts ``module:callable`` where ``callable(spec: EnvSpec, use_lstm: bool)`` builds
such a module, and checks what it answers before anything runs.  Convolutions and matrix products
run in bfloat16 when the caller opens an autocast region; heads always compute in float32.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asyncagent.errors import CheckpointError, UsageError
from asyncagent.structs import ArraySpec, EnvSpec, Nest, map_nest


class NetOutput(NamedTuple):
    """What a net answers for rows [T, N]."""

    logits: Tensor
    """float32 [T, N, A]."""
    values: Tensor
    """float32 [T, N]."""
    core_state: Nest
    """State after the last row, float32 [N, ...] per leaf."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" padding (before, after) of one dimension; the odd one goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: output size is ceil(input / stride)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, scale: float = 1.0
    ) -> None:
        """``scale`` multiplies the input; bytes times 1/255 cost nothing when folded in here."""
        super().__init__(in_channels, out_channels, kernel, stride)
        self.scale = scale
        nn.init.orthogonal_(self.weight, math.sqrt(2))
        nn.init.zeros_(cast(Tensor, self.bias))

    def start_blind_to_brightness(self, gain: float = 4.0) -> None:
        """Take each filter's mean out and amplify what is left: for a layer that sees pixels.

        A game's picture is mostly constant background.  A filter with a mean answers to that
        above all, and whatever moves drowns in it: fitting the value of random Pong play took
        more than twice as many updates without this.
        """
        with torch.no_grad():
            self.weight -= self.weight.mean((1, 2, 3), keepdim=True)
            self.weight *= gain

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x.shape[-2], kernel, stride)
        left, right = same_padding(x.shape[-1], kernel, stride)
        weight = self.weight if self.scale == 1.0 else self.weight * self.scale
        if top == bottom and left == right:
            return F.conv2d(x, weight, self.bias, stride, (top, left))
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, self.bias, stride)


def pixel_conv(channels: int, out_channels: int, kernel: int, stride: int) -> Conv2dSame:
    """The first convolution of an image network: takes bytes 0..255."""
    conv = Conv2dSame(channels, out_channels, kernel, stride, scale=1 / 255)
    conv.start_blind_to_brightness()
    return conv


def max_pool_same(x: Tensor) -> Tensor:
    """Max-pooling 3x3 with stride 2 and TensorFlow's "SAME" padding.

    An even size is padded by (0, 1), which is what ceil_mode does; an odd one by (1, 1).
    """
    height, width = x.shape[-2:]
    if height % 2 == width % 2:
        odd = height % 2
        return F.max_pool2d(x, 3, 2, padding=odd, ceil_mode=not odd)
    top, bottom = same_padding(height, 3, 2)
    left, right = same_padding(width, 3, 2)
    return F.max_pool2d(F.pad(x, (left, right, top, bottom), value=-math.inf), 3, 2)


def linear(in_features: int, out_features: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def image_layout(spec: ArraySpec) -> tuple[int, int, int, bool]:
    """(channels, height, width, channels_first) of a rank-3 observation.

    The channel axis is the smaller of the first and the last.
    """
    first, middle, last = spec.shape
    if first <= last:
        return first, middle, last, True
    return last, first, middle, False


class Frames(nn.Module):
    """uint8 images [N, ...] in the engine's layout to channels_last floats 0..255."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if not self.channels_first:
            x = x.permute(0, 3, 1, 2)
        # In two steps: converting and transposing at once measured 2.3 times slower on a CPU.
        return x.to(dtype).contiguous(memory_format=torch.channels_last)


class ShallowBody(nn.Module):
    """The paper's shallow network: conv 8x8/4 with 16, conv 4x4/2 with 32, linear 256."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        channels, height, width, channels_first = image_layout(spec)
        self.num_features = 256
        self.layers = nn.Sequential(
            Frames(channels_first),
            pixel_conv(channels, 16, 8, 4),
            nn.ReLU(),
            Conv2dSame(16, 32, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            linear(32 * math.ceil(height / 8) * math.ceil(width / 8), 256),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


class AncestorBody(nn.Module):
    """The ancestor's: conv 8x8/4 with 32, 4x4/2 with 64, 3x3/2 with 128, linear 512."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        channels, height, width, channels_first = image_layout(spec)
        self.num_features = 512
        self.layers = nn.Sequential(
            Frames(channels_first),
            pixel_conv(channels, 32, 8, 4),
            nn.ReLU(),
            Conv2dSame(32, 64, 4, 2),
            nn.ReLU(),
            Conv2dSame(64, 128, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
            linear(128 * math.ceil(height / 16) * math.ceil(width / 16), 512),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


class ResidualBlock(nn.Module):
    """relu, conv, relu, conv, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2dSame(channels, channels, 3, 1)
        self.conv2 = Conv2dSame(channels, channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.conv2(F.relu(self.conv1(F.relu(x)))))


class DeepBody(nn.Module):
    """The paper's deep network: three sections of 16, 32, 32 channels, linear 256."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        channels, height, width, channels_first = image_layout(spec)
        self.num_features = 256
        layers: list[nn.Module] = [Frames(channels_first)]
        for depth in (16, 32, 32):
            first = len(layers) == 1
            conv = pixel_conv(channels, depth, 3, 1) if first else Conv2dSame(channels, depth, 3, 1)
            layers += [conv, MaxPoolSame(), ResidualBlock(depth), ResidualBlock(depth)]
            channels = depth
        flat = 32 * math.ceil(height / 8) * math.ceil(width / 8)
        layers += [nn.ReLU(), nn.Flatten(), linear(flat, 256), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


class MaxPoolSame(nn.Module):
    """``max_pool_same`` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool_same(x)


class MlpBody(nn.Module):
    """Two linear layers of 128 over a flattened observation."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        self.num_features = 128
        self.layers = nn.Sequential(
            linear(math.prod(spec.shape), 128), nn.ReLU(), linear(128, 128), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x.flatten(1).float()))


class LstmCore(nn.Module):
    """LSTM over [T, N, F] that zeroes its state before rows that open an episode.

    The input projection of all T*N rows is one matrix product; the cell stays in float32.
    The forget gate's bias starts at 1, as TensorFlow's.
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
        hidden, cell = core_state
        keep = (~first).unsqueeze(-1).to(cell.dtype)
        projected = self.inputs(features)
        outputs = []
        for t in range(features.shape[0]):
            hidden, cell = hidden * keep[t], cell * keep[t]
            gates = (projected[t] + self.recurrent(hidden)).float()
            i, f, g, o = gates.chunk(4, dim=-1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)


class ActorCritic(nn.Module):
    """Body, optional LSTM core, and float32 policy and value heads.

    The core also sees the last reward, clipped to +-1, and the one-hot last action.
    """

    def __init__(
        self, body: nn.Module, num_features: int, num_actions: int, lstm_units: int
    ) -> None:
        """``lstm_units`` of 0 leaves the LSTM out."""
        super().__init__()
        self.body = body
        self.num_actions = num_actions
        self.core = LstmCore(num_features + 1 + num_actions, lstm_units) if lstm_units else None
        head_inputs = lstm_units or num_features
        self.policy = linear(head_inputs, num_actions, gain=0.01)
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
        self, observation: Tensor, reward: Tensor, last_action: Tensor, first: Tensor,
        core_state: Nest,
    ) -> NetOutput:  # fmt: skip
        """See the module's docstring; observation [T, N, ...], the rest [T, N]."""
        steps, rows = reward.shape
        features = self.body(observation.flatten(0, 1))
        if self.core is not None:
            extras = torch.cat(
                [
                    reward.clamp(-1, 1).reshape(-1, 1).to(features.dtype),
                    F.one_hot(last_action.flatten(), self.num_actions).to(features.dtype),
                ],
                dim=-1,
            )
            inputs = torch.cat([features, extras], dim=-1).view(steps, rows, -1)
            features, core_state = self.core(inputs, first, core_state)
            features = features.flatten(0, 1)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            logits = self.policy(features).view(steps, rows, -1)
            values = self.baseline(features).view(steps, rows)
        return NetOutput(logits, values, core_state)


class _Kind(NamedTuple):
    body: Callable[[ArraySpec], nn.Module]
    lstm_units: int
    image: bool


NETS: dict[str, _Kind] = {
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
            if not isinstance(spec.observation, ArraySpec) or (
                kind.image and len(spec.observation.shape) != 3
            ):
                raise UsageError(
                    f"net={name} takes images; {spec.observation} is none: use --net=mlp"
                )
            body = kind.body(spec.observation)
            units = kind.lstm_units if use_lstm else 0
            features = cast(int, body.num_features)
            net = ActorCritic(body, features, spec.actions.num_logits, units)
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
    observation = map_nest(
        lambda leaf: torch.zeros(steps, rows, *leaf.shape, dtype=getattr(torch, leaf.dtype)),
        spec.observation,
    )
    return (
        observation,
        torch.zeros(steps, rows),
        torch.zeros(steps, rows, dtype=torch.int64),
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
