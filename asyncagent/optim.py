"""Optimisers, gradient clipping and the learning-rate schedule.

Learning rate, epsilon and clip of the IMPALA paper (arXiv 1802.01561, appendices) belong to
TensorFlow's RMSProp over *sum* losses; neither transfers to torch.optim.RMSprop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from asyncagent.config import Config


class RMSPropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow computes it (its ``ApplyRMSProp`` operator).

        ms  <- decay * ms + (1 - decay) * g**2            ms starts at one
        mom <- momentum * mom + lr * g / sqrt(ms + epsilon)
        p   <- p - mom

    torch.optim.RMSprop instead starts ms at zero, adds epsilon to the root, and applies the
    learning rate of the *current* step to the whole momentum.  ``param_groups[i]["lr"]`` may be
    changed between steps; a tensor of one float also between replays of a step that was recorded
    as a CUDA graph.  State per parameter: ``mean_square`` and, with momentum,
    ``momentum_buffer``, both in the parameter's memory layout.

    Where ``found_inf``, a tensor of one float, is 1, a step changes nothing, whatever the gradients
    hold, and nothing is read back to find that out; as with torch's fused optimisers.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        decay: float = 0.99,
        momentum: float = 0.0,
        epsilon: float = 0.1,
    ) -> None:
        """``params`` as any torch optimiser takes them; ValueError for an impossible number."""
        for name, value, good, bound in (
            ("lr", lr, lr >= 0, ">= 0"),
            ("decay", decay, 0 <= decay <= 1, "in [0, 1]"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("epsilon", epsilon, epsilon > 0, "> 0"),
        ):
            if not good:
                raise ValueError(f"{name}={value} must be {bound}")
        defaults = {"lr": lr, "decay": decay, "momentum": momentum, "epsilon": epsilon}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply one update to every parameter that has a gradient.

        Args:
          closure: computes the loss and its gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads = [p.grad for p in params]
        for p in params:
            if "mean_square" not in self.state[p]:
                self.state[p]["mean_square"] = torch.ones_like(p)
            if group["momentum"] > 0 and "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean_squares = [self.state[p]["mean_square"] for p in params]
        decay, momentum = group["decay"], group["momentum"]
        if self.found_inf is not None:
            skipped = self.found_inf.bool()
            grads = _zero_where(skipped, grads)
            decay, momentum = (
                torch.full_like(self.found_inf, factor).masked_fill(skipped, 1.0)
                for factor in (decay, momentum)
            )
        torch._foreach_mul_(mean_squares, decay)
        torch._foreach_addcmul_(mean_squares, grads, grads, value=1 - group["decay"])
        roots = torch._foreach_add(mean_squares, group["epsilon"])
        torch._foreach_sqrt_(roots)
        lr = group["lr"]
        if isinstance(lr, Tensor):
            grads, lr = list(torch._foreach_mul(grads, lr)), 1.0
        if group["momentum"] > 0:
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(momenta, momentum)
            torch._foreach_addcdiv_(momenta, grads, roots, value=lr)
            if self.found_inf is not None:
                momenta = list(torch._foreach_mul(momenta, 1 - self.found_inf))
            torch._foreach_sub_(params, momenta)
        else:
            torch._foreach_addcdiv_(params, grads, roots, value=-lr)


def _zero_where(skipped: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Copies of dense ``grads``, or zeros if ``skipped``, a bool scalar, is True.

    All in one piece: a launch for each of them would cost more than the rest of the step.
    """
    together = torch.cat([grad.as_strided((grad.numel(),), (1,)) for grad in grads])
    together.masked_fill_(skipped, 0.0)
    pieces = torch.split(together, [grad.numel() for grad in grads])
    return [
        piece.as_strided(grad.shape, grad.stride())
        for piece, grad in zip(pieces, grads, strict=True)
    ]


def make_optimizer(config: Config, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimiser that ``config.optimizer`` names, at its initial learning rate.

    For Adam, ``config.momentum`` is beta1, ``config.decay`` beta2, and ``config.epsilon`` is added
    to the root.  On CUDA its steps can be recorded as a graph; the learning rate is a tensor there.
    """
    params = list(parameters)
    rate: float | Tensor = config.learning_rate
    on_cuda = all(p.device.type == "cuda" for p in params)
    if on_cuda:
        rate = torch.tensor(config.learning_rate, device=params[0].device)
    if config.optimizer == "rmsprop":
        return RMSPropTF(
            params,
            lr=rate,
            decay=config.decay,
            momentum=config.momentum,
            epsilon=config.epsilon,
        )
    adam = torch.optim.Adam(
        params,
        lr=rate,
        betas=(config.momentum, config.decay),
        eps=config.epsilon,
        fused=all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params),
        capturable=on_cuda,
    )
    # It would warn of steps that are not recorded, as the first ones are.
    adam._warned_capturable_if_run_uncaptured = True
    return adam


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take the next steps at ``rate``; a tensor stays in its place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most ``max_norm``; 0 leaves them.

    Returns the norm before scaling, a scalar tensor on the gradients' device (0 if there are
    none); nothing is read back from the device.  A gradient of inf or nan is not hidden: what
    it touches becomes nan.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm(grads)
    if max_norm > 0 and grads:
        # Exactly 1 where the norm is within the bound.
        torch._foreach_mul_(grads, max_norm / norm.clamp(min=max_norm))
    return norm


def linear_learning_rate(initial: float, frames: int, total_frames: int) -> float:
    """Learning rate after ``frames`` of ``total_frames``: falls linearly to 0 and stays there."""
    if frames >= total_frames:
        return 0.0
    return initial * (1.0 - frames / total_frames)
