"""The CUDA path: what it does in which order anywhere, and with ``cuda`` that it is right there.

Without a GPU, a ``Lane`` does nothing, and functions are "recorded" by being called again.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import torch
from torch import Tensor, nn

from asyncagent import cuda_learning
from asyncagent.config import Config, resolve
from asyncagent.cuda import Graphs, Lane, Layout, Replayed, _Watch, copy_all, padded_rows
from asyncagent.cuda_acting import PaddedBatches
from asyncagent.cuda_learning import BatchStep, copy_columns
from asyncagent.errors import UsageError
from asyncagent.learner import Learner
from asyncagent.loop import train
from asyncagent.models import make_net
from asyncagent.optim import RMSPropTF, set_learning_rate
from asyncagent.policy import Policy, Snapshot, _newest_reached, resolve_devices
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    MultiDiscrete,
    Nest,
    PolicyStep,
    Unroll,
    map_nest,
)
from asyncagent.unroll import Columns, gather_columns

WATCHDOG_S = 120
CPU = torch.device("cpu")
GPU = torch.device("cuda:0")
on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
cuda = lambda test: on_gpu[0](on_gpu[1](test))  # noqa: E731

VECTOR = EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1)
ATARI = EnvSpec(ArraySpec((4, 84, 84), "uint8"), Discrete(6), 4)
SENSES = EnvSpec(
    {
        "rgb": ArraySpec((24, 32, 3), "uint8"),
        "instruction": ArraySpec((6,), "int32", num_tokens=255),
    },
    MultiDiscrete((3, 2)),
    4,
)


class Recorder:
    """Records by keeping the function; counts how often."""

    def __init__(self, error: str = "") -> None:
        self.count = 0
        self.replays = 0
        self._error = error

    def __call__(self, function: Callable[[], None], lane: Lane) -> Callable[[], None]:
        self.count += 1
        if self._error:
            raise RuntimeError(self._error)

        def replay() -> None:
            self.replays += 1
            function()

        return replay


def rows_of(spec: EnvSpec, num_rows: int, state: Nest, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of ``Policy.infer``; ``state`` has at least as many rows."""
    rng = np.random.default_rng(seed)
    one = spec.actions.array
    last_action = rng.integers(0, 2, (num_rows, *one.shape)).astype(one.dtype)
    return (
        map_nest(
            lambda leaf: rng.integers(0, 255, (num_rows, *leaf.shape)).astype(leaf.dtype),
            spec.observation,
        ),
        rng.random(num_rows, np.float32),
        last_action,
        rng.random(num_rows) < 0.2,
        map_nest(lambda leaf: rng.random((num_rows, *leaf.shape[1:]), np.float32), state),
    )


def leaves(nest: Nest) -> list[Any]:
    return optree.tree_leaves(nest)


