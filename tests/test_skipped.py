"""Updates whose numbers are none: skipped without a trace, counted, told, kept and explained."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import torch
from torch import Tensor, nn

from asyncagent.__main__ import main
from asyncagent.config import Config, resolve
from asyncagent.cuda import Graphs, Lane
from asyncagent.cuda_learning import BatchStep
from asyncagent.errors import NotFinite, UsageError
from asyncagent.learner import Learner
from asyncagent.models import make_net
from asyncagent.policy import Policy
from asyncagent.replay import build_net, compute, report_fields
from asyncagent.skipped import FILE, SkippedBatch, is_skipped, load_skipped, save_skipped
from asyncagent.structs import ArraySpec, Box, Discrete, EnvSpec, Nest, Unroll, map_nest
from asyncagent.unroll import Columns, UnrollQueue, split_columns
from tests.test_cuda import Recorder, batches

CPU = torch.device("cpu")
SPEC = EnvSpec(
    {"seen": ArraySpec((3,), "float32"), "said": ArraySpec((4,), "int32", num_tokens=5)},
    Discrete(3),
    1,
)
PLAIN = EnvSpec(ArraySpec((3,), "float32"), Discrete(3), 1)
ORIGINS = ("catch, actor-0", "catch, actor-1")
"""Of columns 0, 1, 2 and 3, 4 of every batch."""


def config(logdir: Path, **flags: Any) -> Config:
    values: dict[str, Any] = {
        "logdir": str(logdir),
        "level_name": "catch",
        "net": "mlp",
        "unroll_length": 6,
        "batch_size": 5,
        "learning_rate": 1e-2,
        "reward_clipping": "none",
        "micro_batch_rows": 14,
        "total_environment_frames": 10_000,
    }
    return resolve(**(values | flags))


def a_net(spec: EnvSpec = PLAIN, use_lstm: bool = False) -> nn.Module:
    return make_net("mlp", spec, use_lstm, 1)


def some_batches(count: int, spec: EnvSpec = PLAIN, use_lstm: bool = False) -> list[list[Columns]]:
    """Whole batches of five columns, all of them valid, whose origins are known."""
    made = batches(spec, a_net(spec, use_lstm), count)
    for parts in made:
        for part in parts:
            unroll = part.unroll
            for flags in (unroll.terminated, unroll.truncated, unroll.first):
                flags[:] = False
            unroll.valid[:] = True
            unroll.reward[:] = np.random.default_rng(1).integers(-1, 2, unroll.reward.shape)
            *said, seen = optree.tree_leaves(unroll.observation)
            for sentence in said:
                sentence %= 6
            seen[:] = np.random.default_rng(2).random(seen.shape, np.float32)
    return [
        [part._replace(origin=origin) for part, origin in zip(parts, ORIGINS, strict=True)]
        for parts in made
    ]


def make(kind: str, logdir: Path, net: nn.Module, **flags: Any) -> Learner:
    """A learner of ``net``: as on a CPU, or as on CUDA, but at once and recorded by calling."""
    spec = flags.pop("spec", PLAIN)
    policy = flags.pop("policy", None)
    learner = Learner(
        config(logdir, **flags), net, spec.actions, CPU, torch.float32, policy, spec.observation
    )
    if kind == "device":
        graphs = Graphs("learning", Lane(CPU), Recorder())
        learner._batch_step = BatchStep(learner._step, graphs, learner._verdict)
    return learner


def nan_reward(unroll: Unroll) -> None:
    unroll.reward[3, 2] = np.nan


def inf_logits(unroll: Unroll) -> None:
    unroll.behaviour_logits[2, 1, 0] = np.inf


def nan_observation(unroll: Unroll) -> None:
    optree.tree_leaves(unroll.observation)[-1][4, 0, 1] = np.nan


def large_reward(unroll: Unroll) -> None:
    """The loss overflows."""
    unroll.reward[5, 1] = 1e30


def steep(unroll: Unroll) -> None:
    """The loss is finite, and the square of its gradient's norm is not."""
    unroll.reward[1, 2] = 1.8e19
    unroll.action[0, 2] = 0
    unroll.behaviour_logits[0, 2] = (-5, 0, 0)  # so that the row counts in full


