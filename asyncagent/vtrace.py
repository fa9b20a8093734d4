"""V-trace: off-policy corrected value targets and policy-gradient advantages.

From "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures"
(Espeholt et al., 2018, arXiv 1802.01561), section 4.1.  With rho_t = min(rho_bar, pi/mu) and
c_t = min(1, pi/mu), where pi/mu is the ratio of target to behaviour probability of actions[t],

    delta_t V = rho_t (r_t + gamma_t V(x_{t+1}) - V(x_t))
    v_s = V(x_s) + sum_{t=s}^{T-1} (prod_{i=s}^{t-1} gamma_i c_i) delta_t V              (eq. 1)
        = V(x_s) + delta_s V + gamma_s c_s (v_{s+1} - V(x_{s+1}))                     (remark 1)

and the policy gradient's advantage at s (section 4.2) is

    min(pg_rho_bar, pi/mu) (r_s + gamma_s v_{s+1} - V(x_s)),        v_T = V(x_T).

Here r_t and gamma_t belong to the step that *follows* x_t, and gamma_t is 0 where that step ended
an episode.  A log importance weight of -inf says that the action at x_t went nowhere: then
rho_t = c_t = 0, v_t = V(x_t) and the advantage is 0.

Shapes: T steps, B columns, A actions; ``...`` stands for further dimensions, usually none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

C_BAR = 1.0
"""Where importance weights are cut off in the products of eq. 1; the paper uses 1 throughout."""


class VTraceReturns(NamedTuple):
    """What V-trace makes of one batch; carries no gradient."""

    vs: Tensor
    """[T, B, ...]: the value targets v_s."""
    pg_advantages: Tensor
    """[T, B, ...]: advantages for the policy gradient, importance weights included."""


class VTraceFromLogitsReturns(NamedTuple):
    """VTraceReturns, with what was computed on the way from logits."""

    vs: Tensor
    """[T, B, ...]: the value targets v_s; carries no gradient."""
    pg_advantages: Tensor
    """[T, B, ...]: advantages for the policy gradient; carries no gradient."""
    log_rhos: Tensor
    """[T, B, ...]: log of the importance weights, not cut off."""
    behaviour_action_log_probs: Tensor
    """[T, B, ...]: log-probability of the actions under the policy that acted."""
    target_action_log_probs: Tensor
    """[T, B, ...]: the same under the policy being learned; carries its gradient."""


def from_logits(
    behaviour_policy_logits: Tensor,
    target_policy_logits: Tensor,
    actions: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    clip_rho_threshold: float | None = 1.0,
    clip_pg_rho_threshold: float | None = 1.0,
    lambda_: float = 1.0,
) -> VTraceFromLogitsReturns:
    """V-trace for softmax policies.

    Args:
      behaviour_policy_logits: [T, B, ..., A], unnormalised, of the policy that acted.
      target_policy_logits: [T, B, ..., A], unnormalised, of the policy being learned.
      actions: integers [T, B, ...] in [0, A), drawn from the behaviour policy.
      discounts: this and what follows as in ``from_importance_weights``.

    Raises:
      ValueError: an argument has the wrong rank, shape or kind of number.
    """
    shape = _check_rank("behaviour_policy_logits", behaviour_policy_logits, "[T, B, ..., A]", 3)
    _check_shape("target_policy_logits", target_policy_logits, shape, "behaviour_policy_logits")
    _check_shape(
        "actions",
        actions,
        shape[:-1],
        "behaviour_policy_logits less the last dimension",
    )
    if actions.is_floating_point() or actions.is_complex():
        raise ValueError(f"actions has dtype {actions.dtype}, expected integers")
    behaviour_action_log_probs = action_log_probs(log_probs(behaviour_policy_logits), actions)
    target_action_log_probs = action_log_probs(log_probs(target_policy_logits), actions)
    log_rhos = target_action_log_probs - behaviour_action_log_probs
    returns = from_importance_weights(
        log_rhos,
        discounts,
        rewards,
        values,
        bootstrap_value,
        clip_rho_threshold,
        clip_pg_rho_threshold,
        lambda_,
    )
    return VTraceFromLogitsReturns(
        vs=returns.vs,
        pg_advantages=returns.pg_advantages,
        log_rhos=log_rhos,
        behaviour_action_log_probs=behaviour_action_log_probs,
        target_action_log_probs=target_action_log_probs,
    )


@torch.no_grad()
def from_importance_weights(
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    clip_rho_threshold: float | None = 1.0,
    clip_pg_rho_threshold: float | None = 1.0,
    lambda_: float = 1.0,
) -> VTraceReturns:
    """V-trace (eq. 1 and section 4.2 of arXiv 1802.01561) from log importance weights.

    Computes in the widest dtype of its arguments, at least float32.  Further dimensions of
    log_rhos, discounts and rewards may be 1 where those of values are larger.

    Args:
      log_rhos: [T, B, ...]; log of target over behaviour probability of the action at x_t; -inf
        where that action went nowhere.
      discounts: [T, B, ...]; discount of the step that follows x_t, 0 where it ended an episode.
      rewards: [T, B, ...]; reward of the step that follows x_t.
      values: [T, B, ...]; V(x_t).
      bootstrap_value: [B, ...]; V(x_T).
      clip_rho_threshold: rho_bar, cuts the importance weights in vs off; None leaves them.
      clip_pg_rho_threshold: pg_rho_bar, the same in pg_advantages.
      lambda_: c_t = lambda * min(1, pi/mu) (remark 2): below 1, less variance and more bias.

    Raises:
      ValueError: an argument has the wrong rank or shape.
    """
    shape = _check_rank("values", values, "[T, B, ...]", 2)
    _check_shape("bootstrap_value", bootstrap_value, shape[1:], "values less the first dimension")
    for name, tensor in (
        ("log_rhos", log_rhos),
        ("discounts", discounts),
        ("rewards", rewards),
    ):
        _check_broadcast(name, tensor, shape)

    arguments = (log_rhos, discounts, rewards, values, bootstrap_value)
    dtype = torch.float32
    for tensor in arguments:
        dtype = torch.promote_types(dtype, tensor.dtype)
    log_rhos, discounts, rewards, values, bootstrap_value = (x.to(dtype) for x in arguments)

    weights = log_rhos.exp()
    next_values = torch.cat([values[1:], bootstrap_value[None]])
    deltas = _clip(weights, clip_rho_threshold) * (rewards + discounts * next_values - values)
    decays = discounts * lambda_ * weights.clamp(max=C_BAR)
    vs = values + solve_by_doubling(deltas, decays)

    next_vs = torch.cat([vs[1:], bootstrap_value[None]])
    pg_weights = _clip(weights, clip_pg_rho_threshold)
    return VTraceReturns(vs, pg_weights * (rewards + discounts * next_vs - values))


def log_probs(logits: Tensor) -> Tensor:
    """Normalised log-probabilities [..., A] of logits [..., A], in at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, dim=-1, dtype=dtype)