def steps_equal(one: PolicyStep, other: PolicyStep, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Actions, versions, logits and states agree."""
    np.testing.assert_array_equal(one.policy_version, other.policy_version)
    if one.action.dtype == np.int64:
        np.testing.assert_array_equal(one.action, other.action)
    for a, b in zip(leaves(one[1:3]), leaves(other[1:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def padded(policy: Policy, recorder: Recorder) -> Policy:
    """Let a policy on the CPU answer as one on CUDA does."""
    graphs = Graphs("inference", Lane(CPU), recorder)
    policy._padded = PaddedBatches(policy._forward, policy._choose, policy._actions, graphs)
    policy._load()
    return policy


# Blocks, sizes and copies.


@pytest.mark.parametrize("least", [1, 8])
def test_padded_sizes_are_few_and_close(least: int) -> None:
    """Every number of rows fits its size; at most a third is padding; 4096 rows make 20 sizes."""
    sizes = {rows: padded_rows(rows, least) for rows in range(1, 4097)}
    for rows, size in sizes.items():
        assert size >= rows
        assert size == least or 3 * (size - rows) < size
        assert padded_rows(size, least) == size
    assert len(set(sizes.values())) <= 24
    assert {8, 12, 16, 24, 32, 48} <= {padded_rows(rows) for rows in range(1, 50)}
    assert padded_rows(1) == 8


def test_a_block_holds_every_array() -> None:
    """Arrays of all dtypes lie in one block, aligned, apart from each other, the largest last."""
    rng = np.random.default_rng(0)
    nest = (
        {"big": rng.integers(0, 255, (6, 40, 3)).astype(np.uint8), "flag": rng.random(6) < 0.5},
        rng.random((6, 3), np.float32),
        rng.integers(0, 9, 6),
        (),
    )
    layout = Layout(nest)
    here, there = layout.zeros_pinned_for(CPU), layout.zeros_on(CPU)
    arrays, tensors = layout.arrays(here), layout.tensors(there)
    map_nest(np.copyto, arrays, nest)
    used = layout.bytes_of(4)
    assert used == layout.num_bytes - 2 * 40 * 3
    there[:used].copy_(here[:used])
    assert map_nest(lambda _: 0, tensors) == map_nest(lambda _: 0, nest)
    for tensor, leaf in zip(leaves(tensors), leaves(nest), strict=True):
        assert tensor.numpy().dtype == leaf.dtype
        assert tensor.data_ptr() % 64 == there.data_ptr() % 64
        np.testing.assert_array_equal(tensor.numpy()[:4], leaf[:4])


def test_copy_all_converts_and_keeps_its_targets() -> None:
    """Targets of several dtypes take their sources' values in place."""
    targets = [
        torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64)
    ]  # fmt: skip
    places = [target.data_ptr() for target in targets]
    copy_all(targets, [torch.arange(3.0), torch.full((2, 2), 0.5), torch.tensor(7)])
    assert [target.tolist() for target in targets] == [[0, 1, 2], [[0.5, 0.5], [0.5, 0.5]], 7]
    assert [target.data_ptr() for target in targets] == places


# Recording.


def test_called_twice_then_recorded_once() -> None:
    """The first two calls are made as they are, the third records, all later ones replay."""
    recorder, calls = Recorder(), []
    replayed = Replayed(lambda: calls.append(recorder.count), Graphs("it", Lane(CPU), recorder))
    for _ in range(5):
        replayed()
    assert calls == [0, 0, 1, 1, 1]
    assert recorder.replays == 3


def test_what_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """A recording that fails is told in one line, costs no call, and is the lane's last."""
    caplog.set_level(logging.INFO)
    recorder = Recorder("operation not permitted\nlong story")
    graphs = Graphs("inference", Lane(CPU), recorder)
    calls: list[int] = []
    for number in range(2):
        replayed = Replayed(lambda number=number: calls.append(number), graphs)  # type: ignore[misc]
        for _ in range(4):
            replayed()
    assert calls == [0] * 4 + [1] * 4
    assert recorder.count == 1
    (line,) = caplog.messages
    assert line == "inference runs without CUDA graphs: operation not permitted"


X = torch.randn(4, 3)
MASK = X > 0
RECORDABLE: list[Callable[[], Any]] = [
    lambda: X[torch.tensor([0, 2])],
    lambda: X.gather(1, torch.zeros(4, 1, dtype=torch.int64)),
    lambda: torch.where(MASK, X, -torch.inf) * 2,
    lambda: torch.softmax(X.to(torch.bfloat16) @ X.t().to(torch.bfloat16), -1),
    lambda: X.clone().masked_fill_(MASK, 0.0).index_put_((torch.tensor([1]),), torch.ones(())),
    lambda: torch.autograd.grad(nn.Linear(3, 2)(X.requires_grad_()).sum(), X),
]
NOT_RECORDABLE: list[Callable[[], Any]] = [
    lambda: X.sum().item(),
    lambda: int((X > 0).any(0).sum()),
    lambda: bool(MASK.any()) and X,
    lambda: X[MASK],
    lambda: X.clone().index_put_((MASK,), torch.ones(())),
    lambda: X.nonzero(),
    lambda: torch.unique(X, dim=0),
    lambda: torch.equal(X, X),
    lambda: X.to("meta"),
    lambda: torch.zeros((), device="meta").copy_(torch.zeros(())),
]


@pytest.mark.parametrize("index", range(len(RECORDABLE)))
def test_ordinary_operators_can_be_recorded(index: int) -> None:
    """Arithmetic, gathers, gradients and numbers of the host do not wait for the device."""
    with _Watch() as watch:
        RECORDABLE[index]()
    assert watch.found == ""


