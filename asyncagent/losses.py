"""The IMPALA loss of one batch of unrolls.

From arXiv 1802.01561, section 4.2: policy gradient with V-trace advantages, value regression to
the V-trace targets, entropy bonus.  Every loss is a *sum* over time and batch, never a mean, so
the loss of a batch is the sum of the losses of its columns, and learning rates, epsilons and
gradient clips of the paper hold as they are.

Shapes: T agent steps, B columns, A actions; what ``Unroll`` (structs.py) says of its rows holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyncagent import vtrace


class LossOutput(NamedTuple):
    """The loss and what it is made of. All but ``total`` are detached from the graph."""

    total: Tensor
    """Scalar to differentiate: policy_gradient + baseline_cost * baseline + entropy_cost * entropy,
    summed over T and B."""
    policy_gradient: Tensor
    """Scalar."""
    baseline: Tensor
    """Scalar, before its cost is applied."""
    entropy: Tensor
    """Scalar, before its cost is applied: the *negative* entropy in nats, <= 0."""
    vs: Tensor
    """[T, B]: V-trace's value targets."""
    pg_advantages: Tensor
    """[T, B]: V-trace's advantages, importance weights included."""
    log_rhos: Tensor
    """[T, B]: log importance weights, not cut off; -inf where not valid."""


def policy_gradient_loss(action_log_probs: Tensor, advantages: Tensor, valid: Tensor) -> Tensor:
    """Scalar -sum(log pi(a_t | x_t) * advantage_t) over the valid rows.

    Args:
      action_log_probs: float [T, B], with gradient; vtrace.action_log_probs makes them of logits.
      advantages: float [T, B]; no gradient flows into them.
      valid: bool [T, B]; the other rows contribute neither loss nor gradient, whatever they hold.
    """
    terms = _keep(action_log_probs, valid) * _keep(advantages.detach(), valid)
    return -terms.sum()


def baseline_loss(errors: Tensor, valid: Tensor) -> Tensor:
    """Scalar 0.5 * sum(errors ** 2) over the valid rows.

    Args:
      errors: float [T, B]: vs - values, with gradient through values.
      valid: bool [T, B].
    """
    return 0.5 * _keep(errors, valid).square().sum()


def entropy_loss(log_probs: Tensor, valid: Tensor) -> Tensor:
    """Scalar sum(pi log pi) over actions and valid rows: the negative entropy, in nats.

    Args:
      log_probs: float [T, B, A], normalised, finite, with gradient; vtrace.log_probs makes them.
      valid: bool [T, B].
    """
    return _keep((log_probs.exp() * log_probs).sum(-1), valid).sum()


def clip_rewards(rewards: Tensor, mode: str) -> Tensor:
    """Rewards of any shape as the learner sees them.

    Args:
      rewards: float.
      mode: ``abs_one`` cuts off at -1 and 1; ``soft_asymmetric`` gives 5 tanh(r / 5), times 0.3
        where r < 0; ``none`` leaves them alone.

    Raises:
      ValueError: no such mode.
    """
    if mode == "abs_one":
        return rewards.clamp(-1.0, 1.0)
    if mode == "soft_asymmetric":
        squeezed = 5.0 * torch.tanh(rewards / 5.0)
        return torch.where(rewards < 0, 0.3 * squeezed, squeezed)
    if mode == "none":
        return rewards
    raise ValueError(f"mode={mode!r} must be one of abs_one, soft_asymmetric, none")


