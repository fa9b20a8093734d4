"""V-trace against equation 1 of arXiv 1802.01561, written out as slowly as it stands there."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncagent import vtrace

Float64 = npt.NDArray[np.float64]
NO_ACTION = -math.inf
"""The log importance weight of an action that went nowhere."""


class Inputs(NamedTuple):
    """One batch in float64, as from_importance_weights takes it."""

    log_rhos: Float64
    discounts: Float64
    rewards: Float64
    values: Float64
    bootstrap_value: Float64

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        return {name: torch.as_tensor(x, dtype=dtype) for name, x in self._asdict().items()}


def random_inputs(shape: tuple[int, ...], seed: int = 0) -> Inputs:
    """Weights from e^-2.5 to e^2.5, every fourth discount or so 0."""
    rng = np.random.default_rng(seed)
    return Inputs(
        log_rhos=rng.uniform(-2.5, 2.5, shape),
        discounts=rng.uniform(0.8, 1.0, shape) * (rng.random(shape) > 0.25),
        rewards=rng.normal(size=shape),
        values=rng.normal(size=shape),
        bootstrap_value=rng.normal(size=shape[1:]),
    )


def oracle(
    inputs: Inputs,
    rho_bar: float | None = 1.0,
    pg_rho_bar: float | None = 1.0,
    lambda_: float = 1.0,
) -> tuple[Float64, Float64]:
    """v_s by equation 1, sum over t and product over i; advantages by section 4.2."""
    log_rhos, gamma, r, V, bootstrap = inputs
    T = len(V)
    pi_over_mu = np.exp(log_rhos)
    rho = np.minimum(math.inf if rho_bar is None else rho_bar, pi_over_mu)
    c = lambda_ * np.minimum(1.0, pi_over_mu)
    pg_rho = np.minimum(math.inf if pg_rho_bar is None else pg_rho_bar, pi_over_mu)
    V = np.concatenate([V, bootstrap[None]])
    v = V.copy()  # v_T = V(x_T)
    for s in range(T):
        for t in range(s, T):
            delta = rho[t] * (r[t] + gamma[t] * V[t + 1] - V[t])
            product = np.ones_like(bootstrap)
            for i in range(s, t):
                product = product * gamma[i] * c[i]
            v[s] += product * delta
    advantages = np.stack([pg_rho[s] * (r[s] + gamma[s] * v[s + 1] - V[s]) for s in range(T)])
    return v[:T], advantages


def assert_close(actual: torch.Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


SHAPES = [(1, 1), (1, 4), (2, 3), (5, 1), (20, 7), (33, 2), (6, 4, 3), (5, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rho_bar", "pg_rho_bar"), [(1.0, 1.0), (2.2, 0.6), (0.4, 3.7), (None, 1.5), (1.5, None)]
)
def test_agrees_with_equation_1(
    shape: tuple[int, ...], rho_bar: float | None, pg_rho_bar: float | None
) -> None:
    """The fast code gives equation 1's targets and section 4.2's advantages, in float64."""
    inputs = random_inputs(shape)
    vs, advantages = oracle(inputs, rho_bar, pg_rho_bar)
    returns = vtrace.from_importance_weights(
        **inputs.tensors(), clip_rho_threshold=rho_bar, clip_pg_rho_threshold=pg_rho_bar
    )
    assert_close(returns.vs, vs)
    assert_close(returns.pg_advantages, advantages)


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 0.95])
def test_lambda_shortens_the_traces(lambda_: float) -> None:
    """lambda multiplies every c of equation 1 (remark 2), and nothing else."""
    inputs = random_inputs((20, 7))
    vs, advantages = oracle(inputs, lambda_=lambda_)
    returns = vtrace.from_importance_weights(**inputs.tensors(), lambda_=lambda_)
    assert_close(returns.vs, vs)
    assert_close(returns.pg_advantages, advantages)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) >= 20], ids=str)
def test_inputs_lie_on_both_sides_of_every_clip(shape: tuple[int, ...]) -> None:
    """The batches of the oracle test hold weights below and above each clip, and zero discounts."""
    inputs = random_inputs(shape)
    weights = np.exp(inputs.log_rhos)
    for bar in (0.4, 0.6, 1.0, 1.5, 2.2, 3.7):
        assert (weights < bar).any(), bar
        assert (weights > bar).any(), bar
    assert (inputs.discounts == 0).any()
    assert (inputs.discounts > 0).any()


@pytest.mark.parametrize("shape", [*SHAPES, (100, 16), (256, 3)], ids=str)
def test_doubling_solves_the_recursion(shape: tuple[int, ...]) -> None:
    """Doubling gives what row by row gives, in float32, and does not change its inputs."""
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randn(shape, generator=generator)
    decays = torch.rand(shape, generator=generator).sqrt()
    before = deltas.clone(), decays.clone()
    by_rows = deltas.clone()
    for t in range(len(deltas) - 2, -1, -1):
        by_rows[t] += decays[t] * by_rows[t + 1]
    by_doubling = vtrace.solve_by_doubling(deltas, decays)
    torch.testing.assert_close(by_rows, by_doubling)
    assert torch.equal(deltas, before[0])
    assert torch.equal(decays, before[1])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_doubling_counts_every_term(length: int) -> None:
    """With ones for deltas and decays the solution counts down from T to 1, whatever T's bits."""
    ones = torch.ones(length, 2)
    expected = torch.arange(length, 0, -1.0)[:, None].expand(length, 2)
    assert torch.equal(vtrace.solve_by_doubling(ones, ones), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_float32_at_least(dtype: torch.dtype) -> None:
    """Narrow arguments are widened before any arithmetic; the results are float32."""
    narrow = {name: x.to(dtype) for name, x in random_inputs((20, 7)).tensors().items()}
    vs, advantages = oracle(Inputs(**{name: x.double().numpy() for name, x in narrow.items()}))
    returns = vtrace.from_importance_weights(**narrow)
    assert returns.vs.dtype == returns.pg_advantages.dtype == torch.float32
    assert_close(returns.vs, vs, 1e-5)
    assert_close(returns.pg_advantages, advantages, 1e-5)


batches = st.builds(
    random_inputs,
    st.tuples(st.integers(1, 12), st.integers(1, 4)),
    st.integers(0, 2**32 - 1),
)


@settings(deadline=None, max_examples=60)
@given(batches)
def test_on_policy_gives_n_step_returns(inputs: Inputs) -> None:
    """Without clipping in effect (log_rhos 0) vs is the discounted return, bootstrapped (eq. 2)."""
    on_policy = inputs._replace(log_rhos=np.zeros_like(inputs.log_rhos))
    returns = vtrace.from_importance_weights(**on_policy.tensors())
    target = inputs.bootstrap_value
    for s in reversed(range(len(inputs.values))):
        target = inputs.rewards[s] + inputs.discounts[s] * target
        assert_close(returns.vs[s], target)
        assert_close(returns.pg_advantages[s], target - inputs.values[s])


@settings(deadline=None, max_examples=60)
@given(batches)
def test_no_threshold_is_a_huge_threshold(inputs: Inputs) -> None:
    """None leaves the importance weights alone, as a threshold beyond all of them does."""
    tensors = inputs.tensors()
    unclipped = vtrace.from_importance_weights(**tensors, **thresholds(None, None))
    huge = vtrace.from_importance_weights(**tensors, **thresholds(1e9, 1e9))
    assert torch.equal(unclipped.vs, huge.vs)
    assert torch.equal(unclipped.pg_advantages, huge.pg_advantages)


@settings(deadline=None, max_examples=60)
@given(batches)
def test_pg_threshold_leaves_the_targets_alone(inputs: Inputs) -> None:
    """clip_pg_rho_threshold cuts the advantages' weights only; vs has clip_rho_threshold's."""
    tensors = inputs.tensors()
    low = vtrace.from_importance_weights(**tensors, **thresholds(1.0, 0.5))
    high = vtrace.from_importance_weights(**tensors, **thresholds(1.0, 2.0))
    assert torch.equal(low.vs, high.vs)
    weights = np.exp(inputs.log_rhos)
    ratio = np.minimum(weights, 2.0) / np.minimum(weights, 0.5)
    assert_close(high.pg_advantages, low.pg_advantages.numpy() * ratio)


@settings(deadline=None, max_examples=60)
@given(batches, st.integers(0, 2**32 - 1))
def test_rows_without_an_action_keep_their_value(inputs: Inputs, seed: int) -> None:
    """Where log_rho is -inf vs is V and the advantage 0; nothing behind that row leaks past it."""
    gone = np.random.default_rng(seed).random(inputs.values.shape) < 0.3
    masked = inputs._replace(log_rhos=np.where(gone, NO_ACTION, inputs.log_rhos))
    for bars in ((1.0, 1.0), (None, None)):
        returns = vtrace.from_importance_weights(**masked.tensors(), **thresholds(*bars))
        vs, advantages = oracle(masked, *bars)
        assert_close(returns.vs, vs)
        assert_close(returns.pg_advantages, advantages)
        assert np.array_equal(returns.vs.numpy()[gone], inputs.values[gone])
        assert not returns.pg_advantages.numpy()[gone].any()


def thresholds(rho_bar: float | None, pg_rho_bar: float | None) -> dict[str, Any]:
    return {"clip_rho_threshold": rho_bar, "clip_pg_rho_threshold": pg_rho_bar}


def column(*entries: float) -> torch.Tensor:
    """One column as [T, 1]."""
    return torch.tensor(entries)[:, None]


def test_masked_end_row_hands_back_its_own_value() -> None:
    """A bootstrapped truncation whose end row is row 2 gives vs_1 = 0.99 * V(x_2) = 2.97."""
    returns = vtrace.from_importance_weights(
        log_rhos=column(0.0, 0.0, NO_ACTION, 0.0),
        discounts=column(0.99, 0.99, 0.99, 0.99),
        rewards=column(0.0, 0.0, 0.0, 0.0),
        values=column(1.0, 2.0, 3.0, 4.0),
        bootstrap_value=torch.tensor([5.0]),
    )
    # Row 3: 0.99 * 5. Row 2: its own value. Row 1: 0.99 * 3. Row 0: 0.99 * 2.97.
    assert_close(returns.vs, [[2.9403], [2.97], [3.0], [4.95]], 1e-6)
    # Less V(x): row 0: 2.9403 - 1, row 1: 2.97 - 2, row 2: masked, row 3: 4.95 - 4.
    assert_close(returns.pg_advantages, [[1.9403], [0.97], [0.0], [0.95]], 1e-6)


def test_zero_discount_instead_of_the_mask_would_leak() -> None:
    """The same rows with discount 0 at row 2 and no mask give vs_1 = 0: why valid exists."""
    returns = vtrace.from_importance_weights(
        log_rhos=column(0.0, 0.0, 0.0, 0.0),
        discounts=column(0.99, 0.99, 0.0, 0.99),
        rewards=column(0.0, 0.0, 0.0, 0.0),
        values=column(1.0, 2.0, 3.0, 4.0),
        bootstrap_value=torch.tensor([5.0]),
    )
    assert_close(returns.vs[1], [0.0], 1e-6)


@pytest.mark.parametrize("discount", [0.0, 0.99])
def test_no_action_anywhere_is_finite(discount: float) -> None:
    """A column without one valid row comes back as its own values, whatever its discounts."""
    values = column(1.0, 2.0, 3.0)
    returns = vtrace.from_importance_weights(
        column(NO_ACTION, NO_ACTION, NO_ACTION),
        torch.full((3, 1), discount),
        column(7.0, 7.0, 7.0),
        values,
        torch.tensor([9.0]),
    )
    assert torch.equal(returns.vs, values)
    assert torch.equal(returns.pg_advantages, torch.zeros(3, 1))


def test_advantages_look_ahead_to_the_target_not_the_value() -> None:
    """The advantage at s uses v_{s+1}; with V(x_{s+1}) in its place row 0 would have 0."""
    returns = vtrace.from_importance_weights(
        log_rhos=column(0.0, 0.0),
        discounts=column(1.0, 1.0),
        rewards=column(0.0, 1.0),
        values=column(0.0, 0.0),
        bootstrap_value=torch.tensor([0.0]),
    )
    # v_1 = 1, so row 0 has 0 + 1 * 1 - 0 = 1; V(x_1) would have made it 0.
    assert_close(returns.pg_advantages, [[1.0], [1.0]], 1e-7)


def random_logits(shape: tuple[int, ...], num_actions: int = 5) -> dict[str, Any]:
    """Behaviour and target logits [*shape, A] and actions [*shape]; float64."""
    generator = torch.Generator().manual_seed(11)
    full = (*shape, num_actions)
    return {
        "behaviour_policy_logits": torch.randn(full, generator=generator, dtype=torch.float64),
        "target_policy_logits": torch.randn(full, generator=generator, dtype=torch.float64),
        "actions": torch.randint(num_actions, shape, generator=generator),
    }


def rest_of(inputs: Inputs) -> dict[str, Any]:
    tensors = inputs.tensors()
    del tensors["log_rhos"]
    return tensors


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (4, 2, 3)], ids=str)
def test_from_logits_takes_the_actions_ratio(shape: tuple[int, ...]) -> None:
    """log_rho is log pi(a) - log mu(a) of the action taken; the rest is from_importance_weights."""
    logits = random_logits(shape)
    inputs = random_inputs(shape)
    returns = vtrace.from_logits(**logits, **rest_of(inputs), **thresholds(1.3, 0.7))

    log_pi, log_mu = np.zeros(shape), np.zeros(shape)
    for index in np.ndindex(*shape):
        action = int(logits["actions"][index])
        for name, result in (("target_policy_logits", log_pi), ("behaviour_policy_logits", log_mu)):
            powers = np.exp(logits[name][index].numpy())
            result[index] = np.log(powers[action] / powers.sum())
    assert_close(returns.target_action_log_probs, log_pi)
    assert_close(returns.behaviour_action_log_probs, log_mu)
    assert_close(returns.log_rhos, log_pi - log_mu)
    vs, advantages = oracle(inputs._replace(log_rhos=log_pi - log_mu), 1.3, 0.7)
    assert_close(returns.vs, vs)
    assert_close(returns.pg_advantages, advantages)


