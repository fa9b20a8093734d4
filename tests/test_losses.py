"""The loss against trajectories worked out by hand: alignment, ends, masks, sums, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from asyncagent import distributions, vtrace
from asyncagent.losses import (
    LossOutput,
    baseline_loss,
    clip_rewards,
    entropy_loss,
    impala_loss,
    policy_gradient_loss,
)
from asyncagent.structs import ActionSpace, Box, Discrete, MultiDiscrete

LN2 = math.log(2.0)


def column(
    values: list[float], reward: list[float], *, end: int | None = None, kind: str = "terminated"
) -> dict[str, Any]:
    """One column of T+1 = len(values) rows of a policy that tosses a coin and acts on-policy.

    Row ``end`` is an end row of the given kind; its action goes nowhere.
    """
    num_rows = len(values)
    flags = {name: torch.zeros(num_rows, 1, dtype=torch.bool) for name in ENDS}
    valid = torch.ones(num_rows - 1, 1, dtype=torch.bool)
    if end is not None:
        flags[kind][end] = True
        valid[end : end + 1] = False
    return {
        "logits": torch.zeros(num_rows, 1, 2),
        "values": torch.tensor(values)[:, None],
        "reward": torch.tensor(reward)[:, None],
        **flags,
        "action": torch.zeros(num_rows - 1, 1, dtype=torch.int64),
        "behaviour_logits": torch.zeros(num_rows - 1, 1, 2),
        "valid": valid,
    }


ENDS = ("terminated", "truncated")
HYPER: dict[str, Any] = {
    "discounting": 0.5,
    "reward_clipping": "abs_one",
    "bootstrap_truncated": False,
    "entropy_cost": 0.01,
    "baseline_cost": 0.5,
}


def loss_of(fields: dict[str, Any], **hyper: Any) -> LossOutput:
    return impala_loss(**fields, **(HYPER | hyper))


def assert_column(actual: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected)[:, None])


def assert_scalar(actual: torch.Tensor, expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected))


def random_fields(num_steps: int = 6, num_columns: int = 5, num_actions: int = 4) -> dict[str, Any]:
    """A batch with ends of both kinds and masked rows anywhere."""
    generator = torch.Generator().manual_seed(5)
    rows, steps = (num_steps + 1, num_columns), (num_steps, num_columns)
    return {
        "logits": torch.randn(*rows, num_actions, generator=generator),
        "values": torch.randn(rows, generator=generator),
        "reward": torch.randn(rows, generator=generator),
        "terminated": torch.rand(rows, generator=generator) < 0.2,
        "truncated": torch.rand(rows, generator=generator) < 0.2,
        "action": torch.randint(num_actions, steps, generator=generator),
        "behaviour_logits": torch.randn(*steps, num_actions, generator=generator),
        "valid": torch.rand(steps, generator=generator) < 0.8,
    }


def gradients(fields: dict[str, Any], **hyper: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the total with respect to logits and values."""
    leaves = {name: fields[name].clone().requires_grad_() for name in ("logits", "values")}
    total = loss_of(fields | leaves, **hyper).total
    of_logits, of_values = torch.autograd.grad(total, (leaves["logits"], leaves["values"]))
    return of_logits, of_values


def test_termination_in_mid_unroll() -> None:
    """An end row stops the discount of the step before it and has no loss; the next row starts."""
    fields = column([1.0, 2.0, 3.0, 4.0, 5.0], [0.75, 0.25, 1.0, 0.0, 0.5], end=2)
    loss = loss_of(fields)
    # t=0: reward[1] + 0.5 * vs_1.  t=1: reward[2], the end.  t=2: end row, its own value.
    # t=3: reward[4] + 0.5 * V(x_4).  reward[0] belongs to the unroll before.
    assert_column(loss.vs, [0.25 + 0.5 * 1.0, 1.0, 3.0, 0.5 + 0.5 * 5.0])
    # On-policy the advantage is vs - V, nothing at the end row.
    assert_column(loss.pg_advantages, [-0.25, -1.0, 0.0, -1.0])
    assert_column(loss.log_rhos, [0.0, 0.0, -math.inf, 0.0])
    # -sum(log(1/2) * advantage) = ln 2 * (-2.25)
    assert_scalar(loss.policy_gradient, -2.25 * LN2)
    # (0.0625 + 1 + 1) / 2
    assert_scalar(loss.baseline, 1.03125)
    # Three valid coin tosses.
    assert_scalar(loss.entropy, -3 * LN2)
    assert_scalar(loss.total, -2.25 * LN2 + 0.5 * 1.03125 - 0.01 * 3 * LN2)