def action_log_probs(all_log_probs: Tensor, actions: Tensor) -> Tensor:
    """Entries [...] of ``all_log_probs`` [..., A] at ``actions`` (integers [...])."""
    return all_log_probs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)


def solve_by_doubling(deltas: Tensor, decays: Tensor) -> Tensor:
    """y with y[t] = deltas[t] + decays[t] * y[t+1] and y[T] = 0, in log2(T) whole-tensor passes.

    deltas and the result are [T, B, ...]; decays too, or 1 in further dimensions.
    Before the pass with span k, result[t] is the sum of eq. 1 cut off after k terms and
    products[t], for t < T - k, is decays[t] * ... * decays[t + k - 1]; a pass appends the k terms
    that start at t + k.  Few launches of large kernels, and on a CPU no slower than T small ones.
    """
    result = deltas.clone()
    products = decays[:-1]
    k = 1
    while k < len(result):
        result[:-k] += products * result[k:]  # the right side is complete before result changes
        products = products[:-k] * products[k:]
        k *= 2
    return result


def _clip(weights: Tensor, threshold: float | None) -> Tensor:
    return weights if threshold is None else weights.clamp(max=threshold)


def _check_rank(name: str, tensor: Tensor, layout: str, least: int) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if len(shape) < least or shape[0] < 1:
        raise ValueError(
            f"{name} has shape {list(shape)}, expected {layout} of rank >= {least} with T >= 1"
        )
    return shape


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int], like: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {list(expected)}: the shape of {like}"
        )


def _check_broadcast(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    shape = tuple(tensor.shape)
    same_rank = len(shape) == len(expected)
    fits = same_rank and all(
        have == want or (dim >= 2 and have == 1)
        for dim, (have, want) in enumerate(zip(shape, expected, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {list(shape)}, expected {list(expected)}: the shape of values"
            " (dimensions after the first two may be 1)"
        )