CULPRITS: dict[Callable[[Unroll], None], tuple[str, int | None, str]] = {
    nan_reward: ("V-trace targets", 2, "reward is nan at row 3 of column 2 (catch, actor-0)"),
    inf_logits: (
        *("importance weights", 2),
        "behaviour_logits is inf at row 2 of column 1 (catch, actor-0)",
    ),
    nan_observation: (
        *("network's output", 4),
        "observation is nan at row 4 of column 0 (catch, actor-0)",
    ),
    large_reward: ("baseline loss", 0, "reward is 1e+30 at row 5 of column 1 (catch, actor-0)"),
    steep: ("gradient", None, "reward is 1.8e+19 at row 1 of column 2 (catch, actor-0)"),
}
"""What is planted -> the term, its row, and what is to be blamed."""
poisons = pytest.mark.parametrize("poison", CULPRITS)
kinds = pytest.mark.parametrize("kind", ["cpu", "device"])
optimisers = pytest.mark.parametrize(
    "optimiser",
    [
        {"optimizer": "rmsprop", "momentum": 0.0},
        {"optimizer": "rmsprop", "momentum": 0.9},
        {"optimizer": "adam", "momentum": 0.9},
    ],
    ids=["rmsprop", "momentum", "adam"],
)


def everything(learner: Learner) -> list[Tensor]:
    """Copies of the weights and of the optimiser's tensors."""
    state: list[Any] = optree.tree_leaves(learner._optimizer.state_dict()["state"])
    tensors = [*learner.net.state_dict().values(), *(x for x in state if isinstance(x, Tensor))]
    return [tensor.detach().clone() for tensor in tensors]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@poisons
@kinds
@optimisers
def test_a_skipped_update_leaves_no_trace(
    tmp_path: Path, kind: str, optimiser: dict[str, Any], poison: Callable[[Unroll], None]
) -> None:
    """Weights and optimiser stay bit for bit, and the next update is the one that a learner makes
    which never saw the bad batch; only its frames and its number count."""
    net = a_net()
    *good, bad, last = some_batches(5)
    poison(bad[0].unroll)
    learner = make(kind, tmp_path, copy.deepcopy(net), **optimiser)
    other = make(kind, tmp_path, copy.deepcopy(net), **optimiser)
    for parts in good:
        learner.update(parts)
        other.update(parts)
    learner.take_statistics()
    other.take_statistics()
    before = everything(learner)
    assert same(before, everything(other)) and len(before) > 8
    frames = learner.frames
    learner.update(bad)
    assert same(everything(learner), before)
    assert (learner.frames - frames, learner.updates) == (30, 4)
    other.frames, other.updates = learner.frames, learner.updates
    learner.update(last)
    other.update(last)
    assert same(everything(learner), everything(other)) and not same(everything(other), before)
    one, two = learner.take_statistics(), other.take_statistics()
    assert (one.skipped_updates, two.skipped_updates) == (1, 0)
    assert (one.num_updates, two.num_updates) == (1, 1)
    for name in ("total_loss", "grad_norm", "entropy", "rho_mean", "learning_rate"):
        assert getattr(one, name) == getattr(two, name), name
    assert math.isfinite(one.total_loss)
    learner.state()


def test_what_is_steep_has_a_finite_loss(tmp_path: Path) -> None:
    """The overflowing gradient above is skipped for its own sake, not for its loss."""
    (bad,) = some_batches(1)
    steep(bad[0].unroll)
    learner = make("cpu", tmp_path, a_net())
    learner.update(bad)
    kept = load_skipped(tmp_path / FILE)
    assert math.isfinite(kept.total_loss) and kept.grad_norm > 1e19


@pytest.mark.parametrize(
    ("loss", "norm", "skipped"),
    [
        (1.0, 40.0, False),
        (-3e37, 1e18, False),
        (math.nan, 1.0, True),
        (-math.inf, 1.0, True),
        (math.inf, 1.0, True),
        (1.0, math.nan, True),
        (1.0, math.inf, True),
        (-math.inf, math.inf, True),
        (1.0, 2e19, True),
    ],
)
def test_what_is_skipped(loss: float, norm: float, skipped: bool) -> None:
    """A loss or a norm that is no number, and a norm whose square is none."""
    assert bool(is_skipped(torch.tensor(loss), torch.tensor(norm))) is skipped


@kinds
def test_a_skipped_update_publishes_no_other_weights(tmp_path: Path, kind: str) -> None:
    """The policy goes on acting with the weights of before."""
    net = a_net()
    policy = Policy(net, PLAIN.actions, CPU, torch.float32, seed=1)
    learner = make(kind, tmp_path, net, policy=policy)
    good, bad = some_batches(2)
    nan_reward(bad[0].unroll)
    learner.update(good)
    before = policy.snapshot()
    learner.update(bad)
    assert all(map(torch.equal, policy.snapshot().parameters, before.parameters))