@pytest.mark.parametrize("kind", ENDS)
def test_end_on_the_seam_closes_the_unroll(kind: str) -> None:
    """An end in row T stops the last discount: V(x_T) counts for nothing."""
    loss = loss_of(column([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], end=2, kind=kind))
    # t=1: reward[2].  t=0: 0 + 0.5 * 1.
    assert_column(loss.vs, [0.5, 1.0])
    assert_column(loss.pg_advantages, [-0.5, -1.0])


@pytest.mark.parametrize("bootstrap_truncated", [False, True])
@pytest.mark.parametrize("kind", ENDS)
def test_end_on_the_seam_opens_the_next_unroll(kind: str, bootstrap_truncated: bool) -> None:
    """The same row as row 0 of the next unroll only masks itself: no later discount stops."""
    fields = column([3.0, 4.0, 5.0], [1.0, 0.0, 0.25], end=0, kind=kind)
    loss = loss_of(fields, bootstrap_truncated=bootstrap_truncated)
    # t=0: its own value.  t=1: reward[2] + 0.5 * V(x_2).
    assert_column(loss.vs, [3.0, 0.25 + 0.5 * 5.0])
    assert_column(loss.pg_advantages, [0.0, 2.75 - 4.0])
    assert_scalar(loss.entropy, -LN2)