@pytest.mark.parametrize("index", range(len(NOT_RECORDABLE)))
@pytest.mark.parametrize("grad", [False, True])
def test_operators_that_wait_are_found(index: int, grad: bool) -> None:
    """Reading back, shapes that depend on data, and copies between devices are."""
    with torch.set_grad_enabled(grad), _Watch() as watch:
        NOT_RECORDABLE[index]()
    assert watch.found


class ReadsBack(torch.autograd.Function):
    """Its gradient depends on a number that is read back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * gradients[0].sum().item()


def test_the_way_back_is_watched_too() -> None:
    """What waits inside a gradient is found as well."""
    x = torch.ones(2, requires_grad=True)
    with _Watch() as watch:
        torch.autograd.grad(ReadsBack.apply(x).sum(), x)  # type: ignore[no-untyped-call]
    assert "local_scalar" in watch.found


# Acting.


@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete((3, 2)), Box(2)], ids=str)
@pytest.mark.parametrize("use_lstm", [False, True])
def test_padded_batches_answer_as_the_policy_does(space: ActionSpace, use_lstm: bool) -> None:
    """Any number of rows, called or replayed, gets the actions, logits and states it should."""
    spec = EnvSpec(VECTOR.observation, space, 1)
    net = make_net("mlp", spec, use_lstm, 1)
    plain = Policy(net, space, CPU, torch.float32, seed=3)
    recorder = Recorder()
    policy = padded(Policy(net, space, CPU, torch.float32, seed=3), recorder)
    for seed, rows in enumerate([5, 8, 1, 7, 13, 13, 13, 40, 2, 14]):
        arguments = rows_of(spec, rows, plain.initial_state(1), seed)
        steps_equal(policy.infer(*arguments), plain.infer(*arguments))
    if not use_lstm:  # on a CPU, the LSTM's input reads back
        assert recorder.count == 2
        assert recorder.replays == 5


def test_answers_are_nobody_elses() -> None:
    """An actor keeps its answer for an unroll: later batches do not change it."""
    net = make_net("mlp", VECTOR, True, 1)
    policy = padded(Policy(net, VECTOR.actions, CPU, torch.float32, seed=3), Recorder())
    first = policy.infer(*rows_of(VECTOR, 8, policy.initial_state(1), 0))
    kept = copy.deepcopy(first)
    for seed in range(1, 5):
        policy.infer(*rows_of(VECTOR, 8, policy.initial_state(1), seed))
    steps_equal(first, kept, rtol=0, atol=0)
    np.testing.assert_array_equal(first.action, kept.action)


def test_a_net_that_reads_back_acts_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    """Sentences are read as long as they are: told once, and answered right in every size."""
    net = make_net("mlp", SENSES, False, 1)
    space = SENSES.actions
    plain = Policy(net, space, CPU, torch.float32, seed=3)
    recorder = Recorder()
    policy = padded(Policy(net, space, CPU, torch.float32, seed=3), recorder)
    for seed, rows in enumerate([5, 5, 5, 5, 20, 20, 20]):
        arguments = rows_of(SENSES, rows, (), seed)
        steps_equal(policy.infer(*arguments), plain.infer(*arguments))
    assert recorder.count == 0
    (line,) = [line for line in caplog.messages if "CUDA graphs" in line]
    assert line.startswith("inference runs without CUDA graphs: aten._local_scalar_dense")


def test_new_weights_take_the_old_ones_places() -> None:
    """With graphs, published weights are copied to where the graphs read them."""
    net = make_net("mlp", VECTOR, False, 1)
    policy = padded(Policy(net, VECTOR.actions, CPU, torch.float32, seed=3), Recorder())
    places = [parameter.data_ptr() for parameter in policy._net.parameters()]
    arguments = rows_of(VECTOR, 4, ())
    before = policy.infer(*arguments)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    policy.publish(7, net)
    after = policy.infer(*arguments)
    assert after.policy_version.tolist() == [7] * 4
    assert not np.allclose(after.logits, before.logits)
    assert [parameter.data_ptr() for parameter in policy._net.parameters()] == places


class Event:
    """A mark that is reached when a test says so."""

    def __init__(self, reached: bool) -> None:
        self.reached = reached

    def query(self) -> bool:
        return self.reached


def test_acting_takes_the_newest_weights_that_are_there() -> None:
    """Copies still under way are not waited for; older ones than the newest whole are let go."""
    marks = [Event(True), Event(True), Event(False), Event(False)]
    snapshots = tuple(Snapshot(n, (), (), marks[n]) for n in range(4))
    assert [one.version for one in _newest_reached(snapshots)] == [1, 2, 3]
    marks[3].reached = True
    assert [one.version for one in _newest_reached(snapshots)] == [3]
    only = (Snapshot(0, (), (), Event(False)),)
    assert _newest_reached(only) == only, "the first are waited for, on the device"


# Learning.


def config(**flags: Any) -> Config:
    values: dict[str, Any] = {
        "level_name": "atari_pong",
        "unroll_length": 6,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "total_environment_frames": 2000,
    }
    return Config(**(values | flags))


def random_unroll(spec: EnvSpec, net: nn.Module, seed: int, num_envs: int, steps: int) -> Unroll:
    rng = np.random.default_rng(seed)
    rows, state = (steps + 1) * num_envs, net.initial_state(1)  # type: ignore[operator]

    def shaped(array: np.ndarray) -> np.ndarray:
        return array.reshape(steps + 1, num_envs, *array.shape[1:])

    observation, reward, last_action, first, _ = rows_of(spec, rows, ())
    _, _, action, valid, core_state = rows_of(spec, rows, state, seed + 1000)
    return Unroll(
        observation=map_nest(shaped, observation),
        reward=shaped(reward),
        terminated=shaped(rng.random(rows) < 0.1),
        truncated=shaped(rng.random(rows) < 0.1),
        first=shaped(first),
        last_action=shaped(last_action),
        action=shaped(action)[:-1],
        behaviour_logits=rng.random((steps, num_envs, spec.actions.num_logits), np.float32),
        policy_version=np.zeros((steps, num_envs), np.int64),
        valid=~shaped(valid)[:-1],
        core_state=map_nest(lambda leaf: leaf[:num_envs], core_state),
    )


def batches(spec: EnvSpec, net: nn.Module, count: int, steps: int = 6) -> list[list[Columns]]:
    """Batches of five columns that are parts of several unrolls."""
    result = []
    for seed in range(count):
        one, other = (random_unroll(spec, net, 10 * seed + n, 3, steps) for n in range(2))
        result.append([Columns(one, 0, 3), Columns(other, 1, 3)])
    return result


def test_columns_are_written_where_they_belong() -> None:
    """``copy_columns`` writes what ``gather_columns`` would return."""
    net = make_net("mlp", VECTOR, True, 1)
    (parts,) = batches(VECTOR, net, 1)
    expected = gather_columns(parts)
    out = map_nest(np.zeros_like, expected)
    copy_columns(parts, out)
    for one, other in zip(leaves(out), leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_whole_batches_teach_what_micro_batches_do(optimizer: str) -> None:
    """Replayed updates over static memory give the weights and figures of ordinary ones."""
    net = make_net("mlp", VECTOR, False, 1)
    flags = {"optimizer": optimizer, "decay": 0.99, "epochs_per_batch": 2}
    plain = Learner(config(**flags), net, VECTOR.actions, CPU, torch.float32)
    other = Learner(config(**flags), copy.deepcopy(net), VECTOR.actions, CPU, torch.float32)
    recorder = Recorder()
    other._batch_step = BatchStep(
        other._step, Graphs("learning", Lane(CPU), recorder), other._verdict
    )
    for parts in batches(VECTOR, net, 3):
        plain.update(parts)
        other.update(parts)
    assert (recorder.count, recorder.replays) == (1, 4)
    assert (other.frames, other.updates) == (plain.frames, plain.updates)
    assert other.frames > 0
    one, two = plain.take_statistics(), other.take_statistics()
    for name in ("total_loss", "grad_norm", "rho_mean", "entropy", "policy_lag_mean"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4), name
    for a, b in zip(plain.net.parameters(), other.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_restored_learner_records_anew() -> None:
    """After ``restore``, a replay of the old recording would write to the old accumulators."""
    net = make_net("mlp", VECTOR, False, 1)
    learner = Learner(config(), net, VECTOR.actions, CPU, torch.float32)
    recorder = Recorder()
    learner._batch_step = BatchStep(
        learner._step, Graphs("learning", Lane(CPU), recorder), learner._verdict
    )
    parts, *_ = batches(VECTOR, net, 1)
    for _ in range(3):
        learner.update(parts)
    learner.restore(learner.state())
    for _ in range(3):
        learner.update(parts)
    assert recorder.count == 2


class TapedLane:
    """A lane whose marks and waits are written to a tape."""

    def __init__(self, device: torch.device, tape: list[str], name: str = "bus") -> None:
        self.device = device
        self._tape = tape
        self._name = name
        self._count = 0

    def use(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> str:
        self._count += 1
        self._tape.append(f"{self._name} {self._count}")
        return self._tape[-1]

    def after(self, mark: str | None) -> None:
        if mark is not None:
            self._tape.append(f"{self._name} after {mark}")


def test_the_order_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is overwritten on its way or before it is taken; one update at most is waiting."""
    tape: list[str] = []
    monkeypatch.setattr(cuda_learning, "Lane", lambda device: TapedLane(device, tape))

    def wait_for(mark: str | None) -> None:
        if mark is not None:
            tape.append(f"wait for {mark}")

    monkeypatch.setattr(cuda_learning, "wait_for", wait_for)
    net = make_net("mlp", VECTOR, False, 1)
    lane: Any = TapedLane(CPU, tape, "lane")
    graphs = Graphs("learning", lane, Recorder())
    step = BatchStep(lambda batch: tape.append("learn"), graphs, torch.zeros(3))
    for parts in batches(VECTOR, net, 2):
        step(parts)
        tape.append("return")
    assert tape == [
        *("bus 1", "lane after bus 1", "lane 1", "learn", "lane 2", "return"),
        *("bus after lane 1", "bus 2"),
        *("lane after bus 2", "lane 3", "learn", "lane 4", "wait for lane 2", "return"),
    ]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_learning_rate_may_be_a_tensor(momentum: float) -> None:
    """RMSProp takes the same steps, and a tensor keeps its place when the rate changes."""
    weights = [torch.ones(4, requires_grad=True) for _ in range(2)]
    rate = torch.tensor(0.1)
    optimizers = [
        RMSPropTF(weights[:1], 0.1, momentum=momentum),
        RMSPropTF(weights[1:], rate, momentum=momentum),
    ]
    for gradient in (0.5, -2.0, 0.1):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            set_learning_rate(optimizer, 0.1 * abs(gradient))
            weight.grad = torch.full((4,), gradient)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])
    assert optimizers[1].param_groups[0]["lr"] is rate
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


