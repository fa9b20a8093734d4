"""The acting policy: published weights are never torn, actions follow the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asyncagent.envs.base import check_action
from asyncagent.errors import UsageError
from asyncagent.models import make_net
from asyncagent.policy import Policy, resolve_device, resolve_precision
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    MultiDiscrete,
    Nest,
    PolicyStep,
    map_nest,
)

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
ATARI = EnvSpec(ArraySpec((4, 84, 84), "uint8"), Discrete(6), 4)
VECTOR = EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1)


SENSES = EnvSpec(
    {
        "rgb": ArraySpec((24, 32, 3), "uint8"),
        "numbers": ArraySpec((5,), "float32"),
        "instruction": ArraySpec((6,), "int32", num_tokens=255),
    },
    MultiDiscrete((3, 2)),
    4,
)


def infer(policy: Policy, num_rows: int, spec: EnvSpec = VECTOR, **fields: Any) -> PolicyStep:
    rng = np.random.default_rng(0)
    one = spec.actions.array
    rows = {
        "observation": map_nest(
            lambda leaf: rng.integers(0, 255, (num_rows, *leaf.shape)).astype(leaf.dtype),
            spec.observation,
        ),
        "reward": np.zeros(num_rows, np.float32),
        "last_action": np.zeros((num_rows, *one.shape), one.dtype),
        "first": np.zeros(num_rows, np.bool_),
        "core_state": policy.initial_state(num_rows),
    }
    return policy.infer(*(rows | fields).values())


def test_shapes_and_types() -> None:
    """Actions int64 [N], logits float32 [N, A], version int64 [N], states float32."""
    policy = Policy(make_net("mlp", VECTOR, True, 1), VECTOR.actions, CPU, torch.float32, seed=1)
    step = infer(policy, 5)
    assert step.action.shape == (5,)
    assert step.action.dtype == np.int64
    assert step.logits.shape == (5, 3)
    assert step.logits.dtype == np.float32
    assert step.policy_version.tolist() == [0] * 5
    assert [leaf.dtype for leaf in step.core_state] == [np.float32] * 2


def test_actions_are_sampled_from_the_logits() -> None:
    """Over 20,000 rows the frequencies are the softmax of the logits, within 4 sigma."""
    net = make_net("mlp", VECTOR, False, 1)
    with torch.no_grad():
        net.policy.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))  # type: ignore[union-attr,operator]
    policy = Policy(net, VECTOR.actions, CPU, torch.float32, seed=1)
    count = 20_000
    step = infer(policy, count, observation=np.zeros((count, 10, 5), np.float32))
    probabilities = np.exp(step.logits[0]) / np.exp(step.logits[0]).sum()
    seen = np.bincount(step.action, minlength=3) / count
    sigma = np.sqrt(probabilities * (1 - probabilities) / count)
    assert (np.abs(seen - probabilities) < 4 * sigma).all()


def test_greedy_takes_the_likeliest() -> None:
    """A greedy policy chooses the argmax of its logits."""
    policy = Policy(
        make_net("mlp", VECTOR, False, 1), VECTOR.actions, CPU, torch.float32, seed=1, greedy=True
    )
    step = infer(policy, 100)
    assert np.array_equal(step.action, step.logits.argmax(-1))


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete((3, 2)), Box(2)], ids=str)
def test_actions_are_as_the_space_says(space: ActionSpace, greedy: bool) -> None:
    """Shape, dtype and range of the actions, sampled or likeliest, are the space's."""
    spec = EnvSpec(VECTOR.observation, space, 1)
    net = make_net("mlp", spec, True, 1)
    step = infer(Policy(net, space, CPU, torch.float32, seed=1, greedy=greedy), 40, spec)
    check_action(step.action, 40, space)
    assert step.action.dtype == space.array.dtype
    assert step.logits.shape == (40, space.num_logits)
    if greedy and isinstance(space, Box):
        assert np.array_equal(step.action, step.logits[:, :2])


@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete((3, 2)), Box(2)], ids=str)
def test_acting_at_random_ignores_the_net(space: ActionSpace) -> None:
    """With random_actions the logits, and so the actions, are those of no preference."""
    spec = EnvSpec(VECTOR.observation, space, 1)
    policies = [
        Policy(make_net("mlp", spec, True, seed), space, CPU, torch.float32, 1, random_actions=True)
        for seed in (1, 2)
    ]
    one, other = (infer(policy, 300, spec) for policy in policies)
    assert not one.logits.any()
    assert np.array_equal(one.action, other.action)
    assert one.action.std() > 0.4
    assert not np.array_equal(one.core_state[0], other.core_state[0]), "the net runs all the same"


@pytest.mark.parametrize("device", DEVICES)
def test_published_weights_are_a_copy(device: str) -> None:
    """Weights that change after publishing act only once they are published again."""
    net = make_net("mlp", VECTOR, False, 1).to(device)
    policy = Policy(net, VECTOR.actions, torch.device(device), torch.float32, seed=1)
    before = infer(policy, 4).logits
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert np.array_equal(infer(policy, 4).logits, before)
    policy.publish(7, net)
    if device == "cuda":
        torch.cuda.synchronize()  # a copy that is not complete is not waited for
    after = infer(policy, 4)
    assert not np.allclose(after.logits, before)
    assert after.policy_version.tolist() == [7] * 4
    assert policy.version == 7


