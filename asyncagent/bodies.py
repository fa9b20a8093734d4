"""What the networks are built of: layers, and bodies that make features of observations.

A body makes features [N, num_features] of the rows [N, ...] of an observation.  Of an observation
of several arrays each has a body of its own (images a convolutional one, sentences
``SentenceBody``, all else ``MlpBody``), and their features stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asyncagent import blocked
from asyncagent.lstm import LstmCore
from asyncagent.structs import ArraySpec, Nest


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
        if blocked.is_blocked(x):
            # A filter with zeros before it, and as much more padding there, sees the same.
            weight = F.pad(weight, (right - left, 0, bottom - top, 0))
            return blocked.conv2d(
                x, weight, cast(Tensor, self.bias), (stride, stride), (bottom, right)
            )
        if top == bottom and left == right:
            return F.conv2d(x, weight, self.bias, stride, (top, left))
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, self.bias, stride)


def image_layout(spec: ArraySpec) -> tuple[int, int, int, bool]:
    """(channels, height, width, channels_first) of a rank-3 observation.

    The channel axis is the one that differs in a square picture, else the smaller of the first and
    the last.
    """
    first, middle, last = spec.shape
    square_first = first == middle != last
    if first <= last and not square_first:
        return first, middle, last, True
    return last, first, middle, False


def pixel_conv(spec: ArraySpec, out_channels: int, kernel: int, stride: int) -> Conv2dSame:
    """The first convolution of an image network: takes bytes 0..255, other numbers as they are."""
    scale = 1 / 255 if spec.dtype == "uint8" else 1.0
    conv = Conv2dSame(image_layout(spec)[0], out_channels, kernel, stride, scale)
    conv.start_blind_to_brightness()
    return conv


def max_pool_same(x: Tensor) -> Tensor:
    """Max-pooling 3x3 with stride 2 and TensorFlow's "SAME" padding.

    An even size is padded by (0, 1), which is what ceil_mode does; an odd one by (1, 1).
    """
    height, width = x.shape[-2:]
    padding = (height % 2, width % 2)
    if blocked.is_blocked(x):
        return blocked.max_pool2d(x, 3, 2, padding)
    return F.max_pool2d(x, 3, 2, padding=padding, ceil_mode=True)


def linear(in_features: int, out_features: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Linear layer with orthogonal weights of the given gain and zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Frames(nn.Module):
    """Images [N, ...] in the engine's layout to floats [N, C, H, W] of the same numbers.

    They come as channels_last, or, on a CPU where it works, in oneDNN's blocked layout.
    """

    def __init__(self, channels_first: bool, block: bool) -> None:
        """``block`` asks for the blocked layout: whoever does, leaves it through ``Features``."""
        super().__init__()
        self.channels_first = channels_first
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if not self.channels_first:
            x = x.permute(0, 3, 1, 2)
        x = x.to(dtype)  # a step of its own: with the transposition it measured 2.3 times slower
        if self.block and kind == "cpu" and blocked.is_available(dtype):
            return blocked.enter(x)
        return x.contiguous(memory_format=torch.channels_last)


class Features(nn.Module):
    """Images [N, C, H, W] of a network to features [N, C * H * W], in the order C, H, W."""

    def forward(self, x: Tensor) -> Tensor:
        return (blocked.leave(x) if blocked.is_blocked(x) else x).flatten(1)


class FeaturesLast(nn.Module):
    """The same in the order H, W, C, which costs channels_last no copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class Body(nn.Module):
    """Makes features float [N, num_features] of rows [N, ...]."""

    num_features: int
    layers: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


class ShallowBody(Body):
    """The paper's shallow network: conv 8x8/4 with 16, conv 4x4/2 with 32, linear 256."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        _, height, width, channels_first = image_layout(spec)
        self.num_features = 256
        self.layers = nn.Sequential(
            Frames(channels_first, block=True),
            pixel_conv(spec, 16, 8, 4),
            nn.ReLU(),
            Conv2dSame(16, 32, 4, 2),
            nn.ReLU(),
            Features(),
            linear(32 * math.ceil(height / 8) * math.ceil(width / 8), 256),
            nn.ReLU(),
        )


class AncestorBody(Body):
    """The ancestor's: conv 8x8/4 with 32, 4x4/2 with 64, 3x3/2 with 128, linear 512."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        _, height, width, channels_first = image_layout(spec)
        self.num_features = 512
        self.layers = nn.Sequential(
            Frames(channels_first, block=False),
            pixel_conv(spec, 32, 8, 4),
            nn.ReLU(),
            Conv2dSame(32, 64, 4, 2),
            nn.ReLU(),
            Conv2dSame(64, 128, 3, 2),
            nn.ReLU(),
            FeaturesLast(),
            linear(128 * math.ceil(height / 16) * math.ceil(width / 16), 512),
            nn.ReLU(),
        )