class Normalising(nn.Module):
    """Keeps a running mean of what it sees, as a normalising layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = a_net()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, observation: Tensor, *rest: Any) -> Any:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * observation.mean((0, 1)))  # type: ignore[operator]
        return self.inner(observation, *rest)


@kinds
def test_buffers_are_put_back(tmp_path: Path, kind: str) -> None:
    """What a net keeps besides its weights is not spoilt by a batch that is skipped either."""
    learner = make(kind, tmp_path, Normalising())
    good, bad = some_batches(2)
    nan_observation(bad[0].unroll)
    learner.update(good)
    before = learner.net.mean.clone()  # type: ignore[operator]
    assert before.abs().max() > 0
    learner.update(bad)
    assert torch.equal(learner.net.mean, before)  # type: ignore[arg-type]


@kinds
def test_too_many_in_a_row_end_the_run(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two in a row are let pass, good ones in between start anew, a third ends it; the first is
    kept, and then the one that ended it, in the same file."""
    caplog.set_level(logging.WARNING)
    learner = make(kind, tmp_path, a_net(), max_skipped_updates=2)
    good, bad = some_batches(2)
    nan_reward(bad[0].unroll)
    for parts in (bad, good, bad, bad, good):
        learner.update(parts)
    path = tmp_path / FILE
    assert load_skipped(path).update == 1
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in told] == ["update 1 was skipped", "update 3 was skipped"]
    assert "reward is nan at row 3 of column 2 (catch, actor-0)" in told[0]
    assert f"asyncagent replay-batch {path}" in told[0]
    before = everything(learner)
    with pytest.raises(NotFinite) as caught:
        for _ in range(4):
            learner.update(bad)
    assert learner.updates == 8 + (kind == "device"), "there it is known one update later"
    line = str(caught.value)
    assert line.startswith("3 updates in a row were skipped, up to number 8 ")
    assert "reward is nan at row 3 of column 2 (catch, actor-0)" in line
    assert line.endswith(f"asyncagent replay-batch {path}") and "\n" not in line
    assert load_skipped(path).update == 8
    assert [one.name for one in tmp_path.iterdir()] == [FILE]
    assert same(everything(learner), before)
    learner.state()


def test_none_may_be_allowed(tmp_path: Path) -> None:
    """With max_skipped_updates=0 the first ends the run."""
    (bad,) = some_batches(1)
    nan_reward(bad[0].unroll)
    with pytest.raises(NotFinite, match=r"^1 updates in a row"):
        make("cpu", tmp_path, a_net(), max_skipped_updates=0).update(bad)