# Devices.


@pytest.mark.parametrize(
    ("count", "flags", "devices"),
    [
        (0, {}, ("cpu", "cpu")),
        (1, {}, ("cuda:0", "cuda:0")),
        (2, {}, ("cuda:0", "cuda:1")),
        (4, {}, ("cuda:0", "cuda:1")),
        (2, {"device": "cuda"}, ("cuda:0", "cuda:0")),
        (2, {"device": "cuda:1"}, ("cuda:1", "cuda:1")),
        (2, {"device": "cpu"}, ("cpu", "cpu")),
        (2, {"inference_device": "cuda:0"}, ("cuda:0", "cuda:0")),
        (2, {"learner_device": "cuda:1", "inference_device": "cuda"}, ("cuda:1", "cuda:0")),
        (1, {"learner_device": "cuda", "device": "cpu"}, ("cuda:0", "cpu")),
        (1, {"inference_device": "cpu"}, ("cuda:0", "cpu")),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, count: int, flags: dict[str, str], devices: tuple[str, str]
) -> None:
    """A flag of its own wins, then ``device``; two GPUs take one each, where nothing is said."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    assert tuple(map(str, resolve_devices(config(**flags)))) == devices


@pytest.mark.parametrize("flag", ["learner_device", "inference_device", "device"])
@pytest.mark.parametrize("name", ["cuda:1", "tpu", "meta"])
def test_a_device_that_is_not_there_is_told_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    """One line names the flag, what it said, and what would be right."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=f"^{flag}='{name}' (is not there|must be)[^\n]*$"):
        resolve_devices(config(**{flag: name}))


# On a GPU.


@cuda
@pytest.mark.parametrize("space", [Discrete(6), MultiDiscrete((3, 2)), Box(2)], ids=str)
@pytest.mark.parametrize("name", ["shallow", "deep"])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_graphs_act_as_called_functions_do(name: str, use_lstm: bool, space: ActionSpace) -> None:
    """On a GPU, recorded batches of every size answer as unrecorded ones, seed for seed."""
    spec = EnvSpec(ATARI.observation, space, 4)
    net = make_net(name, spec, use_lstm, 1)
    eager, recorded = (Policy(net, space, GPU, torch.bfloat16, seed=3) for _ in range(2))
    assert eager._padded is not None and recorded._padded is not None
    eager._padded._graphs.gave_up = True
    for seed, rows in enumerate([5, 8, 1, 7, 13, 13, 13, 40, 40, 40, 2, 14]):
        arguments = rows_of(spec, rows, eager.initial_state(1), seed)
        one, other = eager.infer(*arguments), recorded.infer(*arguments)
        scale = float(np.abs(one.logits).max())
        for a, b in zip(leaves(one[1:3]), leaves(other[1:3]), strict=True):
            np.testing.assert_allclose(a, b, atol=0.05 * max(1.0, scale))
        if one.action.dtype == np.int64:
            assert (one.action == other.action).mean() > 0.8, "the same draws, all but ties"
    assert not recorded._padded._graphs.gave_up


@cuda
def test_published_weights_reach_the_graphs() -> None:
    """On a GPU, a replayed graph acts with the weights published last, under their version."""
    net = make_net("shallow", ATARI, True, 1)
    policy = Policy(net, ATARI.actions, GPU, torch.bfloat16, seed=3, greedy=True)
    arguments = rows_of(ATARI, 8, policy.initial_state(1))
    before = [policy.infer(*arguments) for _ in range(4)][-1]
    with torch.no_grad():
        net.policy.bias.add_(torch.tensor([0, 0, 9.0, 0, 0, 0]))  # type: ignore[union-attr,operator]
    policy.publish(7, net)
    torch.cuda.synchronize()
    after = policy.infer(*arguments)
    assert after.policy_version.tolist() == [7] * 8
    assert after.action.tolist() == [2] * 8
    np.testing.assert_allclose(after.logits[:, :2], before.logits[:, :2], atol=1e-2)


@cuda
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("name", ["shallow", "deep"])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_a_recorded_update_is_the_called_one(name: str, use_lstm: bool, optimizer: str) -> None:
    """On a GPU, graphs take the updates that called functions do; the CPU's are near."""
    net = make_net(name, ATARI, use_lstm, 1)
    flags = {"optimizer": optimizer, "max_grad_norm": 40.0}
    learners = {
        who: Learner(config(**flags), copy.deepcopy(net), ATARI.actions, device, torch.bfloat16)
        for who, device in {"recorded": GPU, "called": GPU, "cpu": CPU}.items()
    }
    called, recorded = learners["called"]._batch_step, learners["recorded"]._batch_step
    assert called is not None and recorded is not None
    called._graphs.gave_up = True
    for parts in batches(ATARI, net, 6):
        for learner in learners.values():
            learner.update(parts)
    assert not recorded._graphs.gave_up
    figures = {who: learner.take_statistics() for who, learner in learners.items()}
    for who, tolerance in {"called": 0.02, "cpu": 0.1}.items():
        assert learners[who].frames == learners["recorded"].frames
        for field in ("total_loss", "grad_norm", "rho_mean"):
            expected = getattr(figures[who], field)
            assert getattr(figures["recorded"], field) == pytest.approx(expected, rel=tolerance)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    moved = {
        who: torch.cat([p.detach().cpu().flatten() for p in learner.net.parameters()]) - before
        for who, learner in learners.items()
    }
    assert moved["called"].norm() > 0
    assert (moved["recorded"] - moved["called"]).norm() < 0.1 * moved["called"].norm()


@cuda
def test_an_update_waits_for_nothing_it_computed() -> None:
    """On a GPU, updates make no synchronising call: torch itself would raise."""
    net = make_net("deep", ATARI, True, 1)
    policy = Policy(net, ATARI.actions, GPU, torch.bfloat16, seed=3)
    learner = Learner(config(), net, ATARI.actions, GPU, torch.bfloat16, policy)
    for parts in batches(ATARI, net, 4):
        learner.update(parts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for parts in batches(ATARI, net, 4):
            learner.update(parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    learner.take_statistics()


@cuda
def test_acting_and_learning_record_at_once() -> None:
    """On a GPU, two threads that infer and learn side by side do not spoil each other's graphs."""
    net = make_net("shallow", ATARI, True, 1)
    policy = Policy(net, ATARI.actions, GPU, torch.bfloat16, seed=3)
    learner = Learner(config(), net, ATARI.actions, GPU, torch.bfloat16, policy)
    assert policy._padded is not None and learner._batch_step is not None
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def act() -> None:
        for n in range(300):
            step = policy.infer(*rows_of(ATARI, 1 + n % 60, policy.initial_state(1), n))
            assert np.isfinite(step.logits).all()

    parts, *_ = batches(ATARI, net, 1)

    def learn() -> None:
        for _ in range(100):
            learner.update(parts)
        learner.take_statistics()
        learner.state()

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in (act, learn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
        assert not thread.is_alive()
    assert not failures
    assert not policy._padded._graphs.gave_up
    assert not learner._batch_step._graphs.gave_up


@cuda
def test_a_checkpoint_crosses_devices() -> None:
    """What a learner on a GPU saved goes on on a CPU, and the other way round."""
    net = make_net("shallow", ATARI, False, 1)
    for optimizer in ("rmsprop", "adam"):
        for one, other in ((GPU, CPU), (CPU, GPU)):
            flags = {"optimizer": optimizer}
            first = Learner(config(**flags), copy.deepcopy(net), ATARI.actions, one, torch.float32)
            for parts in batches(ATARI, net, 4):
                first.update(parts)
            state = first.state()
            assert isinstance(state["optimizer"]["param_groups"][0]["lr"], float)
            state = map_nest(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, state)
            second = Learner(
                config(**flags), copy.deepcopy(net), ATARI.actions, other, torch.float32
            )
            second.restore(state)
            for parts in batches(ATARI, net, 4):
                first.update(parts)
                second.update(parts)
            for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
                torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0.05, atol=1e-3)


@cuda
@pytest.mark.parametrize("use_lstm", [False, True])
def test_a_run_on_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture, use_lstm: bool) -> None:
    """A whole run trains with graphs to its end, and a second session resumes it."""
    flags: dict[str, Any] = {"logdir": str(tmp_path), "device": "cuda", "use_lstm": use_lstm}
    for frames in (20_000, 40_000):
        result = train(resolve("catch", total_environment_frames=frames, **flags))
        assert result.frames >= frames
        assert result.last_report is not None
    assert "without CUDA graphs" not in caplog.text


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_gpus_take_one_each() -> None:
    """Weights learned on one GPU act on the other."""
    net = make_net("shallow", ATARI, True, 1)
    policy = Policy(net, ATARI.actions, torch.device("cuda:1"), torch.bfloat16, seed=3)
    learner = Learner(config(), net, ATARI.actions, GPU, torch.bfloat16, policy)
    arguments = rows_of(ATARI, 8, policy.initial_state(1))
    before = policy.infer(*arguments)
    for parts in batches(ATARI, net, 6):
        learner.update(parts)
        policy.infer(*arguments)
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)
    after = policy.infer(*arguments)
    assert after.policy_version.tolist() == [6] * 8
    assert not np.allclose(after.logits, before.logits)
    for one, other in zip(policy._net.parameters(), learner.net.parameters(), strict=True):
        torch.testing.assert_close(one.cpu().float(), other.cpu(), rtol=0.01, atol=1e-3)