def test_positional_arguments_and_results_keep_their_order() -> None:
    """Called by position with thresholds of 1 by default, results unpack in the known order."""
    logits, inputs = random_logits((5, 3)), random_inputs((5, 3))
    by_name = vtrace.from_logits(**logits, **rest_of(inputs), **thresholds(1.0, 1.0))
    tensors = rest_of(inputs)
    vs, pg_advantages, log_rhos, behaviour, target = vtrace.from_logits(
        logits["behaviour_policy_logits"],
        logits["target_policy_logits"],
        logits["actions"],
        tensors["discounts"],
        tensors["rewards"],
        tensors["values"],
        tensors["bootstrap_value"],
    )
    assert torch.equal(vs, by_name.vs)
    assert torch.equal(pg_advantages, by_name.pg_advantages)
    assert torch.equal(log_rhos, target - behaviour)
    assert torch.equal(target, by_name.target_action_log_probs)


def test_only_the_target_log_probs_carry_a_gradient() -> None:
    """vs and pg_advantages are constants to the loss; target_action_log_probs is not."""
    logits, tensors = random_logits((5, 3)), rest_of(random_inputs((5, 3)))
    target = logits["target_policy_logits"].requires_grad_()
    tensors["values"].requires_grad_()
    tensors["bootstrap_value"].requires_grad_()
    returns = vtrace.from_logits(**logits, **tensors)
    assert not returns.vs.requires_grad
    assert not returns.pg_advantages.requires_grad
    (gradient,) = torch.autograd.grad(returns.target_action_log_probs.sum(), target)
    # d log pi(a) / d logits = one-hot(a) - pi.
    one_hot = torch.nn.functional.one_hot(logits["actions"], 5)
    assert_close(gradient, one_hot - target.detach().softmax(-1))


