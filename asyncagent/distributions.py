"""How a policy's A numbers per row ("logits") describe the distribution of its action.

- ``Discrete``: a softmax.
- ``MultiDiscrete``: a softmax for each choice, independent of each other, so that the joint
  log-probability and the entropy are sums over the choices.
- ``Box``: a Gaussian for each dimension, likewise independent.  Nothing squashes it: environments
  clip what lies beyond their bounds, and the log-probability is that of the unclipped sample.
  Where dimensions are bounded, no gradient drives a mean that is beyond its bounds further out.

Logits of 0 stand for acting at random: equal chances, or Gaussians of mean 0 and deviation 1.

Shapes: ``...`` stands for any number of leading dimensions, A for ``space.num_logits``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asyncagent import vtrace
from asyncagent.structs import ActionSpace, Box, Discrete, MultiDiscrete

LOG_STD_RANGE = (-5.0, 2.0)
"""Bounds of the log of a Gaussian's standard deviation: 0.007 to 7.4 in units of the action."""


def log_prob(space: ActionSpace, logits: Tensor, action: Tensor) -> Tensor:
    """Joint log-probability (``Box``: log-density) [...], in at least float32.

    Args:
      logits: float [..., A].
      action: [...] + ``space.array.shape``, of the dtype that ``space.array`` says.
    """
    if isinstance(space, Discrete):
        return vtrace.action_log_probs(vtrace.log_probs(logits), action)
    if isinstance(space, MultiDiscrete):
        parts = zip(_parts(space, logits), action.unbind(-1), strict=True)
        return torch.stack([log_prob(one, part, choice) for (one, part), choice in parts]).sum(0)
    mean, log_std = _gaussian(space, logits)
    normal = (action - mean) * torch.exp(-log_std)
    return -(0.5 * normal.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def entropy(space: ActionSpace, logits: Tensor) -> Tensor:
    """Entropy [...] in nats of logits [..., A], in at least float32; of a ``Box`` it may be < 0."""
    if isinstance(space, Discrete):
        log_probs = vtrace.log_probs(logits)
        return -(log_probs.exp() * log_probs).sum(-1)
    if isinstance(space, MultiDiscrete):
        return torch.stack([entropy(one, part) for one, part in _parts(space, logits)]).sum(0)
    _, log_std = _gaussian(space, logits)
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def mode(space: ActionSpace, logits: Tensor) -> Tensor:
    """The likeliest action of logits [..., A]: [...] + ``space.array.shape``."""
    if isinstance(space, Discrete):
        return logits.argmax(-1)
    if isinstance(space, MultiDiscrete):
        return torch.stack([part.argmax(-1) for _, part in _parts(space, logits)], dim=-1)
    mean, _ = _gaussian(space, logits)
    return mean


def sample(space: ActionSpace, logits: Tensor, generator: torch.Generator) -> Tensor:
    """An action of logits [..., A] at random: [...] + ``space.array.shape``."""
    if isinstance(space, Box):
        mean, log_std = _gaussian(space, logits)
        return mean + log_std.exp() * torch.empty_like(mean).normal_(generator=generator)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    # Gumbel-max: argmax(logits + g) with g = -log(exponential) samples the softmax.
    return mode(space, logits - noise.log())


def acted_on(space: ActionSpace, logits: Tensor) -> Tensor:
    """``logits`` [..., A] with the numbers by which is acted: a ``Box``'s log_std in LOG_STD_RANGE.

    For those who act elsewhere; no gradient passes where a bound was broken.
    """
    if not isinstance(space, Box):
        return logits
    mean, log_std = logits.chunk(2, dim=-1)
    return torch.cat([mean, _bounded(log_std)], dim=-1)


def num_inputs(space: ActionSpace) -> int:
    """Numbers per action in ``encode``."""
    return space.num_dims if isinstance(space, Box) else space.num_logits


def encode(space: ActionSpace, action: Tensor) -> Tensor:
    """An action as a net sees it, float32 [..., num_inputs]: one-hot per choice; Box cut to +-1.

    Args:
      action: [...] + ``space.array.shape``, of the dtype that ``space.array`` says.
    """
    if isinstance(space, Discrete):
        return F.one_hot(action, space.num_actions).float()
    if isinstance(space, MultiDiscrete):
        parts = zip(space.sizes, action.unbind(-1), strict=True)
        return torch.cat([F.one_hot(choice, size) for size, choice in parts], dim=-1).float()
    return action.clamp(-1, 1)


def _parts(space: MultiDiscrete, logits: Tensor) -> Iterator[tuple[Discrete, Tensor]]:
    return zip(
        map(Discrete, space.sizes), torch.split(logits, list(space.sizes), dim=-1), strict=True
    )


def _gaussian(space: Box, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Means and bounded logs of the standard deviations, both [..., D]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mean, log_std = wide.chunk(2, dim=-1)
    if space.bounded:
        mean = _NoFurtherOut.apply(mean)  # type: ignore[no-untyped-call]
    # The gradient passes as if unbounded: what went beyond a bound can be pulled back.
    return mean, log_std + (_bounded(log_std) - log_std).detach()


def _bounded(log_std: Tensor) -> Tensor:
    return log_std.clamp(*LOG_STD_RANGE)


class _NoFurtherOut(torch.autograd.Function):
    """Means beyond a bound are left as they are, but no gradient drives them further out.

    Out there the environment clips every sample to the same action, and nothing that is learned
    from them would bring a mean back that has drifted away.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor) -> Tensor:
        ctx.save_for_backward(mean)
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (mean,) = ctx.saved_tensors
        (gradient,) = gradients
        # A step goes against the gradient.
        outwards = (mean.abs() > 1) & (gradient * mean < 0)
        return torch.where(outwards, 0.0, gradient)
