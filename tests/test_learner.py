"""The whole path, environment group to updated weights, against numbers worked out by hand."""

from __future__ import annotations

import asyncio
import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asyncagent.actor import Infer, act
from asyncagent.bench import components
from asyncagent.bodies import MlpBody
from asyncagent.config import Config
from asyncagent.envs.base import check_action
from asyncagent.learner import Learner, count_choices
from asyncagent.metrics import MAX_LAG_COUNTED
from asyncagent.models import ActorCritic, make_net
from asyncagent.policy import Policy
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    MultiDiscrete,
    Nest,
    map_nest,
)
from asyncagent.unroll import Columns, UnrollQueue
from tests.fakes import CounterGroup, CountingPolicy

WATCHDOG_S = 30
CPU = torch.device("cpu")


class ProbeNet(nn.Module):
    """V(x_n) = w * n with w = 1, and a uniform policy whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(3))

    def initial_state(self, num_rows: int) -> Nest:
        return (torch.zeros(num_rows, 1),)

    def forward(self, observation: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Nest]:
        steps, rows = observation.shape[:2]
        return self.bias.expand(steps, rows, 3), self.w * observation[..., 0], rest[-1]


def config(**flags: Any) -> Config:
    """A configuration in which every term of the loss is easy to work out."""
    values: dict[str, Any] = {
        "level_name": "counter",
        "num_actors": 1,
        "num_groups": 1,
        "num_action_repeats": 1,
        "unroll_length": 4,
        "batch_size": 1,
        "discounting": 0.5,
        "reward_clipping": "none",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "epsilon": 0.01,
        "net": "mlp",
        "total_environment_frames": 10**9,
    }
    return Config(**(values | flags))


def unrolls(
    group: CounterGroup, infer: Infer, state: Nest, length: int, count: int
) -> list[Columns]:
    """The first ``count`` unrolls of ``group``; their buffers are never given back."""

    async def run() -> list[Columns]:
        queue = UnrollQueue(group.num_envs, group.num_envs)
        actor = asyncio.create_task(act(group, infer, queue.put, length, state, lambda row: None))
        async with asyncio.timeout(WATCHDOG_S):
            parts = [part for _ in range(count) for part in await queue.get()]
        actor.cancel()
        return parts

    return asyncio.run(run())


def counted(group: CounterGroup, length: int, count: int = 1) -> list[Columns]:
    policy = CountingPolicy()
    return unrolls(group, policy, policy.initial_state(group.num_envs), length, count)


def test_losses_and_weights_after_one_update() -> None:
    """T=4, episodes of 2 steps: rows 0 1 2* | 3 4 with V = 0 1 2 3 4 and rewards 1 2 - 4.

    gamma 0.5.  vs_3 = 4 + 0.5 V_4 = 6; row 2 is an end row: vs_2 = V_2; vs_1 = 2 (the episode
    ends, no bootstrap); vs_0 = 1 + 0.5 vs_1 = 2.  Advantages 2, 1, -, 3 (the last one from V_4).
    Baseline loss (2^2 + 1^2 + 3^2) / 2 = 7, policy gradient loss ln 3 (2 + 1 + 3), entropy 3 ln 3.
    d/dw = 0.5 * -(2*0 + 1*1 + 3*3) = -5, RMSProp: mean square 0.99 + 0.25, epsilon 0.01 inside:
    w = 1 + 0.1 * 5 / sqrt(1.25).
    """
    net = ProbeNet()
    learner = Learner(config(), net, Discrete(3), CPU, torch.float32)
    learner.update(counted(CounterGroup([[2]]), length=4))
    statistics = learner.take_statistics()
    ln3 = math.log(3)
    assert statistics.baseline_loss == pytest.approx(7)
    assert statistics.policy_gradient_loss == pytest.approx(6 * ln3, rel=1e-6)
    assert statistics.entropy_loss == pytest.approx(-3 * ln3, rel=1e-6)
    total = 6 * ln3 + 0.5 * 7 - 0.01 * 3 * ln3
    assert statistics.total_loss == pytest.approx(total, rel=1e-6)
    assert statistics.rho_mean == pytest.approx(1)
    assert net.w.item() == pytest.approx(1 + 0.5 / math.sqrt(1.25), rel=1e-6)
    assert learner.frames == 3, "the end row is not a frame"


def test_end_on_the_seam() -> None:
    """T=3, episodes of 3 steps: rows 0 1 2 3* | then 3* 4 5 6: the bootstrap is cut at row 3.

    First unroll: vs_2 = 3 (no bootstrap), vs_1 = 2 + 0.5 * 3 = 3.5, vs_0 = 1 + 0.5 * 3.5 = 2.75.
    Errors 2.75, 2.5, 1: baseline loss (7.5625 + 6.25 + 1) / 2.
    Second unroll: row 3 is an end row, row 4 opens (reward 0): rewards - 5 6, gamma V_6 = 3,
    vs_5 = 6 + 3 = 9, vs_4 = 5 + 4.5 = 9.5, errors 5.5, 4.
    """
    first, second = counted(CounterGroup([[3]]), length=3, count=2)
    flags = {"unroll_length": 3, "learning_rate": 1e-12}
    for part, loss, frames in (
        (first, (2.75**2 + 2.5**2 + 1) / 2, 3),
        (second, (5.5**2 + 4**2) / 2, 2),
    ):
        learner = Learner(config(**flags), ProbeNet(), Discrete(3), CPU, torch.float32)
        learner.update([part])
        assert learner.take_statistics().baseline_loss == pytest.approx(loss)
        assert learner.frames == frames


@pytest.mark.parametrize(("bootstrap", "vs_1"), [(False, 2.0), (True, 3.0)])
def test_truncation_bootstraps_only_when_asked(bootstrap: bool, vs_1: float) -> None:
    """Rows 0 1 2* with a time limit at row 2: vs_1 = 2, or 2 + 0.5 V_2 = 3 with bootstrapping.

    T=2, so row 2 is also the seam; vs_0 = 1 + 0.5 vs_1.
    """
    group = CounterGroup([[2]], truncations=[(0, 0)])
    flags = {"unroll_length": 2, "bootstrap_truncated": bootstrap}
    learner = Learner(config(**flags), ProbeNet(), Discrete(3), CPU, torch.float32)
    learner.update(counted(group, length=2))
    vs_0 = 1 + 0.5 * vs_1
    expected = (vs_0**2 + (vs_1 - 1) ** 2) / 2
    assert learner.take_statistics().baseline_loss == pytest.approx(expected)


def test_truncation_in_mid_unroll_does_not_leak() -> None:
    """A bootstrapped truncation at row 2 of 4: vs_1 = 2 + 0.5 V_2, rows 3 and 4 leave it alone."""
    group = CounterGroup([[2]], truncations=[(0, 0)])
    learner = Learner(config(bootstrap_truncated=True), ProbeNet(), Discrete(3), CPU, torch.float32)
    learner.update(counted(group, length=4))
    errors = (1 + 0.5 * 3 - 0, 2 + 0.5 * 2 - 1, 4 + 0.5 * 4 - 3)
    expected = sum(error**2 for error in errors) / 2
    assert learner.take_statistics().baseline_loss == pytest.approx(expected)


def recurrent_net(spec: EnvSpec) -> ActorCritic:
    torch.manual_seed(3)
    assert isinstance(spec.observation, ArraySpec)
    net = ActorCritic(MlpBody(spec.observation), spec.actions, lstm_units=16)
    assert isinstance(net.policy, nn.Linear)
    with torch.no_grad():
        net.policy.weight.mul_(100)  # an initial policy is all but uniform and would hide errors
    return net


def test_learner_sees_what_the_actor_saw() -> None:
    """On-policy, every importance weight is 1 over unrolls with ends in mid-unroll and on seams.

    The learner's recurrent pass starts from the recorded state and must zero it at the same rows,
    see the same last actions and rewards, and choose among the same logits as the actor.
    """
    group = CounterGroup([[3], [4, 8, 2], [100], [1]])
    net = recurrent_net(group.spec)
    policy = Policy(net, Discrete(3), CPU, torch.float32, seed=1)

    async def infer(*rows: Any) -> Any:
        await asyncio.sleep(0)
        return policy.infer(*rows)

    parts = unrolls(group, infer, policy.initial_state(4), length=4, count=5)
    assert any(part.unroll.first[0].any() for part in parts), "an episode opens at a row 0"
    for part in parts:
        learner = Learner(
            config(batch_size=4, num_actors=4), copy.deepcopy(net), Discrete(3), CPU, torch.float32
        )
        batch = part.unroll
        output = net(
            *(
                torch.from_numpy(array)
                for array in (batch.observation, batch.reward, batch.last_action, batch.first)
            ),
            tuple(torch.from_numpy(leaf) for leaf in batch.core_state),
        )
        seen = output.logits[:-1].detach().numpy()
        np.testing.assert_allclose(seen, batch.behaviour_logits, rtol=1e-4, atol=1e-4)
        assert np.ptp(seen, axis=-1).max() > 0.1, "the policy is far from uniform"
        learner.update([part])
        assert learner.take_statistics().rho_mean == pytest.approx(1, abs=1e-4)


class SensesGroup(CounterGroup):
    """Counters that show theirs as a picture, a number and an instruction, under any actions."""

    def __init__(self, lengths: list[list[int]], actions: ActionSpace) -> None:
        super().__init__(lengths)
        self.spec = EnvSpec(
            {
                "rgb": ArraySpec((8, 8, 3), "uint8"),
                "number": ArraySpec((1,), "float32"),
                "instruction": ArraySpec((3,), "int32", num_tokens=5),
            },
            actions,
            1,
        )

    async def reset(self) -> EnvStep:
        return self._shown(await super().reset())

    async def step(self, action: np.ndarray) -> EnvStep:
        check_action(action, self.num_envs, self.spec.actions)
        return self._shown(await super().step(action))

    def _shown(self, row: EnvStep) -> EnvStep:
        (number,) = row.observation.T
        return row._replace(
            observation={
                "rgb": np.tile(9 * number.astype(np.uint8)[:, None, None, None], (1, 8, 8, 3)),
                "number": number[:, None] / 10,
                "instruction": np.stack([number % 6, 0 * number, 0 * number], -1).astype(np.int32),
            }
        )


@pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete((3, 2)), Box(2)], ids=str)
@pytest.mark.parametrize("name", ["shallow", "mlp"])
def test_learner_sees_what_the_actor_saw_of_everything(name: str, space: ActionSpace) -> None:
    """On-policy, every importance weight is 1 in every action space, over nests of arrays."""
    group = SensesGroup([[3], [4, 8, 2], [100], [1]], space)
    net = make_net(name, group.spec, True, 1)
    with torch.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if parameter_name in ("policy.weight", "policy.mean.weight"):
                parameter.mul_(100)
    policy = Policy(net, space, CPU, torch.float32, seed=1)

    async def infer(*rows: Any) -> Any:
        await asyncio.sleep(0)
        return policy.infer(*rows)

    parts = unrolls(group, infer, policy.initial_state(4), length=4, count=3)
    assert np.ptp(parts[-1].unroll.behaviour_logits, axis=(0, 1)).max() > 0.05
    for part in parts:
        flags = {"batch_size": 4, "num_actors": 4, "micro_batch_rows": 10}
        learner = Learner(config(**flags), copy.deepcopy(net), space, CPU, torch.float32)
        learner.update([part])
        statistics = learner.take_statistics()
        assert statistics.rho_mean == pytest.approx(1, abs=1e-4)
        assert math.isfinite(statistics.grad_norm)
        if isinstance(space, Box):
            assert not isinstance(statistics.action_counts, np.ndarray)
        else:
            choices = 2 if isinstance(space, MultiDiscrete) else 1
            assert statistics.action_counts.sum() == choices * part.unroll.valid.sum()


def test_choices_are_counted_one_after_the_other() -> None:
    """Discrete: a count per action; MultiDiscrete: of the first choice, then of the next."""
    actions = np.array([[0, 1], [2, 1], [2, 0]])
    assert count_choices(Discrete(4), actions[:, 0]).tolist() == [1, 0, 2, 0]  # type: ignore[union-attr]
    counts = count_choices(MultiDiscrete((3, 2)), actions)
    assert counts.tolist() == [1, 0, 2, 1, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [5, 11, 1000])
def test_micro_batches_add_up_to_the_batch(rows: int) -> None:
    """Learning a batch in pieces gives the gradient, counters and weights of the whole."""
    group = CounterGroup([[3], [5], [2], [7], [4]])
    parts = counted(group, length=4)
    nets = []
    for micro_batch_rows in (0, rows):
        net = recurrent_net(group.spec)
        flags = {"batch_size": 5, "num_actors": 5, "micro_batch_rows": micro_batch_rows}
        parts_of_net = [
            Columns(
                part.unroll._replace(core_state=(np.zeros((5, 16), np.float32),) * 2), *part[1:]
            )
            for part in parts
        ]
        learner = Learner(config(**flags), net, group.spec.actions, CPU, torch.float32)
        learner.update(parts_of_net)
        assert learner.updates == 1
        nets.append((net, learner.frames, learner.take_statistics()))
    (whole, frames, figures), (pieces, frames_of_pieces, figures_of_pieces) = nets
    assert frames == frames_of_pieces
    assert figures.total_loss == pytest.approx(figures_of_pieces.total_loss, rel=1e-4)
    assert figures.grad_norm == pytest.approx(figures_of_pieces.grad_norm, rel=1e-4)
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_policy_lag_is_counted_in_updates() -> None:
    """Rows acted by version 0 and learned at update 2 have a lag of 2."""
    parts = counted(CounterGroup([[100]]), length=4)
    parts[0].unroll.policy_version[:] = 0
    learner = Learner(config(learning_rate=1e-9), ProbeNet(), Discrete(3), CPU, torch.float32)
    for _ in range(3):
        learner.update(parts)
    statistics = learner.take_statistics()
    assert statistics.policy_lag_mean == pytest.approx(1)
    assert statistics.policy_lag_max == 2
    assert statistics.policy_lag_counts.tolist() == [4, 4, 4] + [0] * (MAX_LAG_COUNTED - 2)
    learner.updates = MAX_LAG_COUNTED + 100
    learner.update(parts)
    assert learner.take_statistics().policy_lag_counts.tolist() == [0] * MAX_LAG_COUNTED + [4]


def test_frames_count_action_repeats_of_valid_rows() -> None:
    """Three valid rows at four repeats are twelve frames, and drive the learning rate."""
    learner = Learner(
        config(num_action_repeats=4, total_environment_frames=24, learning_rate=0.1),
        ProbeNet(),
        Discrete(3),
        CPU,
        torch.float32,
    )
    learner.update(counted(CounterGroup([[2]]), length=4))
    assert learner.frames == 12
    assert learner.take_statistics().learning_rate == pytest.approx(0.05)


def test_update_publishes_its_weights() -> None:
    """After an update the policy acts with the new weights under the new version."""
    net = ProbeNet()
    policy = Policy(net, Discrete(3), CPU, torch.float32, seed=1)
    learner = Learner(config(), net, Discrete(3), CPU, torch.float32, policy)
    row = (np.ones((1, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64),
           np.zeros(1, np.bool_), (np.zeros((1, 1), np.float32),))  # fmt: skip
    assert policy.infer(*row).policy_version.tolist() == [0]
    learner.update(counted(CounterGroup([[2]]), length=4))
    step = policy.infer(*row)
    assert step.policy_version.tolist() == [1]
    np.testing.assert_array_equal(step.logits[0], net.bias.detach().numpy())


def test_state_round_trip_continues_identically() -> None:
    """A learner restored from another's state takes the same next update."""
    parts = counted(CounterGroup([[2]]), length=4, count=2)
    one = Learner(config(), ProbeNet(), Discrete(3), CPU, torch.float32)
    one.update(parts[:1])
    other = Learner(config(), ProbeNet(), Discrete(3), CPU, torch.float32)
    other.restore(one.state())
    assert (other.frames, other.updates) == (one.frames, one.updates)
    assert other.learning_rate == one.learning_rate
    one.update(parts[1:])
    other.update(parts[1:])
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_flags_given_on_resuming_are_not_the_checkpoints(optimizer: str) -> None:
    """Accumulators come from the checkpoint, the optimiser's flags from this run."""
    parts = counted(CounterGroup([[2]]), length=4, count=2)
    one = Learner(config(optimizer=optimizer), ProbeNet(), Discrete(3), CPU, torch.float32)
    one.update(parts[:1])
    flags = {"optimizer": optimizer, "epsilon": 0.5, "momentum": 0.9, "decay": 0.5}
    other = Learner(config(**flags), ProbeNet(), Discrete(3), CPU, torch.float32)
    before = [
        {k: v for k, v in group.items() if k != "params"} for group in other._optimizer.param_groups
    ]
    other.restore(one.state())
    after = [
        {k: v for k, v in group.items() if k != "params"} for group in other._optimizer.param_groups
    ]
    assert after == before
    other.update(parts[1:])
    assert other.updates == 2


