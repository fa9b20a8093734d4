"""The IMPALA loss of one batch of unrolls.

From arXiv 1802.01561, section 4.2: policy gradient with V-trace advantages, value regression to
the V-trace targets, entropy bonus.  Every loss is a *sum* over time and batch, never a mean, so
the loss of a batch is the sum of the losses of its columns, and learning rates, epsilons and
gradient clips of the paper hold as they are.

Shapes: T agent steps, B columns, A logits; what ``Unroll`` (structs.py) says of its rows holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from asyncagent import distributions, vtrace
from asyncagent.config import Config
from asyncagent.structs import ActionSpace, Discrete, Nest


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
    """Scalar, before its cost is applied: the *negative* entropy in nats."""
    vs: Tensor
    """[T, B]: V-trace's value targets."""
    pg_advantages: Tensor
    """[T, B]: V-trace's advantages, importance weights included."""
    log_rhos: Tensor
    """[T, B]: log importance weights, not cut off; -inf where not valid."""


def policy_gradient_loss(action_log_probs: Tensor, advantages: Tensor, valid: Tensor) -> Tensor:
    """Scalar -sum(log pi(a_t | x_t) * advantage_t) over the valid rows.

    Args:
      action_log_probs: float [T, B], with gradient, as distributions.log_prob makes them.
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


def entropy_loss(entropies: Tensor, valid: Tensor) -> Tensor:
    """Scalar -sum(entropies) over the valid rows: the negative entropy, in nats.

    Args:
      entropies: float [T, B], with gradient, as distributions.entropy makes them.
      valid: bool [T, B].
    """
    return -_keep(entropies, valid).sum()


def loss_of(
    config: Config, space: ActionSpace, logits: Tensor, values: Tensor, batch: Nest
) -> LossOutput:
    """``impala_loss`` of a batch, with a run's flags.

    Args:
      logits, values: of the learner's own pass; see ``impala_loss``.
      batch: an Unroll of tensors [T+1, B, ...].
    """
    return impala_loss(
        logits,
        values,
        reward=batch.reward,
        terminated=batch.terminated,
        truncated=batch.truncated,
        action=batch.action,
        behaviour_logits=batch.behaviour_logits,
        valid=batch.valid,
        discounting=config.discounting,
        reward_clipping=config.reward_clipping,
        bootstrap_truncated=config.bootstrap_truncated,
        entropy_cost=config.entropy_cost,
        baseline_cost=config.baseline_cost,
        clip_rho_threshold=config.clip_rho_threshold,
        clip_pg_rho_threshold=config.clip_pg_rho_threshold,
        vtrace_lambda=config.vtrace_lambda,
        action_space=space,
    )


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
    action_space: ActionSpace | None = None,
) -> LossOutput:
    """The loss of any set of unroll columns; reads nothing back from the device.

    The step from x_t to x_{t+1} has reward[t+1] and ended an episode if row t+1 says so; an end
    stops the discount.  Where ``valid`` is False the importance weight is 0, so vs = V(x_t), and
    there is no loss: masking by a zero discount alone would pull vs to the reward there, and the
    rows before it with it.  V(x_T) bootstraps; row T has no loss of its own.  Where an action has
    several parts, its probability is the joint one.

    Args:
      logits: float [T+1, B, A]: the learner's own pass, with gradient.
      values: float [T+1, B]: V(x_t) of the same pass, with gradient.
      reward: float [T+1, B], unclipped; reward[t] led to x_t.
      terminated, truncated: bool [T+1, B]: x_t ends an episode, by the rules or by a time limit.
      action: [T, B, ...] as the action space says, chosen at x_t.
      behaviour_logits: float [T, B, A], of the forward pass that chose ``action``.
      valid: bool [T, B]: False where action[t] went nowhere; what action[t],
        behaviour_logits[t] and reward[t+1] hold there does not matter.
      discounting: gamma per agent step.
      reward_clipping: mode of ``clip_rewards``.
      bootstrap_truncated: discount through a truncation: the truncated episode's last value counts.
      entropy_cost, baseline_cost: weights of the entropy and the value loss.
      clip_rho_threshold, clip_pg_rho_threshold, vtrace_lambda: see
        vtrace.from_importance_weights.
      action_space: whose logits these are; None: one choice out of A.

    Raises:
      ValueError: an argument has the wrong shape.
    """
    _check_rows(logits, reward, values=values, terminated=terminated, truncated=truncated)
    space = action_space or Discrete(logits.shape[-1])
    steps = (len(logits) - 1, logits.shape[1])
    _check("logits", logits, (steps[0] + 1, steps[1], space.num_logits), "[T+1, B, A]")
    _check("valid", valid, steps, "[T, B]")
    _check("action", action, steps + space.array.shape, "[T, B, ...]")
    _check("behaviour_logits", behaviour_logits, (*steps, space.num_logits), "[T, B, A]")
    action = _keep(action, valid)  # before it meets the logits: their gradient is 0 * inf else
    target_log_probs = distributions.log_prob(space, logits[:-1], action)
    with torch.no_grad():
        log_rhos = target_log_probs - distributions.log_prob(space, behaviour_logits, action)
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
    policy_gradient = policy_gradient_loss(target_log_probs, returns.pg_advantages, valid)
    baseline = baseline_loss(returns.vs - values[:-1], valid)
    entropy = entropy_loss(distributions.entropy(space, logits[:-1]), valid)
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
    return torch.where(valid.view(valid.shape + (1,) * (rows.dim() - valid.dim())), rows, 0)


def _check_rows(logits: Tensor, reward: Tensor, **fields: Tensor) -> None:
    if logits.dim() != 3 or len(logits) < 2:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [T+1, B, A] with T >= 1")
    for name, tensor in {"reward": reward, **fields}.items():
        _check(name, tensor, logits.shape[:-1], "[T+1, B]")


def _check(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {layout} = {list(shape)}"
        )