@kinds
def test_spoilt_weights_end_the_run_at_once(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No later batch can be better then; they are kept to look at, and never handed out."""
    learner = make(kind, tmp_path, a_net())
    first, second, bad = some_batches(3)
    nan_reward(bad[0].unroll)
    learner.update(bad)
    learner.update(first)
    with torch.no_grad():
        learner.net.baseline.weight[0, 5] = torch.nan  # type: ignore[union-attr,operator]
    before = [tensor.nan_to_num(7.0) for tensor in everything(learner)]
    with pytest.raises(NotFinite, match=r"update 3 .*of the weights, baseline\.weight is not"):
        learner.update(second)
        learner.update(second)
    assert same([tensor.nan_to_num(7.0) for tensor in everything(learner)], before)
    with pytest.raises(NotFinite, match=r"^of the weights, baseline\.weight is not finite"):
        learner.state()
    cause = explained(tmp_path, capsys)["passes"][0]["cause"]
    assert (cause["term"], cause["layer"]) == ("weights", "baseline.weight")
    assert cause["culprit"] == "1 of 128 numbers of baseline.weight are not finite"


def test_a_spoilt_optimiser_is_not_handed_out(tmp_path: Path) -> None:
    """A checkpoint with an accumulator that is no number would spoil the weights later."""
    learner = make("cpu", tmp_path, a_net(), optimizer="rmsprop")
    learner.update(*some_batches(1))
    next(iter(learner._optimizer.state.values()))["mean_square"][:] = torch.inf
    with pytest.raises(NotFinite, match=r"^of the optimiser's state, mean_square of parameter 0"):
        learner.state()


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that cannot be kept is said to be so, and learning goes on."""

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    good, bad = some_batches(2)
    nan_reward(bad[0].unroll)
    learner = make("cpu", tmp_path, a_net())
    learner.update(bad)
    learner.update(good)
    assert "could not be kept" in caplog.text and "file write failed" in caplog.text
    assert list(tmp_path.iterdir()) == []


# The kept batch.


def kept(logdir: Path, poison: Callable[[Unroll], None], **flags: Any) -> SkippedBatch:
    """What a learner keeps of a batch that is poisoned so."""
    spec = flags.get("spec", PLAIN)
    use_lstm = flags.get("use_lstm", False)
    (bad,) = some_batches(1, spec, use_lstm)
    poison(bad[0].unroll)
    make("cpu", logdir, a_net(spec, use_lstm), **flags).update(bad)
    return load_skipped(logdir / FILE)


def explained(logdir: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What replay-batch --json says."""
    capsys.readouterr()
    assert main(["replay-batch", str(logdir / FILE), "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@poisons
def test_replay_names_the_culprit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Callable[[Unroll], None]
) -> None:
    """Of each planted number, replay-batch says term, row, column, whose it is and what it was."""
    kept(tmp_path, poison)
    found = explained(tmp_path, capsys)
    (one,) = found["passes"]
    term, row, culprit = CULPRITS[poison]
    cause = one["cause"]
    assert (one["precision"], cause["term"], cause["row"]) == ("float32", term, row)
    assert culprit in cause["culprit"]
    assert cause["origin"] == "catch, actor-0" and cause["column"] == int(culprit.split()[-3])
    assert main(["replay-batch", str(tmp_path / FILE)]) == 0
    text = capsys.readouterr().out
    assert f"goes wrong first: {term}" in text and culprit in text


def test_replay_of_a_recurrent_net_over_nests(tmp_path: Path) -> None:
    """The net is built anew from what was kept, sentences and core state included; the culprit is
    where it began, although every later row goes wrong with it."""
    skipped = kept(tmp_path, nan_observation, spec=SPEC, use_lstm=True)
    assert skipped.num_tokens == (5, 0)
    found = compute(skipped, build_net(skipped), "float32")
    assert found.cause is not None and found.columns == (0,)
    assert found.cause.culprit.startswith("observation['seen'] is nan at row 4 of column 0")

    def spoilt_state(unroll: Unroll) -> None:
        unroll.core_state[0][1, 7] = np.nan

    skipped = kept(tmp_path, spoilt_state, spec=SPEC, use_lstm=True)
    found = compute(skipped, build_net(skipped), "float32")
    assert found.cause is not None and found.cause.row == 0
    assert found.cause.culprit == "core_state[0] is nan at column 1 (catch, actor-0)"


def test_replay_computes_what_the_learner_did(tmp_path: Path) -> None:
    """Where nothing is wrong, its loss and norm are the learner's, in either precision."""
    skipped = kept(tmp_path, nan_reward)
    skipped.batch.reward[3, 2] = 0.5
    whole = Columns(skipped.batch, 0, 5)
    learner = make("cpu", tmp_path, build_net(skipped), max_grad_norm=0.0)
    learner.update([whole])
    expected = learner.take_statistics()
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        found = compute(skipped, build_net(skipped), precision)
        assert found.cause is None and found.columns == ()
        assert found.total_loss == pytest.approx(expected.total_loss, rel=tolerance)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance)


def test_what_does_not_matter_is_not_blamed(tmp_path: Path) -> None:
    """A row that is not valid may hold anything; the reports show it, the cause is another."""

    def poison(unroll: Unroll) -> None:
        unroll.valid[0, 0] = False
        unroll.behaviour_logits[0, 0] = np.nan
        nan_reward(unroll)

    skipped = kept(tmp_path, poison)
    found = compute(skipped, build_net(skipped), "float32")
    assert found.cause is not None and found.cause.culprit.startswith("reward is nan")
    logits = {report.field: report for report in report_fields(skipped.batch)}["behaviour_logits"]
    assert (logits.num_not_finite, logits.num_extreme) == (3, 0)
    assert logits.first is not None and (logits.first.row, logits.first.column) == (0, 0)


def test_continuous_actions_are_replayed(tmp_path: Path) -> None:
    """An action that is no number is told apart from the logits it was drawn from."""
    spec = EnvSpec(ArraySpec((3,), "float32"), Box(2), 1)

    def poison(unroll: Unroll) -> None:
        unroll.action[1, 2, 0] = np.nan

    skipped = kept(tmp_path, poison, spec=spec)
    found = compute(skipped, build_net(skipped), "float32")
    assert found.cause is not None and found.cause.term == "importance weights"
    assert found.cause.culprit == "action is nan at row 1 of column 2 (catch, actor-0)"


def test_a_file_imports_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A net of the user's own is built only where the user names it, too."""
    skipped = kept(tmp_path, nan_reward)
    own = "tests.my_envs:not_a_net"
    other = skipped._replace(config=dataclasses.replace(skipped.config, net=own))
    save_skipped(tmp_path / FILE, other)
    found = explained(tmp_path, capsys)
    assert found["passes"] == [] and f"--net={own}" in found["note"]
    assert main(["replay-batch", str(tmp_path / FILE), f"--net={own}"]) == 2
    assert own in capsys.readouterr().err


def damaged(whole: bytes, how: str) -> bytes:
    rng = np.random.default_rng(len(how))
    if how == "noise":
        return rng.bytes(5000)
    if how == "empty":
        return b""
    if how == "cut":
        return whole[: len(whole) // 2]
    place = int(rng.integers(len(whole) // 4, len(whole) // 2))
    return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]


@pytest.mark.parametrize("how", ["noise", "empty", "cut", "flipped", "missing", "folder", "other"])
def test_a_bad_file_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """Damaged, missing or foreign: one line that names the file, and status 2."""
    path = tmp_path / FILE
    if how == "folder":
        path.mkdir()
    elif how == "other":
        torch.save({"format": 1, "net": {}}, path)
    elif how != "missing":
        kept(tmp_path, nan_reward)
        path.write_bytes(damaged(path.read_bytes(), how))
    capsys.readouterr()
    assert main(["replay-batch", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"asyncagent replay-batch: {path}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", {}),
        ("batch", None),
        ("origins", ("one",)),
        ("actions", ["Discrete", 7]),
        ("actions", ["system", "ls"]),
        ("precision", "float8"),
        ("num_tokens", ()),
        ("net", {"w": 3}),
        ("net", {"w": torch.ones(3)}),
        ("config", "{}}"),
        ("config", '{"net": "unheard"}'),
        ("update", "1"),
    ],
)
def test_strange_contents_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any
) -> None:
    """A whole file whose parts do not fit each other is refused, too."""
    kept(tmp_path, nan_reward)
    path = tmp_path / FILE
    state = torch.load(path, weights_only=True)
    torch.save(state | {field: value}, path)
    capsys.readouterr()
    assert main(["replay-batch", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_kept_batch_comes_back_whole(tmp_path: Path) -> None:
    """Every array, number and weight is read as it was written."""
    skipped = kept(tmp_path, nan_reward, spec=SPEC, use_lstm=True)
    assert math.isnan(skipped.total_loss) and math.isnan(skipped.grad_norm)
    skipped = skipped._replace(total_loss=1.5, grad_norm=math.inf)
    save_skipped(tmp_path / "again.pt", skipped)
    again = load_skipped(tmp_path / "again.pt")
    same_arrays: Nest = map_nest(
        lambda one, other: bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f")),
        skipped.batch,
        again.batch,
    )
    assert all(optree.tree_leaves(same_arrays))
    assert again._replace(batch=None, net={}) == skipped._replace(batch=None, net={})  # type: ignore[arg-type]
    assert all(torch.equal(again.net[name], skipped.net[name]) for name in skipped.net)
    assert again.origins == (ORIGINS[0],) * 3 + (ORIGINS[1],) * 2
    assert (again.update, again.weights_update, again.frames) == (1, 0, 30)
    with pytest.raises(UsageError):
        load_skipped(tmp_path / "none.pt")


def test_origins_stay_with_their_columns() -> None:
    """Through the queue, and where a batch is cut into pieces."""

    async def through_the_queue() -> list[Columns]:
        queue = UnrollQueue(5, 5)
        for part in some_batches(1)[0]:
            await queue.put(part.unroll, lambda unroll: None, part.origin)
        return await queue.get()

    taken = asyncio.run(through_the_queue())
    assert [part.origin for part in taken] == list(ORIGINS)
    pieces = split_columns(taken, [2, 2, 1])
    assert [[part.origin for part in piece] for piece in pieces] == [
        [ORIGINS[0]], [*ORIGINS], [ORIGINS[1]],
    ]  # fmt: skip