class ResidualBlock(nn.Module):
    """relu, conv, relu, conv, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2dSame(channels, channels, 3, 1)
        self.conv2 = Conv2dSame(channels, channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.conv2(F.relu(self.conv1(F.relu(x)))))


class DeepBody(Body):
    """The paper's deep network: three sections of 16, 32, 32 channels, linear 256."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        channels, height, width, channels_first = image_layout(spec)
        self.num_features = 256
        layers: list[nn.Module] = [Frames(channels_first, block=True)]
        for depth in (16, 32, 32):
            first = len(layers) == 1
            conv = pixel_conv(spec, depth, 3, 1) if first else Conv2dSame(channels, depth, 3, 1)
            layers += [conv, MaxPoolSame(), ResidualBlock(depth), ResidualBlock(depth)]
            channels = depth
        flat = 32 * math.ceil(height / 8) * math.ceil(width / 8)
        layers += [nn.ReLU(), Features(), linear(flat, 256), nn.ReLU()]
        self.layers = nn.Sequential(*layers)


class MaxPoolSame(nn.Module):
    """``max_pool_same`` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool_same(x)


class MlpBody(Body):
    """Two linear layers of 128 over any array, flattened; its numbers as they are."""

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        self.num_features = 128
        self.layers = nn.Sequential(
            linear(math.prod(spec.shape), 128), nn.ReLU(), linear(128, 128), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x.reshape(x.shape[0], -1).float()))


class SentenceBody(Body):
    """The ancestor's instruction encoder: embedding 20, LSTM 64, its output at the last word.

    Rows [N, L] hold token numbers from 1, then zeros.  An empty sentence gives zeros.
    """

    def __init__(self, spec: ArraySpec) -> None:
        super().__init__()
        self.num_features = 64
        self.embedding = nn.Embedding(spec.num_tokens + 1, 20)
        self.core = LstmCore(20, self.num_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.encode(x)  # nothing may be read back while a graph is recorded
        # Most levels say nothing. Reading the longest length back costs less than a word does.
        x = x[:, : max(1, int((x > 0).any(0).sum()))]
        # Most rows of a batch say the same.
        sentences, which = torch.unique(x, dim=0, return_inverse=True)
        return self.encode(sentences)[which]

    def encode(self, sentences: Tensor) -> Tensor:
        """``forward``, word by word for every row."""
        lengths = (sentences > 0).sum(-1)
        words = self.embedding(sentences.t().long())
        first = torch.zeros_like(words[..., 0], dtype=torch.bool)
        state = torch.zeros(sentences.shape[0], self.num_features, device=sentences.device)
        outputs, _ = self.core(words, first, (state, state))
        last = (lengths - 1).clamp(min=0).view(1, -1, 1).expand(1, -1, self.num_features)
        return torch.where(lengths[:, None] > 0, outputs.gather(0, last)[0], 0)


class JoinedBody(Body):
    """A body for each array of an observation, in optree's order; their features side by side.

    ``MixedBody`` around it where no LSTM follows: heads of one linear layer cannot tell what only
    two arrays together say.
    """

    def __init__(self, parts: list[Body]) -> None:
        super().__init__()
        self.num_features = sum(part.num_features for part in parts)
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Nest) -> Tensor:
        leaves = optree.tree_leaves(x)
        return torch.cat([f(leaf) for f, leaf in zip(self.parts, leaves, strict=True)], dim=-1)


class MixedBody(Body):
    """A linear layer of 256 over another body's features."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.num_features = 256
        self.layers = nn.Sequential(body, linear(body.num_features, 256), nn.ReLU())


def has_image(observation: Nest) -> bool:
    """Whether a nest of ArraySpec has an image: an array of rank 3."""
    return any(len(leaf.shape) == 3 for leaf in optree.tree_leaves(observation))


def make_body(observation: Nest, image_body: Callable[[ArraySpec], Body]) -> Body:
    """The body for a nest of ArraySpec, which sees images as ``image_body`` does."""

    def body_of(spec: ArraySpec) -> Body:
        if spec.num_tokens > 0:
            return SentenceBody(spec)
        return image_body(spec) if has_image(spec) else MlpBody(spec)

    if isinstance(observation, ArraySpec):
        return body_of(observation)
    return JoinedBody([body_of(spec) for spec in optree.tree_leaves(observation)])