def test_state_is_a_copy() -> None:
    """What ``state`` returned does not change with later updates."""
    parts = counted(CounterGroup([[2]]), length=4, count=2)
    learner = Learner(config(), ProbeNet(), Discrete(3), CPU, torch.float32)
    learner.update(parts[:1])
    state = learner.state()
    before = state["net"]["w"].clone()
    square = next(iter(state["optimizer"]["state"].values()))["mean_square"].clone()
    learner.update(parts[1:])
    assert torch.equal(state["net"]["w"], before)
    assert torch.equal(next(iter(state["optimizer"]["state"].values()))["mean_square"], square)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("net_name", ["shallow", "deep", "ancestor"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_update_is_what_plain_backward_and_optimiser_make(
    optimizer: str, net_name: str, precision: torch.dtype
) -> None:
    """Shared micro-batches, blocked layouts and fused steps change every weight as backward() and
    an optimiser without any of that do, element for element.

    Compared are steps, not gradients: a gradient in another memory layout than its parameter is
    right by itself, and wrong for an optimiser that goes through both in the order of memory.
    """
    spec = EnvSpec(ArraySpec((4, 84, 84), "uint8"), Discrete(6), 1)
    flags = config(
        net=net_name, batch_size=4, unroll_length=3, learner_threads=2, micro_batch_rows=4,
        optimizer=optimizer, decay=0.99, epsilon=1.0, learning_rate=1e-3, discounting=0.99,
    )  # fmt: skip
    net = make_net(net_name, spec, False, 1)
    plain = copy.deepcopy(net)
    batch = components.random_unroll(3, 4, spec, (), seed=3)
    rewards = np.random.default_rng(4).integers(-3, 4, batch.reward.shape)
    batch.reward[:] = rewards
    learner = Learner(flags, net, spec.actions, CPU, precision)
    learner.update([Columns(batch, 0, 4)])
    learner.close()

    oracle = Learner(flags, plain, spec.actions, CPU, precision)
    oracle._loss(map_nest(torch.from_numpy, batch)).total.backward()  # type: ignore[no-untyped-call]
    oracle.close()
    for name, parameter in plain.named_parameters():
        step = net.get_parameter(name).detach() - parameter.detach()
        assert parameter.grad is not None
        gradient = parameter.grad
        # The first step of either from its initial state.
        if optimizer == "adam":
            expected = -1e-3 * gradient / (gradient.abs() + 1.0)
        else:
            expected = -1e-3 * gradient / (0.99 + 0.01 * gradient.square() + 1.0).sqrt()
        # Micro-batches round otherwise than the whole, weights are rounded to 1e-7.
        tolerance = 0.1 if precision == torch.bfloat16 else 1e-2
        error = (step - expected).norm() / expected.norm()
        assert error <= tolerance, f"{name} differs by {error:.3f} of its step"