def impala_loss(
    logits: Tensor,
    values: Tensor,
    *,
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    action: Tensor,
    behaviour_logits: Tensor,
    valid: Tensor,
    discounting: float,
    reward_clipping: str,
    bootstrap_truncated: bool,
    entropy_cost: float,
    baseline_cost: float,
    clip_rho_threshold: float | None = 1.0,
    clip_pg_rho_threshold: float | None = 1.0,
    vtrace_lambda: float = 1.0,
) -> LossOutput:
    """The loss of any set of unroll columns; reads nothing back from the device.

    The step from x_t to x_{t+1} has reward[t+1] and ended an episode if row t+1 says so; an end
    stops the discount.  Where ``valid`` is False the importance weight is 0, so vs = V(x_t), and
    there is no loss: masking by a zero discount alone would pull vs to the reward there, and the
    rows before it with it.  V(x_T) bootstraps; row T has no loss of its own.

    Args:
      logits: float [T+1, B, A]: the learner's own pass, with gradient.
      values: float [T+1, B]: V(x_t) of the same pass, with gradient.
      reward: float [T+1, B], unclipped; reward[t] led to x_t.
      terminated, truncated: bool [T+1, B]: x_t ends an episode, by the rules or by a time limit.
      action: int64 [T, B], chosen at x_t.
      behaviour_logits: float [T, B, A], of the forward pass that chose ``action``.
      valid: bool [T, B]: False where action[t] went nowhere; what behaviour_logits[t] and
        reward[t+1] hold there does not matter.
      discounting: gamma per agent step.
      reward_clipping: mode of ``clip_rewards``.
      bootstrap_truncated: discount through a truncation: the truncated episode's last value counts.
      entropy_cost, baseline_cost: weights of the entropy and the value loss.
      clip_rho_threshold, clip_pg_rho_threshold, vtrace_lambda: see
        vtrace.from_importance_weights.

    Raises:
      ValueError: an argument has the wrong shape.
    """
    _check_rows(logits, reward, values=values, terminated=terminated, truncated=truncated)
    _check_steps(logits, behaviour_logits, action=action, valid=valid)
    target_log_probs = vtrace.log_probs(logits[:-1])
    target_action_log_probs = vtrace.action_log_probs(target_log_probs, action)
    with torch.no_grad():
        behaviour_log_probs = vtrace.log_probs(behaviour_logits)
        log_rhos = target_action_log_probs - vtrace.action_log_probs(behaviour_log_probs, action)
        log_rhos = torch.where(valid, log_rhos, -torch.inf)
        end = terminated if bootstrap_truncated else terminated | truncated
        discounts = discounting * (~end[1:]).to(log_rhos.dtype)
        returns = vtrace.from_importance_weights(
            log_rhos,
            discounts,
            _keep(clip_rewards(reward[1:], reward_clipping), valid),
            values[:-1],
            values[-1],
            clip_rho_threshold,
            clip_pg_rho_threshold,
            vtrace_lambda,
        )
    policy_gradient = policy_gradient_loss(target_action_log_probs, returns.pg_advantages, valid)
    baseline = baseline_loss(returns.vs - values[:-1], valid)
    entropy = entropy_loss(target_log_probs, valid)
    return LossOutput(
        total=policy_gradient + baseline_cost * baseline + entropy_cost * entropy,
        policy_gradient=policy_gradient.detach(),
        baseline=baseline.detach(),
        entropy=entropy.detach(),
        vs=returns.vs,
        pg_advantages=returns.pg_advantages,
        log_rhos=log_rhos,
    )


def _keep(rows: Tensor, valid: Tensor) -> Tensor:
    # Not a product with 0 or 1: an invalid row may hold inf or nan, and 0 * inf is nan.
    return torch.where(valid, rows, 0.0)


def _check_rows(logits: Tensor, reward: Tensor, **fields: Tensor) -> None:
    if logits.dim() != 3 or len(logits) < 2:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [T+1, B, A] with T >= 1")
    for name, tensor in {"reward": reward, **fields}.items():
        if tensor.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected [T+1, B] = "
                f"{list(logits.shape[:-1])} as logits has"
            )


def _check_steps(logits: Tensor, behaviour_logits: Tensor, **fields: Tensor) -> None:
    expected = logits.shape[:-1]
    expected = torch.Size((expected[0] - 1, *expected[1:]))
    for name, tensor in fields.items():
        if tensor.shape != expected:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected [T, B] = {list(expected)}"
            )
    if behaviour_logits.shape != (*expected, logits.shape[-1]):
        raise ValueError(
            f"behaviour_logits has shape {list(behaviour_logits.shape)}, expected [T, B, A] = "
            f"{[*expected, logits.shape[-1]]}"
        )
