"""V-trace, the loss around it and the optimisers, against numbers worked out another way.

The trajectories are short enough to be worked out by hand, in halves and quarters, so that what
is right is written down as a number.  What is too long for that is compared with equation 1 of
arXiv 1802.01561 and with the optimisers' own papers, written out in float64 as slowly as they
stand there.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from asyncagent import vtrace
from asyncagent.config import Config
from asyncagent.losses import impala_loss
from asyncagent.optim import clip_grad_norm, linear_learning_rate, make_optimizer, set_learning_rate
from asyncagent.selftest.outcome import require

Float64 = npt.NDArray[np.float64]

_TOLERANCE = 1e-5


class Trajectory(NamedTuple):
    """One column of T + 1 rows, and what V-trace must make of it."""

    name: str
    discounting: float
    values: tuple[float, ...]
    """T + 1: V(x_t)."""
    rewards: tuple[float, ...]
    """T + 1: rewards[t] led to x_t."""
    policies: tuple[tuple[float, float], ...]
    """T: probabilities of the action taken at x_t, (behaviour, target)."""
    vs: tuple[float, ...]
    """T: v_t."""
    advantages: tuple[float, ...]
    """T: of the policy gradient, importance weights included."""
    terminated: int | None = None
    """The end row, if any; its action goes nowhere."""
    truncated: int | None = None
    bootstrap_truncated: bool = False


_ALIKE = (0.5, 0.5)

TRAJECTORIES = (
    # rho = 2 (cut off at 1), 1/2, none, 1/4.  Row 2 ended an episode: its reward, -1, belongs to
    # the step before, and nothing of what follows does.
    #   v_3 = 4 + 1/4 (1 + 1/2 * 8 - 4) = 4.25         v_2 = V(x_2): its action went nowhere
    #   v_1 = 1 + 1/2 (-1 - 1) = 0
    #   v_0 = 1/2 + (1 + 1/2 * 1 - 1/2) + 1/2 (v_1 - V(x_1)) = 1
    Trajectory(
        "an end in mid-unroll",
        0.5,
        (0.5, 1.0, 2.0, 4.0, 8.0),
        (9.0, 1.0, -1.0, 0.0, 1.0),
        ((0.25, 0.5), (0.5, 0.25), _ALIKE, (0.8, 0.2)),
        vs=(1.0, 0.0, 2.0, 4.25),
        advantages=(0.5, -1.0, 0.0, 0.25),
        terminated=2,
    ),
    # Nothing of V(x_T) = 64 comes through.
    Trajectory(
        "an end on the seam",
        0.5,
        (1.0, 2.0, 64.0),
        (0.0, 0.5, 1.0),
        (_ALIKE, _ALIKE),
        vs=(1.0, 1.0),
        advantages=(0.0, -1.0),
        terminated=2,
    ),
    Trajectory(
        "an end row that opens an unroll",
        0.5,
        (7.0, 2.0, 4.0),
        (1.0, 0.0, 1.0),
        (_ALIKE, _ALIKE),
        vs=(7.0, 3.0),
        advantages=(0.0, 1.0),
        terminated=0,
    ),
    Trajectory(
        "a truncation on the seam",
        0.5,
        (1.0, 2.0, 64.0),
        (0.0, 0.5, 1.0),
        (_ALIKE, _ALIKE),
        vs=(1.0, 1.0),
        advantages=(0.0, -1.0),
        truncated=2,
    ),
    # v_1 = 1 + 1/2 * 64, v_0 = 1/2 + 1/2 * v_1.
    Trajectory(
        "a truncation on the seam, bootstrapped",
        0.5,
        (1.0, 2.0, 64.0),
        (0.0, 0.5, 1.0),
        (_ALIKE, _ALIKE),
        vs=(17.0, 33.0),
        advantages=(16.0, 31.0),
        truncated=2,
        bootstrap_truncated=True,
    ),
    Trajectory(
        "a truncation in mid-unroll",
        0.99,
        (1.0, 2.0, 3.0, 4.0),
        (0.0, 0.0, 0.0, 0.0),
        (_ALIKE, _ALIKE, _ALIKE),
        vs=(0.0, 0.0, 3.0),
        advantages=(-1.0, -2.0, 0.0),
        truncated=2,
    ),
    # Masking by the discount alone would make v_1 of it 0.
    Trajectory(
        "a truncation in mid-unroll, bootstrapped",
        0.99,
        (1.0, 2.0, 3.0, 4.0),
        (0.0, 0.0, 0.0, 0.0),
        (_ALIKE, _ALIKE, _ALIKE),
        vs=(0.99 * 2.97, 2.97, 3.0),
        advantages=(0.99 * 2.97 - 1.0, 0.97, 0.0),
        truncated=2,
        bootstrap_truncated=True,
    ),
)


def check_vtrace() -> str:
    """Trajectories by hand, through the loss; random batches by equation 1, through V-trace."""
    for trajectory in TRAJECTORIES:
        _follow(trajectory)
    worst = 0.0
    for seed in range(3):
        worst = max(worst, _against_equation_1(seed))
    return (
        f"{len(TRAJECTORIES)} trajectories worked out by hand; equation 1 to {worst:.0e} in float32"
    )


def _follow(one: Trajectory) -> None:
    steps = len(one.policies)
    rows = torch.zeros(steps + 1, 1, dtype=torch.bool)
    terminated, truncated = rows.clone(), rows.clone()
    for flags, row in ((terminated, one.terminated), (truncated, one.truncated)):
        if row is not None:
            flags[row] = True
    both = torch.tensor(one.policies)
    behaviour, target = torch.stack([both, 1 - both], dim=-1).log().unbind(dim=1)  # [T, A] each
    logits = torch.cat([target, torch.zeros(1, 2)])[:, None].requires_grad_()
    values = torch.tensor(one.values)[:, None].requires_grad_()
    loss = impala_loss(
        logits,
        values,
        reward=torch.tensor(one.rewards)[:, None],
        terminated=terminated,
        truncated=truncated,
        action=torch.zeros(steps, 1, dtype=torch.int64),
        behaviour_logits=behaviour[:, None],
        valid=~(terminated | truncated)[:-1],
        discounting=one.discounting,
        reward_clipping="abs_one",
        bootstrap_truncated=one.bootstrap_truncated,
        entropy_cost=0.0,
        baseline_cost=1.0,
    )
    _compare(f"{one.name}: vs", loss.vs[:, 0], one.vs)
    _compare(f"{one.name}: advantages", loss.pg_advantages[:, 0], one.advantages)
    loss.total.backward()  # type: ignore[no-untyped-call]
    # By value: V(x_t) - v_t. By logit of the action: -(advantage) (1 - pi).
    assert values.grad is not None and logits.grad is not None
    slopes = [value - v for value, v in zip(one.values, one.vs, strict=False)]
    _compare(f"{one.name}: the values' gradient", values.grad[:, 0], (*slopes, 0.0))
    pushes = [-a * (1 - pi) for a, (_, pi) in zip(one.advantages, one.policies, strict=True)]
    _compare(f"{one.name}: the logits' gradient", logits.grad[:, 0, 0], (*pushes, 0.0))


def _against_equation_1(seed: int) -> float:
    """Largest error; T = 13, B = 4, weights on both sides of the clip, some discounts 0."""
    rng = np.random.RandomState(seed)
    shape = (13, 4)
    log_rhos = rng.uniform(-1.5, 1.5, shape)
    log_rhos[rng.uniform(size=shape) < 0.1] = -math.inf  # actions that went nowhere
    discounts = rng.uniform(0.8, 1.0, shape) * (rng.uniform(size=shape) > 0.2)
    rewards, values = rng.standard_normal((2, *shape))
    bootstrap = rng.standard_normal(shape[1])
    lambda_ = 1.0 if seed else 0.9
    inputs = (log_rhos, discounts, rewards, values, bootstrap)
    rhos, gammas, points, v, last = (torch.from_numpy(array).float() for array in inputs)
    found = vtrace.from_importance_weights(rhos, gammas, points, v, last, lambda_=lambda_)
    vs, advantages = _equation_1(*inputs, lambda_)
    errors = [
        _compare("equation 1: vs", found.vs, vs),
        _compare("equation 1: advantages", found.pg_advantages, advantages),
    ]
    return max(errors)


def _equation_1(
    log_rhos: Float64, gamma: Float64, r: Float64, values: Float64, bootstrap: Float64,
    lambda_: float,
) -> tuple[Float64, Float64]:  # fmt: skip
    """v_s and advantages as the paper has them: a sum over t, in it a product over i."""
    weights = np.exp(log_rhos)
    rho, c = np.minimum(1.0, weights), lambda_ * np.minimum(1.0, weights)
    steps = len(r)
    x = np.concatenate([values, bootstrap[None]])
    v = x.copy()
    for s in range(steps):
        for t in range(s, steps):
            product = np.prod(gamma[s:t] * c[s:t], axis=0)
            v[s] += product * rho[t] * (r[t] + gamma[t] * x[t + 1] - x[t])
    return v[:-1], rho * (r + gamma * v[1:] - values)


def check_rmsprop() -> str:
    """Three steps by hand, thirty by ApplyRMSProp as TensorFlow documents it; skipping; clipping.

    By hand, with decay 3/4, momentum 1/2, epsilon 3 and gradients of 1 the mean square, which
    starts at one, stays one, and the root is sqrt(1 + 3) = 2:
        mom = 1/2 * 1/2 = 1/4;  1/8 + 1/4 = 3/8;  then at a rate of 1:  3/16 + 1/2 = 11/16,
    and, with a step skipped in between that changes nothing:  11/32 + 1/2 = 27/32.
    """
    config = _config("rmsprop", learning_rate=0.5, decay=0.75, momentum=0.5, epsilon=3.0)
    p = torch.zeros(1)
    optimizer = make_optimizer(config, [p])
    for rate, total in ((0.5, -0.25), (0.5, -0.625), (1.0, -1.3125)):
        set_learning_rate(optimizer, rate)
        p.grad = torch.ones(1)
        optimizer.step()
        _compare("RMSProp by hand", p, (total,))
    _skip(optimizer, p)
    optimizer.step()
    _compare("RMSProp by hand, after a skipped step", p, (-2.15625,))

    def step(p: Float64, g: Float64, state: dict[str, Any], rate: float) -> Float64:
        # ApplyRMSProp: ms <- ms + (1 - rho)(g^2 - ms); mom <- mu mom + lr g / sqrt(ms + eps).
        mean_square = state.get("ms", np.ones_like(g))
        mean_square = mean_square + (1 - 0.9) * (g * g - mean_square)
        state["ms"] = mean_square
        state["mom"] = 0.8 * state.get("mom", 0.0) + rate * g / np.sqrt(mean_square + 0.01)
        return np.asarray(p - state["mom"])

    worst = _walk(_config("rmsprop", decay=0.9, momentum=0.8, epsilon=0.01), step)
    _clip_gradients()
    return f"TensorFlow's RMSProp by hand and to {worst:.0e} over 30 steps; skipped steps; clipping"


def check_adam() -> str:
    """Thirty steps by algorithm 1 of arXiv 1412.6980; skipping, by hand; the schedule.

    By hand: while gradients are 1, both means are 1 once their bias is corrected, and with an
    epsilon of 1 every step is half the rate.  A step that is skipped must leave both means, and
    the number of steps that their correction counts, as they were.
    """

    def step(p: Float64, g: Float64, state: dict[str, Any], rate: float) -> Float64:
        state["t"] = state.get("t", 0) + 1
        state["m"] = 0.9 * state.get("m", 0.0) + (1 - 0.9) * g
        state["v"] = 0.99 * state.get("v", 0.0) + (1 - 0.99) * g * g
        m = state["m"] / (1 - 0.9 ** state["t"])
        v = state["v"] / (1 - 0.99 ** state["t"])
        return np.asarray(p - rate * m / (np.sqrt(v) + 0.01))

    worst = _walk(_config("adam", decay=0.99, momentum=0.9, epsilon=0.01), step)
    p = torch.zeros(1)
    optimizer = make_optimizer(_config("adam", decay=0.75, momentum=0.5, epsilon=1.0), [p])
    set_learning_rate(optimizer, 1.0)
    for total in (-0.5, -1.0):
        p.grad = torch.ones(1)
        optimizer.step()
        _compare("Adam by hand", p, (total,))
    _skip(optimizer, p)
    optimizer.step()
    _compare("Adam by hand, after a skipped step", p, (-1.5,))
    rates = [linear_learning_rate(8.0, frames, 1000) for frames in (0, 250, 1000, 2000)]
    _compare("the schedule's rates", torch.tensor(rates), (8.0, 6.0, 0.0, 0.0))
    return f"Adam to {worst:.0e} over 30 steps; skipped steps; the linear schedule"


def _config(optimizer: Any, **flags: float) -> Config:
    return Config(level_name="catch", optimizer=optimizer, **flags)  # type: ignore[arg-type]


def _walk(config: Config, oracle: Any) -> float:
    """Thirty steps of small and large gradients at a falling rate; the largest error."""
    rng = np.random.RandomState(5)
    expected = rng.standard_normal((3, 5))
    p = torch.from_numpy(expected).float()
    optimizer = make_optimizer(config, [p])
    state: dict[str, Any] = {}
    worst = 0.0
    for index in range(30):
        rate = 0.1 * (1 - index / 40)
        gradient = rng.standard_normal((3, 5)) * 10.0 ** rng.uniform(-3, 1, (3, 5))
        set_learning_rate(optimizer, rate)
        p.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        expected = oracle(expected, gradient, state, rate)
        worst = max(worst, _compare(f"{config.optimizer}, step {index + 1}", p, expected, 1e-4))
    return worst


def _skip(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> None:
    """A step that must change nothing; leaves a gradient of 1, for one that is not skipped."""
    before = p.clone()
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    p.grad = torch.full((1,), math.nan)
    optimizer.step()
    require(torch.equal(p, before), f"a skipped step moved a weight from {before} to {p}")
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    p.grad = torch.ones(1)


def _clip_gradients() -> None:
    p = torch.zeros(2)
    for bound, expected in ((2.5, (1.5, 2.0)), (10.0, (3.0, 4.0)), (0.0, (3.0, 4.0))):
        p.grad = torch.tensor([3.0, 4.0])
        norm = float(clip_grad_norm([p], bound))
        require(abs(norm - 5.0) < _TOLERANCE, f"the norm of (3, 4) came out as {norm}")
        _compare(f"(3, 4) cut off at {bound}", p.grad, expected)


def _compare(what: str, found: torch.Tensor, expected: Any, tolerance: float = _TOLERANCE) -> float:
    """The largest error, relative where numbers are above 1; Failed where it is too large."""
    actual = found.detach().double().numpy()
    wanted = np.asarray(expected, np.float64)
    errors = np.abs(actual - wanted) / np.maximum(1.0, np.abs(wanted))
    require(
        actual.shape == wanted.shape and bool((errors <= tolerance).all()),
        f"{what}: {_brief(actual)}, must be {_brief(wanted)}",
    )
    return float(errors.max())


def _brief(array: Float64) -> str:
    return "(" + ", ".join(f"{x:.5g}" for x in array.ravel()[:6]) + ")"