def test_truncation_stops_the_discount() -> None:
    """Without bootstrap_truncated a time limit ends the return as a termination does."""
    fields = column([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5, end=2, kind="truncated")
    loss = loss_of(fields, discounting=0.99)
    # t=1: 0, the end.  t=0: 0.99 * 0.
    assert_column(loss.vs, [0.0, 0.0, 3.0, 0.99 * 5.0])


def test_bootstrapped_truncation_goes_on_to_the_end_row() -> None:
    """With bootstrap_truncated the value of the end row's observation counts, and no further."""
    fields = column([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5, end=2, kind="truncated")
    loss = loss_of(fields, discounting=0.99, bootstrap_truncated=True)
    # t=2: its own value, 3.  t=1: 0.99 * 3 = 2.97, whatever follows row 2.  t=0: 0.99 * 2.97.
    assert_column(loss.vs, [2.9403, 2.97, 3.0, 0.99 * 5.0])
    assert_column(loss.pg_advantages, [1.9403, 0.97, 0.0, 0.95])


def test_bootstrapped_truncation_on_the_seam() -> None:
    """With bootstrap_truncated an end in row T hands V(x_T) back."""
    fields = column([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], end=2, kind="truncated")
    loss = loss_of(fields, bootstrap_truncated=True)
    # t=1: 1 + 0.5 * 3.  t=0: 0.5 * 2.5.
    assert_column(loss.vs, [1.25, 2.5])


@pytest.mark.parametrize("both", [False, True])
def test_termination_never_bootstraps(both: bool) -> None:
    """bootstrap_truncated leaves terminations alone, also one that is a truncation as well."""
    fields = column([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], end=2)
    fields["truncated"][2] = both
    assert_column(loss_of(fields, bootstrap_truncated=True).vs, [0.5, 1.0])


def test_lost_row_does_not_bootstrap_across_the_crash() -> None:
    """The last row before a crash is masked without an end flag: vs is its value, no loss."""
    fields = column([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 1.0])
    fields["valid"][1] = False
    loss = loss_of(fields)
    # t=2: 1 + 0.5 * 4.  t=1: lost, its own value.  t=0: 1 + 0.5 * 2.
    assert_column(loss.vs, [2.0, 2.0, 3.0])
    assert_column(loss.pg_advantages, [1.0, 0.0, 0.0])


def off_policy() -> dict[str, Any]:
    """Two steps; mu = (1/2, 1/2), pi = (3/4, 1/4): weight 1/2 for action 1, 3/2 for action 0."""
    fields = column([1.0, 2.0, 6.0], [0.0, 1.0, 0.0])
    fields["logits"] = torch.tensor([math.log(3.0), 0.0]).repeat(3, 1, 1)
    fields["action"] = torch.tensor([[1], [0]])
    return fields


def test_off_policy_weights() -> None:
    """Targets and advantages carry the importance weights, cut off at one by default."""
    loss = loss_of(off_policy())
    assert_column(loss.log_rhos, [math.log(0.5), math.log(1.5)])
    # t=1: rho 1: vs = 2 + (0 + 0.5 * 6 - 2).
    # t=0: rho = c = 1/2: 1 + 0.5 * (1 + 0.5 * 2 - 1) + 0.5 * 0.5 * (3 - 2).
    assert_column(loss.vs, [1.75, 3.0])
    # t=0: 1/2 * (1 + 0.5 * 3 - 1).  t=1: 1 * (0.5 * 6 - 2).
    assert_column(loss.pg_advantages, [0.75, 1.0])
    assert_scalar(loss.policy_gradient, -(0.75 * math.log(0.25) + 1.0 * math.log(0.75)))
    assert_scalar(loss.baseline, 0.5 * (0.75**2 + 1.0**2))
    assert_scalar(loss.entropy, 2 * (0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_thresholds_go_to_their_own_weights() -> None:
    """clip_rho_threshold acts on vs, clip_pg_rho_threshold on the advantages."""
    loss = loss_of(off_policy(), clip_rho_threshold=None, clip_pg_rho_threshold=0.25)
    # t=1: rho 3/2: 2 + 1.5 * 1.  t=0: 1 + 0.5 * 1 + 0.5 * 0.5 * 1.5 (c = 1/2).
    assert_column(loss.vs, [1.875, 3.5])
    # t=0: 1/4 * (1 + 0.5 * 3.5 - 1).  t=1: 1/4 * (3 - 2).
    assert_column(loss.pg_advantages, [0.4375, 0.25])


def test_gradients_are_the_analytical_ones() -> None:
    """Only log pi, the entropy and V in the regression are differentiated, not the targets."""
    of_logits, of_values = gradients(off_policy(), baseline_cost=0.3, entropy_cost=0.1)
    # d(baseline_cost * (vs - V)^2 / 2) / dV = -baseline_cost * (vs - V); row T has none.
    assert_column(of_values, [-0.3 * 0.75, -0.3 * 1.0, 0.0])
    # d(-adv * log pi(a)) / d logits = -adv * (one-hot(a) - pi).
    # d(sum pi log pi) / d logits = pi * (log pi + H).
    pi = torch.tensor([0.75, 0.25])
    entropy = -(pi * pi.log()).sum()
    bonus = 0.1 * pi * (pi.log() + entropy)
    expected = [
        -0.75 * (torch.tensor([0.0, 1.0]) - pi) + bonus,
        -1.0 * (torch.tensor([1.0, 0.0]) - pi) + bonus,
        torch.zeros(2),
    ]
    torch.testing.assert_close(of_logits[:, 0], torch.stack(expected))


def test_invalid_rows_have_no_gradient() -> None:
    """Rows that are not valid, and row T, have gradient exactly 0; every valid row has some."""
    fields = random_fields()
    of_logits, of_values = gradients(fields)
    assert not fields["valid"].all()
    assert not of_logits[:-1][~fields["valid"]].any()
    assert not of_values[:-1][~fields["valid"]].any()
    assert not of_logits[-1].any()
    assert not of_values[-1].any()
    assert of_logits[:-1][fields["valid"]].any(dim=-1).all()
    assert of_values[:-1][fields["valid"]].all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_rubbish_in_invalid_rows_spoils_nothing(rubbish: float) -> None:
    """What a masked row's action and outcome hold changes neither loss nor gradients."""
    fields = random_fields()
    gone = ~fields["valid"]
    spoilt = dict(fields)
    spoilt["behaviour_logits"] = torch.where(
        gone[..., None], torch.tensor(rubbish), fields["behaviour_logits"]
    )
    spoilt["reward"] = fields["reward"].clone()
    spoilt["reward"][1:][gone] = rubbish
    assert torch.equal(loss_of(spoilt).total, loss_of(fields).total)
    for spoilt_gradient, gradient in zip(gradients(spoilt), gradients(fields), strict=True):
        assert torch.equal(spoilt_gradient, gradient)


def test_all_rows_invalid_is_zero() -> None:
    """A column without a valid row has loss 0 and gradient 0, not nan."""
    fields = random_fields()
    fields["valid"][:] = False
    assert_scalar(loss_of(fields).total, 0.0)
    for gradient in gradients(fields):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def fields_of(space: ActionSpace) -> dict[str, Any]:
    """``random_fields`` of another action space."""
    fields = random_fields()
    generator = torch.Generator().manual_seed(6)
    logits = 0.5 * torch.randn(13, 5, space.num_logits, generator=generator)
    fields["logits"], fields["behaviour_logits"] = logits[:7], logits[7:]
    fields["action"] = distributions.sample(space, logits[7:], generator)
    return fields


def test_one_choice_of_four_is_discrete() -> None:
    """MultiDiscrete((4,)) gives what Discrete(4) gives, gradients included, to the last bit."""
    fields = random_fields()
    several = fields | {"action": fields["action"].unsqueeze(-1)}
    space = MultiDiscrete((4,))
    for one, other in zip(loss_of(several, action_space=space), loss_of(fields), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients(several, action_space=space), gradients(fields), strict=True):
        assert torch.equal(one, other)


def test_several_choices_are_one_among_all_combinations() -> None:
    """Losses, targets and gradients of (3, 2) are those of 6 alternatives of the same joint."""
    space = MultiDiscrete((3, 2))
    fields = fields_of(space)
    first, second = fields["action"].unbind(-1)

    def joint(logits: torch.Tensor) -> torch.Tensor:
        parts = logits[..., :3, None] + logits[..., None, 3:]
        return parts.flatten(-2)

    leaf = fields["logits"].clone().requires_grad_()
    product = fields | {
        "logits": joint(leaf),
        "behaviour_logits": joint(fields["behaviour_logits"]),
        "action": 2 * first + second,
    }
    loss, expected = loss_of(fields, action_space=space), loss_of(product)
    for one, other in zip(loss, expected, strict=True):
        torch.testing.assert_close(one, other)
    (of_parts,) = torch.autograd.grad(expected.total, leaf)
    torch.testing.assert_close(gradients(fields, action_space=space)[0], of_parts)


def test_gradients_of_a_gaussian_are_the_analytical_ones() -> None:
    """Off-policy by 0.5 in the mean: weight, targets and both gradients worked out by hand."""
    fields = column([1.0, 2.0], [0.0, 1.0])
    # pi = N(1, e^0.5), mu = N(0.5, 1), action 0.
    fields["logits"] = torch.tensor([1.0, 0.5]).repeat(2, 1, 1)
    fields["behaviour_logits"] = torch.tensor([[[0.5, 0.0]]])
    fields["action"] = torch.zeros(1, 1, 1)
    loss = loss_of(fields, action_space=Box(1))
    normal_constant = 0.5 * math.log(2 * math.pi)
    log_pi = -0.5 * math.exp(-1.0) - 0.5 - normal_constant
    log_mu = -0.5 * 0.25 - normal_constant
    assert_column(loss.log_rhos, [log_pi - log_mu])
    # rho (r + gamma V(x_1) - V(x_0)) with reward 1.
    advantage = math.exp(log_pi - log_mu) * (1.0 + 0.5 * 2.0 - 1.0)
    assert_column(loss.vs, [1.0 + advantage])
    assert_scalar(loss.policy_gradient, -log_pi * advantage)
    assert_scalar(loss.entropy, -(0.5 + normal_constant + 0.5))
    of_logits, _ = gradients(fields, action_space=Box(1), entropy_cost=0.1)
    # d log pi / d mean = (a - mean) / std^2; d log pi / d log_std = ((a - mean) / std)^2 - 1;
    # d entropy / d log_std = 1.
    assert_column(of_logits[..., 0], [advantage * math.exp(-1.0), 0.0])
    assert_column(of_logits[..., 1], [-advantage * (math.exp(-1.0) - 1.0) - 0.1, 0.0])


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
@pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete((3, 2)), Box(2)], ids=str)
def test_rubbish_actions_in_invalid_rows_spoil_nothing(space: ActionSpace, rubbish: float) -> None:
    """What a masked row chose, and from what, changes neither loss nor gradients in any space."""
    fields = fields_of(space)
    gone = ~fields["valid"]
    spoilt = dict(fields)
    for name in ("action", "behaviour_logits"):
        spoilt[name] = fields[name].clone()
        integers = not spoilt[name].is_floating_point()
        spoilt[name][gone] = -(10**9) if integers else rubbish
    one, other = (loss_of(x, action_space=space) for x in (spoilt, fields))
    for spoilt_part, part in zip(one, other, strict=True):
        assert torch.equal(spoilt_part, part)
    both = (gradients(x, action_space=space) for x in (spoilt, fields))
    for spoilt_gradient, gradient in zip(*both, strict=True):
        assert torch.equal(spoilt_gradient, gradient)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete((3, 2)), Box(2)], ids=str)