def test_first_resets_the_state_of_its_row_only() -> None:
    """A row with ``first`` acts as from the initial state, its neighbours from theirs."""
    policy = Policy(make_net("mlp", VECTOR, True, 1), VECTOR.actions, CPU, torch.float32, seed=1)
    state = tuple(np.ones((2, 128), np.float32) for _ in range(2))
    fresh = infer(policy, 2).logits
    worn = infer(policy, 2, core_state=state).logits
    mixed = infer(policy, 2, core_state=state, first=np.array([True, False])).logits
    np.testing.assert_allclose(mixed[0], fresh[0], rtol=1e-5)
    np.testing.assert_allclose(mixed[1], worn[1], rtol=1e-5)
    assert not np.allclose(fresh, worn)


class PublishesInMidBatch(nn.Module):
    """Two layers between which a test may publish other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(50, 4)
        self.two = nn.Linear(4, 3)
        self.scale = nn.Buffer(torch.ones(()))
        self.between: list[Callable[[], None]] = []

    def initial_state(self, num_rows: int) -> Nest:
        return ()

    def forward(self, observation: torch.Tensor, *rest: Any) -> Any:
        hidden = self.one(observation.flatten(2))
        for act in self.between:
            act()
        return self.two(hidden) * self.scale, hidden[..., 0], ()


def test_weights_are_never_torn() -> None:
    """A batch that is under way when weights are published ends with those it began with."""
    torch.manual_seed(0)
    net, other = PublishesInMidBatch(), PublishesInMidBatch()
    policy = Policy(net, VECTOR.actions, CPU, torch.float32, seed=1)
    expected = infer(policy, 3).logits
    acting = policy._net
    assert isinstance(acting, PublishesInMidBatch)
    acting.between.append(lambda: policy.publish(1, other))
    torn = infer(policy, 3)
    assert np.array_equal(torn.logits, expected)
    assert torn.policy_version.tolist() == [0] * 3
    acting.between.clear()
    assert infer(policy, 3).policy_version.tolist() == [1] * 3


def test_buffers_are_published_too() -> None:
    """Running statistics of a user's net reach the acting copy with the weights."""
    net = PublishesInMidBatch()
    policy = Policy(net, VECTOR.actions, CPU, torch.float32, seed=1)
    before = infer(policy, 3).logits
    net.scale.fill_(2.0)
    policy.publish(1, net)
    np.testing.assert_allclose(infer(policy, 3).logits, 2 * before, rtol=1e-6)


def test_users_bfloat16_heads_come_out_as_float32() -> None:
    """A net whose heads answer in bfloat16 under autocast still gives float32 logits."""
    step = infer(Policy(PublishesInMidBatch(), VECTOR.actions, CPU, torch.bfloat16, seed=1), 3)
    assert step.logits.dtype == np.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["shallow", "deep"])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_bfloat16_acts_as_float32_to_its_tolerance(name: str, use_lstm: bool, device: str) -> None:
    """The bfloat16 copy's logits are those of float32 to the error of some 15 bfloat16 layers."""
    net = make_net(name, ATARI, use_lstm, 1)
    with torch.no_grad():
        net.policy.weight.mul_(100)  # type: ignore[union-attr,operator]
    exact = infer(Policy(net, ATARI.actions, CPU, torch.float32, seed=1), 8, ATARI).logits
    rough = infer(
        Policy(net, ATARI.actions, torch.device(device), torch.bfloat16, seed=1), 8, ATARI
    ).logits
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(rough, exact, atol=0.08 * np.abs(exact).max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["shallow", "mlp"])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_bfloat16_reads_and_measures_as_float32(name: str, use_lstm: bool, device: str) -> None:
    """So do copies that see pictures, measurements and instructions, and have two choices."""
    net = make_net(name, SENSES, use_lstm, 1)
    with torch.no_grad():
        net.policy.weight.mul_(100)  # type: ignore[union-attr,operator]
    space = SENSES.actions
    exact = infer(Policy(net, space, CPU, torch.float32, seed=1), 8, SENSES).logits
    policy = Policy(net, space, torch.device(device), torch.bfloat16, seed=1)
    rough = infer(policy, 8, SENSES).logits
    parameters = policy._net.named_parameters()
    (embedding,) = [value for name, value in parameters if name.endswith("embedding.weight")]
    assert embedding.dtype == torch.bfloat16
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(rough, exact, atol=0.08 * np.abs(exact).max())


def test_generator_state_continues_the_sampling() -> None:
    """Restored, the sampler draws what it would have drawn."""
    net = make_net("mlp", VECTOR, False, 1)
    one, two = (Policy(net, VECTOR.actions, CPU, torch.float32, seed=seed) for seed in (1, 2))
    infer(one, 10)
    two.set_generator_state(one.generator_state())
    assert np.array_equal(infer(one, 1000).action, infer(two, 1000).action)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", "cpu:x"])
def test_devices_that_are_not_there(name: str) -> None:
    """An unknown device is a usage error that names it."""
    with pytest.raises(UsageError, match=f"device='{name}'"):
        resolve_device(name)


def test_precision() -> None:
    """A precision asked for is taken; auto takes one that exists."""
    assert resolve_precision("float32", CPU) is torch.float32
    assert resolve_precision("bfloat16", CPU) is torch.bfloat16
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