def test_trailing_dimensions_of_one_are_stretched() -> None:
    """log_rhos and discounts [T, B, 1] serve values [T, B, 4], as if they had been repeated."""
    wide = random_inputs((6, 2, 4))
    narrow = wide._replace(log_rhos=wide.log_rhos[..., :1], discounts=wide.discounts[..., :1])
    repeated = wide._replace(
        log_rhos=np.repeat(narrow.log_rhos, 4, -1), discounts=np.repeat(narrow.discounts, 4, -1)
    )
    returns = vtrace.from_importance_weights(**narrow.tensors())
    vs, advantages = oracle(repeated)
    assert_close(returns.vs, vs)
    assert_close(returns.pg_advantages, advantages)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("log_rhos", (5, 3, 1), r"log_rhos has shape \[5, 3, 1\], expected \[5, 3\]"),
        ("log_rhos", (5, 1), r"log_rhos has shape \[5, 1\], expected \[5, 3\]"),
        ("log_rhos", (4, 3), r"log_rhos has shape \[4, 3\], expected \[5, 3\]"),
        ("discounts", (5,), r"discounts has shape \[5\], expected \[5, 3\]"),
        ("discounts", (), r"discounts has shape \[\], expected \[5, 3\]"),
        ("rewards", (3, 5), r"rewards has shape \[3, 5\], expected \[5, 3\]"),
        ("rewards", (6, 3), r"rewards has shape \[6, 3\], expected \[5, 3\]"),
        ("values", (5,), r"values has shape \[5\], expected \[T, B, ...\] of rank >= 2"),
        ("values", (0, 3), r"values has shape \[0, 3\], .* T >= 1"),
        ("bootstrap_value", (1, 3), r"bootstrap_value has shape \[1, 3\], expected \[3\]"),
        ("bootstrap_value", (5,), r"bootstrap_value has shape \[5\], expected \[3\]"),
    ],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    """The error names the argument, the shape it has and the shape it should have."""
    tensors = random_inputs((5, 3)).tensors() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        vtrace.from_importance_weights(**tensors)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "behaviour_policy_logits",
            torch.zeros(5, 3),
            r"behaviour_policy_logits has shape \[5, 3\], expected \[T, B, ..., A\]",
        ),
        (
            "target_policy_logits",
            torch.zeros(5, 3, 4),
            r"target_policy_logits has shape \[5, 3, 4\], expected \[5, 3, 5\]",
        ),
        (
            "actions",
            torch.zeros(5, 3, 1, dtype=torch.int64),
            r"actions has shape \[5, 3, 1\], expected \[5, 3\]",
        ),
        ("actions", torch.zeros(5, 3), r"actions has dtype torch.float32, expected integers"),
        ("values", torch.zeros(5, 3, 2), r"has shape .*expected \[3, 2\]"),
    ],
    ids=["behaviour rank", "actions differ", "action rank", "action dtype", "values rank"],
)
def test_wrong_logits_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    """from_logits, too, names the argument, what it has and what is expected."""
    arguments = random_logits((5, 3)) | rest_of(random_inputs((5, 3))) | {name: value}
    with pytest.raises(ValueError, match=message):
        vtrace.from_logits(**arguments)