def test_every_kind_of_policy_finds_the_best_action(space: ActionSpace) -> None:
    """Fed by its own actions, the gradient moves a policy to where the reward is."""
    generator = torch.Generator().manual_seed(1)
    best = torch.tensor({Discrete: 2, MultiDiscrete: [2, 1], Box: [0.5, -0.3]}[type(space)])
    logits = torch.zeros(space.num_logits, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    rows = torch.zeros(2, 64)
    for _ in range(150):
        seen = logits.expand(2, 64, -1)
        action = distributions.sample(space, seen[:1].detach(), generator)
        error = (action - best).float().square().reshape(1, 64, -1).sum(-1)
        loss = impala_loss(
            seen, rows, reward=torch.cat([rows[:1], 1 - error]), terminated=rows == 0,
            truncated=rows != 0, action=action, behaviour_logits=seen[:1].detach(),
            valid=rows[:1] == 0, action_space=space, **(HYPER | {"reward_clipping": "none"}),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(distributions.mode(space, logits.detach()), best, atol=0.2, rtol=0)


def columns_of(fields: dict[str, Any], columns: slice) -> dict[str, Any]:
    return {name: tensor[:, columns] for name, tensor in fields.items()}


def test_columns_add_up() -> None:
    """The loss of a batch and its gradients are those of its column chunks, summed and joined."""
    fields = random_fields()
    chunks = [columns_of(fields, slice(0, 2)), columns_of(fields, slice(2, 5))]
    whole = loss_of(fields)
    for name in ("total", "policy_gradient", "baseline", "entropy"):
        parts = [getattr(loss_of(chunk), name) for chunk in chunks]
        torch.testing.assert_close(parts[0] + parts[1], getattr(whole, name))
    for name in ("vs", "pg_advantages", "log_rhos"):
        parts = [getattr(loss_of(chunk), name) for chunk in chunks]
        torch.testing.assert_close(torch.cat(parts, dim=1), getattr(whole, name))
    joined = [torch.cat(pair, dim=1) for pair in zip(*map(gradients, chunks), strict=True)]
    for of_chunks, of_whole in zip(joined, gradients(fields), strict=True):
        torch.testing.assert_close(of_chunks, of_whole)


def test_twice_the_batch_is_twice_the_loss() -> None:
    """Losses are sums: the same columns twice over give exactly twice each loss."""
    fields = random_fields()
    twice = {name: torch.cat([x, x], dim=1) for name, x in fields.items()}
    once, double = loss_of(fields), loss_of(twice)
    for name in ("total", "policy_gradient", "baseline", "entropy"):
        torch.testing.assert_close(getattr(double, name), 2 * getattr(once, name))


def test_agrees_with_vtrace_from_logits() -> None:
    """With every row valid the targets are from_logits' of the shifted rewards and discounts."""
    fields = random_fields()
    fields["valid"][:] = True
    loss = loss_of(fields, reward_clipping="none", discounting=0.9)
    returns = vtrace.from_logits(
        fields["behaviour_logits"],
        fields["logits"][:-1],
        fields["action"],
        0.9 * (1.0 - (fields["terminated"] | fields["truncated"])[1:].float()),
        fields["reward"][1:],
        fields["values"][:-1],
        fields["values"][-1],
    )
    torch.testing.assert_close(loss.vs, returns.vs)
    torch.testing.assert_close(loss.pg_advantages, returns.pg_advantages)
    torch.testing.assert_close(loss.log_rhos, returns.log_rhos)


def test_reads_nothing_back() -> None:
    """No value decides a branch: the loss also runs on tensors that have none."""
    fields = {name: x.to("meta") for name, x in random_fields().items()}
    loss = loss_of(fields)
    assert loss.total.shape == ()
    assert loss.vs.shape == loss.log_rhos.shape == (6, 5)


def test_only_the_total_carries_a_graph() -> None:
    """What is reported beside the total is detached, so keeping it keeps no graph alive."""
    fields = random_fields()
    loss = loss_of(fields | {"logits": fields["logits"].requires_grad_()})
    with_graph = [name for name, x in loss._asdict().items() if x.requires_grad]
    assert with_graph == ["total"]


def test_narrow_outputs_are_widened() -> None:
    """A bfloat16 learner pass gives the float32 loss of the same numbers."""
    fields = random_fields()
    narrow = fields | {name: fields[name].bfloat16() for name in ("logits", "values")}
    widened = fields | {name: narrow[name].float() for name in ("logits", "values")}
    loss = loss_of(narrow)
    assert loss.total.dtype == loss.vs.dtype == torch.float32
    torch.testing.assert_close(loss.total, loss_of(widened).total)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [-20.0, -5.0, -0.5, 0.0, 0.5, 5.0, 20.0]),
        ("abs_one", [-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]),
        # 5 tanh(r / 5), and 0.3 of that below zero: tanh(0.1) = 0.0996680, tanh(1) = 0.7615942,
        # tanh(4) = 0.9993293.
        (
            "soft_asymmetric",
            [-1.4989940, -1.1423912, -0.1495020, 0.0, 0.4983400, 3.8079708, 4.9966465],
        ),
    ],
)
def test_reward_clipping(mode: str, expected: list[float]) -> None:
    """Each mode gives the ancestor's numbers, and the loss uses it."""
    rewards = [-20.0, -5.0, -0.5, 0.0, 0.5, 5.0, 20.0]
    torch.testing.assert_close(clip_rewards(torch.tensor(rewards), mode), torch.tensor(expected))
    # One step with discount 0: the target is the clipped reward.
    for reward, clipped in zip(rewards, expected, strict=True):
        fields = column([0.0, 0.0], [0.0, reward])
        assert_column(loss_of(fields, reward_clipping=mode, discounting=0.0).vs, [clipped])


def test_unknown_reward_clipping_is_refused() -> None:
    """The error names the modes there are."""
    with pytest.raises(ValueError, match=r"mode='half' must be one of abs_one, soft_asymmetric"):
        clip_rewards(torch.zeros(1), "half")


def test_losses_alone() -> None:
    """Each loss is a plain sum over the valid rows of its own arguments."""
    valid = torch.tensor([[True, False], [True, True]])
    log_probs = torch.tensor([[-1.0, -math.inf], [-2.0, -3.0]])
    advantages = torch.tensor([[2.0, 5.0], [-1.0, 0.5]])
    # -(-1 * 2 + -2 * -1 + -3 * 0.5)
    assert_scalar(policy_gradient_loss(log_probs, advantages, valid), 1.5)
    # (4 + 1 + 0.25) / 2
    assert_scalar(baseline_loss(advantages, valid), 2.625)
    # A certain action has no entropy, k equal ones have ln k.
    logits = torch.tensor([[[0.0, 0.0, 0.0]] * 2, [[0.0, 0.0, -100.0], [100.0, 0.0, 0.0]]])
    entropy = entropy_loss(distributions.entropy(Discrete(3), logits), valid)
    assert_scalar(entropy, -(math.log(3.0) + math.log(2.0)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("logits", (7, 5)),
        ("logits", (1, 5, 4)),
        ("values", (6, 5)),
        ("reward", (6, 5)),
        ("terminated", (7,)),
        ("truncated", (7, 4)),
        ("action", (7, 5)),
        ("valid", (7, 5)),
        ("behaviour_logits", (7, 5, 4)),
        ("behaviour_logits", (6, 5, 3)),
    ],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """The error names the argument and the shape it has."""
    fields = random_fields()
    fields[name] = torch.zeros(shape, dtype=fields[name].dtype)
    has = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"^{name} has shape \[{has}\], expected \[T"):
        loss_of(fields)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("action", (6, 5)),
        ("action", (6, 5, 3)),
        ("logits", (7, 5, 4)),
        ("behaviour_logits", (6, 5)),
    ],
)
def test_shapes_of_another_action_space_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """The error names the argument and the shape that the action space asks for."""
    fields = fields_of(MultiDiscrete((3, 2)))
    fields[name] = torch.zeros(shape, dtype=fields[name].dtype)
    with pytest.raises(ValueError, match=rf"^{name} has shape .*, expected \[T"):
        loss_of(fields, action_space=MultiDiscrete((3, 2)))
