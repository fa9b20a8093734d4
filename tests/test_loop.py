"""Whole runs: they learn, stop, resume and, when a part dies, end loudly."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asyncagent.loop as loop_module
from asyncagent import building
from asyncagent.__main__ import main
from asyncagent.accounting import Accounts
from asyncagent.checkpoint import checkpoint_paths, load_checkpoint, locked
from asyncagent.config import Config, resolve
from asyncagent.errors import CheckpointError, GraceOver, NotFinite, Stalled, UsageError
from asyncagent.learner import Learner
from asyncagent.loop import train
from asyncagent.policy import Policy
from asyncagent.remote import RemoteBridge
from asyncagent.structs import EnvSpec, EnvStep, IntArray
from asyncagent.terminal import Terminal
from asyncagent.threads import NamedThread
from tests.fakes import CounterGroup

WATCHDOG_S = 60


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """A run that stalls ends the tests with every thread's stack instead of hanging them."""
    import faulthandler

    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Group(CounterGroup):
    """Two counters whose n-th step may do something unexpected."""

    def __init__(self, level_name: str = "counter", lost: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__([[5], [7]], lost=lost, level_name=level_name)
        self.steps = 0
        self.stuck = False
        self.thread = NamedThread("engine")

    async def step(self, action: IntArray) -> EnvStep:
        self.steps += 1
        self.on_step(self.steps)
        return await super().step(action)

    def on_step(self, number: int) -> None:
        pass


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Runs use CounterGroups; the list holds those that were made."""
    made: list[Group] = []

    def make(config: Config, *, level_name: str, **_: Any) -> Group:
        made.append(Group(level_name))
        return made[-1]

    def spec(config: Config) -> EnvSpec:
        return Group().spec

    monkeypatch.setattr(building, "make_group", make)
    monkeypatch.setattr(building, "usable_spec", spec)
    return made


def config(logdir: Path, **flags: Any) -> Config:
    values: dict[str, Any] = {
        "logdir": str(logdir),
        "num_actors": 4,
        "num_groups": 2,
        "batch_size": 4,
        "unroll_length": 5,
        "total_environment_frames": 2000,
        "report_interval_s": 0.05,
    }
    return resolve("catch", **(values | flags))


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in leaves(child)]
    return [error]


def test_frames_are_counted_when_a_report_is_made(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a report has to wait for comes before: rates are frames at a time / that time."""
    order: list[str] = []
    for kind, name in ((Accounts, "read_cpu"), (Learner, "take_statistics")):
        monkeypatch.setattr(kind, name, noting(order, name, getattr(kind, name)))
    train(config(tmp_path))
    reports = order[order.index("take_statistics") - 1 :]
    assert len(reports) >= 4
    assert reports == ["read_cpu", "take_statistics"] * (len(reports) // 2)


def noting(order: list[str], name: str, method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def noted(owner: Any) -> Any:
        order.append(name)
        return method(owner)

    return noted


def test_a_run_ends_by_itself_and_leaves_its_files(tmp_path: Path, groups: list[Group]) -> None:
    """A run learns from all frames asked for, checkpoints, reports, and closes its engines."""
    result = train(config(tmp_path))
    assert result.frames >= 2000
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["frames"] == result.frames
    assert found[1]["updates"] == result.updates
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["frames"] == result.frames
    for key in ("time_s", "frames_per_s", "updates", "policy_lag_mean", "episode_return_mean"):
        assert key in lines[-1]
    assert json.loads((tmp_path / "config.json").read_text())["unroll_length"] == 5
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert all(group.closed for group in groups)


def test_tensorboard_has_the_ancestors_tags(tmp_path: Path, groups: list[Group]) -> None:
    """The ancestor's tags and ours are in the event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    assert {"catch/episode_return", "catch/episode_frames", "catch/queue_columns"} <= scalars
    assert {"learning_rate", "total_loss"} <= scalars
    assert {"speed/frames_per_s", "speed/updates_per_s", "learning/policy_lag_mean"} <= scalars
    assert "action" in tags["histograms"]


def test_exception_in_an_actor_ends_the_run(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that raises ends the run with a traceback that names the actor."""

    def on_step(self: Group, number: int) -> None:
        if number == 20 and self is groups[1]:
            raise ValueError("broken engine")

    monkeypatch.setattr(Group, "on_step", on_step)
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config(tmp_path, total_environment_frames=10**9))
    (error,) = leaves(caught.value)
    assert str(error) == "broken engine"
    assert error.__notes__ == ["in task 'actor-1'"]


def test_exception_in_the_inference_ends_the_run(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass that raises ends the run with a traceback that names the inference."""
    infer = Policy.infer
    calls = 0

    def broken(self: Policy, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise ValueError("broken net")
        return infer(self, *args)

    monkeypatch.setattr(Policy, "infer", broken)
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config(tmp_path, total_environment_frames=10**9))
    for error in leaves(caught.value):
        assert str(error) == "broken net"
        assert error.__notes__ == ["in task 'inference'"]


def test_exception_in_the_learner_ends_the_run(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that raises ends the run with a traceback that names the learner."""
    update = Learner.update

    def broken(self: Learner, parts: Any) -> None:
        if self.updates == 3:
            raise ValueError("broken update")
        update(self, parts)

    monkeypatch.setattr(Learner, "update", broken)
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config(tmp_path, total_environment_frames=10**9))
    (error,) = leaves(caught.value)
    assert str(error) == "broken update"
    assert error.__notes__ == ["in task 'learner'"]
    assert all(group.closed for group in groups)


def stuck_group(monkeypatch: pytest.MonkeyPatch, groups: list[Group]) -> threading.Event:
    """Group 1's engine never answers its third step, nor its close, until the event is set."""
    stuck = threading.Event()

    async def step(self: Group, action: IntArray) -> EnvStep:
        self.steps += 1
        if self is groups[1] and self.steps == 3:
            self.stuck = True
            await self.thread.run(stuck.wait)
        return await CounterGroup.step(self, action)

    async def close(self: Group) -> None:
        if self.stuck:
            await self.thread.run(stuck.wait)
        self.closed = True

    monkeypatch.setattr(Group, "step", step)
    monkeypatch.setattr(Group, "close", close)
    return stuck


def test_engine_that_never_answers_does_not_outlive_a_failure(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner's death ends the run although an engine is stuck for good, in its close, too."""
    stuck = stuck_group(monkeypatch, groups)
    update = Learner.update

    def broken(self: Learner, parts: Any) -> None:
        if groups[1].stuck:
            raise ValueError("broken update")
        update(self, parts)

    monkeypatch.setattr(Learner, "update", broken)
    monkeypatch.setattr(loop_module, "ABANDON_S", 0.1)
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config(tmp_path, batch_size=2, total_environment_frames=10**9))
    assert [str(error) for error in leaves(caught.value)] == ["broken update"]
    assert groups[1].stuck
    assert not groups[1].closed
    stuck.set()


def test_stall_is_named_and_ends_the_run(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that stops answering, while the others go on, ends the run by its actor's name."""
    stuck = stuck_group(monkeypatch, groups)
    monkeypatch.setattr(loop_module, "ABANDON_S", 0.1)
    flags = {"batch_size": 2, "total_environment_frames": 10**9, "stall_timeout_s": 0.5}
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config(tmp_path, **flags))
    (error,) = leaves(caught.value)
    assert isinstance(error, Stalled)
    assert "actor-1 has not moved" in str(error)
    stuck.set()


def listening(tmp_path: Path, **flags: Any) -> Config:
    """Of a run in which only hosts act, of whom none comes."""
    hosts = {"num_actors": 0, "num_groups": 0, "listen": f"ipc://{tmp_path}/hosts"}
    return config(tmp_path / "run", total_environment_frames=10**9, **hosts, **flags)


def test_nobody_stalls_where_no_host_is_present(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without actors of its own, and with no host, a run waits for as long as it takes."""
    shown = 0

    def show(self: Any, report: Any) -> None:
        nonlocal shown
        shown += 1
        if shown == 30:  # the stall's time has passed more than once
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Terminal, "show", show)
    assert train(listening(tmp_path, stall_timeout_s=0.4)).frames == 0


def test_hosts_that_are_present_and_send_nothing_are_a_stall(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is heard of, but whose unrolls have ended, is not waited for in silence."""
    monkeypatch.setattr(RemoteBridge, "progress", lambda self: {"box": 7})
    with pytest.raises(BaseExceptionGroup) as caught:
        train(listening(tmp_path, stall_timeout_s=0.4))
    (error,) = leaves(caught.value)
    assert isinstance(error, Stalled) and "actor hosts has not moved" in str(error)
    assert "actor hosts: unrolls {'box': 7}, " in (tmp_path / "run" / "stall.txt").read_text()


def test_an_inference_that_hangs_is_named(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass that never ends is the stall, not the actors that wait for it."""
    infer, stuck, calls = Policy.infer, threading.Event(), 0

    def hang(self: Policy, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 20:
            stuck.wait(WATCHDOG_S)
        return infer(self, *args)

    monkeypatch.setattr(Policy, "infer", hang)
    with pytest.raises(BaseExceptionGroup) as caught:
        train(config(tmp_path, total_environment_frames=10**9, stall_timeout_s=0.5))
    stuck.set()
    (error,) = leaves(caught.value)
    assert isinstance(error, Stalled) and str(error).startswith("inference has not moved")
    text = (tmp_path / "stall.txt").read_text()
    assert "inference: batch 19, " in text and "stuck.wait(WATCHDOG_S)" in text
    assert "  actor-0\n" in text and "  reporter\n" in text


def test_an_engine_that_cannot_be_made_is_a_stall(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that hangs before it has begun says so."""
    stuck = threading.Event()
    monkeypatch.setattr(building, "make_group", lambda *_, **__: stuck.wait(WATCHDOG_S))
    with pytest.raises(Stalled, match="build-envs has not moved"):
        train(config(tmp_path, stall_timeout_s=0.5))
    stuck.set()


def test_the_end_has_its_time(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that does not close ends with the grace, which is said, and all is saved."""
    stuck = stuck_group(monkeypatch, groups)
    monkeypatch.setattr(loop_module, "ABANDON_S", 0.1)
    with pytest.raises(GraceOver, match=r"--grace_s=0.5 is over .*: the end is saved"):
        train(config(tmp_path, batch_size=2, grace_s=0.5))
    stuck.set()
    found = load_checkpoint(tmp_path)
    assert found is not None and found[1]["frames"] >= 2000


class Unwell(Group):
    """Its rewards are none from the hundredth step on."""

    async def step(self, action: IntArray) -> EnvStep:
        row = await super().step(action)
        return row._replace(reward=np.where(self.steps < 100, row.reward, np.float32(np.nan)))


def test_updates_that_are_none_end_the_run(
    tmp_path: Path,
    groups: list[Group],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its last line names the batch that was kept, the weights of before are checkpointed, and the
    command that the line gives explains what was wrong, and whose reward it was."""
    monkeypatch.setattr(building, "make_group", lambda config, level_name, **_: Unwell())
    flags = {"total_environment_frames": 10**9, "max_skipped_updates": 3}
    with pytest.raises(NotFinite) as caught:
        train(config(tmp_path, **flags))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["updates"] > 10
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found[1]["net"].values())
    line, _, command = str(caught.value).partition("; to find out why: asyncagent ")
    assert line.startswith("4 updates in a row were skipped") and "reward is nan at row" in line
    assert main([*command.split(), "--json"]) == 0
    cause = json.loads(capsys.readouterr().out.splitlines()[-1])["passes"][0]["cause"]
    assert cause["culprit"].startswith("reward is nan at row")
    assert cause["origin"] in ("catch, actor-0", "catch, actor-1")


def test_a_single_skip_is_reported(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad batch: the run goes on to its end, and its reports count it."""
    update = Learner.update

    def poisoned(self: Learner, parts: Any) -> None:
        if self.updates == 3:
            parts[0].unroll.reward[1] = np.nan
        update(self, parts)

    monkeypatch.setattr(Learner, "update", poisoned)
    result = train(config(tmp_path))
    assert result.frames >= 2000 and result.last_report is not None
    assert result.last_report.skipped_updates == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped_updates"] == 1 and lines[-1]["total_loss"] is not None


def test_spoilt_weights_end_the_run_and_spare_the_checkpoints(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not finite are an error of the run, and are never checkpointed."""
    good = train(config(tmp_path, total_environment_frames=2000))
    update = Learner.update

    def poisoned(self: Learner, parts: Any) -> None:
        with torch.no_grad():
            next(iter(self.net.parameters())).fill_(torch.nan)
        update(self, parts)

    monkeypatch.setattr(Learner, "update", poisoned)
    with pytest.raises(NotFinite, match=r"of the weights, .* is not finite"):
        train(config(tmp_path, total_environment_frames=10**9))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["frames"] == good.frames


def test_two_runs_do_not_share_a_folder(tmp_path: Path, groups: list[Group]) -> None:
    """A folder that a live run writes to is refused; afterwards it is free again."""
    with locked(tmp_path), pytest.raises(UsageError, match="another run is writing"):
        train(config(tmp_path))
    train(config(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """SIGINT or SIGTERM drains, writes a checkpoint, and returns as an ordinary end."""

    def on_step(self: Group, step: int) -> None:
        if step == 50 and self is groups[0]:
            for _ in range(2):  # as timeout(1) does, to the process and to its group
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Group, "on_step", on_step)

    def mine(number: int, frame: object) -> None:
        pass

    kept = signal.signal(signal.SIGINT, mine), signal.signal(signal.SIGTERM, mine)
    result = train(config(tmp_path, total_environment_frames=10**9))
    now = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, kept[0])
    signal.signal(signal.SIGTERM, kept[1])
    assert now == (mine, mine), "the embedding program's handlers are put back"
    assert 0 < result.frames < 10**9
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["frames"] == result.frames


def test_resume_continues_frames_and_learning_rate(tmp_path: Path, groups: list[Group]) -> None:
    """A run started again goes on from its checkpoint, schedule included."""
    first = train(config(tmp_path, total_environment_frames=3000))
    with (tmp_path / "metrics.jsonl").open("a") as file:  # of work that was lost
        file.write(json.dumps({"frames": first.frames, "time_s": first.time_s + 1000}) + "\n")
    second = train(config(tmp_path, total_environment_frames=6000))
    assert first.frames < 6000 <= second.frames
    assert second.updates > first.updates
    assert second.time_s > first.time_s
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    frames = [json.loads(line)["frames"] for line in lines]
    assert frames == sorted(frames) and first.frames in frames, "no session's last report is lost"
    times_s = [json.loads(line)["time_s"] for line in lines]
    assert times_s == sorted(times_s)
    again = train(config(tmp_path, total_environment_frames=6000))
    assert again.frames == second.frames, "a finished run has nothing left to do"


def test_resumed_learning_rate_is_where_it_was(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped half-way and resumed, the first update takes the rate of that frame count."""

    def on_step(self: Group, step: int) -> None:
        if step == 100 and self is groups[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Group, "on_step", on_step)
    seen: list[tuple[int, float]] = []
    update = Learner.update

    def spy(self: Learner, parts: Any) -> None:
        seen.append((self.frames, self.learning_rate))
        update(self, parts)

    monkeypatch.setattr(Learner, "update", spy)
    stopped = train(config(tmp_path, total_environment_frames=4000, learning_rate=0.01))
    assert 0 < stopped.frames < 4000
    updates_before = len(seen)
    train(config(tmp_path, total_environment_frames=4000, learning_rate=0.01))
    frames, rate = seen[updates_before]
    assert frames == stopped.frames
    assert rate == pytest.approx(0.01 * (1 - stopped.frames / 4000))
    rates = [rate for _, rate in seen]
    assert rates == sorted(rates, reverse=True)


def test_another_schedule_on_resuming_is_said(
    tmp_path: Path, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    """A longer run re-plans the learning rate, which would else stay 0, and says so."""
    train(config(tmp_path, total_environment_frames=2000))
    train(config(tmp_path, total_environment_frames=4000))
    assert "the learning rate goes on at" in caplog.text


def test_checkpoint_of_another_net_is_refused(tmp_path: Path, groups: list[Group]) -> None:
    """A run with another net in the same folder says what differs, and changes nothing."""
    train(config(tmp_path))
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    with pytest.raises(CheckpointError, match="use_lstm=False, not True"):
        train(config(tmp_path, use_lstm=True))
    after = [(path.name, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    assert before == after


def test_checkpoints_are_written_on_a_timer(tmp_path: Path, groups: list[Group]) -> None:
    """A short interval leaves several checkpoints behind."""
    train(config(tmp_path, total_environment_frames=20_000, checkpoint_interval_s=0.05))
    assert len(checkpoint_paths(tmp_path)) > 1


def test_levels_are_dealt_out_round_robin_and_reported(tmp_path: Path, groups: list[Group]) -> None:
    """Group i plays level i of the list, again and again; reports say what each level gave."""
    flags = {"num_actors": 8, "num_groups": 4, "batch_size": 2}
    result = train(dataclasses.replace(config(tmp_path, **flags), level_name="a:x,b:y,c:z"))
    assert [group.level_name for group in groups] == ["a:x", "b:y", "c:z", "a:x"]
    assert result.last_report is not None
    levels = result.last_report.levels
    assert set(levels) == {"a:x", "b:y", "c:z"}
    assert all(level.episodes > 0 and level.queue_columns > 0 for level in levels.values())
    # What the learner took, and no more than the queue holds and the last batches beside it.
    columns = sum(level.queue_columns for level in levels.values())
    assert columns % 2 == 0 and columns >= 2 * result.updates
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["levels"]["b:y"]["queue_columns"] == levels["b:y"].queue_columns


def test_what_an_engine_finds_wrong_with_the_request_is_one_error(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A UsageError out of a group's reset is what the user asked for, not a defect: it comes out
    by itself, not in a group of exceptions."""

    async def reset(self: Group) -> EnvStep:
        raise UsageError("there is no map of this name")

    monkeypatch.setattr(Group, "reset", reset)
    with pytest.raises(UsageError, match="no map of this name"):
        train(config(tmp_path))


def test_benchmark_mode_acts_at_random_and_says_so(
    tmp_path: Path, groups: list[Group], caplog: pytest.LogCaptureFixture
) -> None:
    """The log and the checkpoint are marked, and the run is not resumed as a learning one."""
    result = train(config(tmp_path, benchmark_mode=True, entropy_cost=0.0))
    assert "benchmark_mode: actions are random" in caplog.text
    found = load_checkpoint(tmp_path)
    assert found is not None and json.loads(found[1]["config"])["benchmark_mode"] is True
    # Off-policy by as much as the net has moved from chance.
    assert result.last_report is not None and result.last_report.rho_mean != 1.0
    with pytest.raises(CheckpointError, match="benchmark_mode=True, not False"):
        train(config(tmp_path, total_environment_frames=4000))


def test_lost_environments_are_reported_and_their_frames_not_counted(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on without an environment until it is replaced."""

    def make(config: Config, **_: Any) -> Group:
        groups.append(Group(lost=[(0, row) for row in range(10, 20)]))
        return groups[-1]

    monkeypatch.setattr(building, "make_group", make)
    result = train(config(tmp_path, batch_size=2, num_actors=2, num_groups=1))
    assert result.last_report is not None and result.last_report.env_losses == 1
    assert result.frames >= 2000


def test_dmlab30_scores_are_reported_once_every_level_has_an_episode(
    tmp_path: Path, groups: list[Group]
) -> None:
    """The two training scores appear under the ancestor's tags."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"num_actors": 60, "num_groups": 30, "batch_size": 6}
    flags["total_environment_frames"] = 10_000
    result = train(dataclasses.replace(config(tmp_path, **flags), level_name="dmlab30"))
    assert result.last_report is not None
    assert result.last_report.dmlab30_cap_100 <= 100 < result.last_report.dmlab30_no_cap
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {"dmlab30/training_no_cap", "dmlab30/training_cap_100"}
    assert tags <= set(events.Tags()["scalars"])


def test_slow_environments_that_get_on_are_no_stall(
    tmp_path: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group whose reset takes longer than the limit, but shows progress, is waited for, and so
    is the learner that has nothing to learn from meanwhile."""
    resets = Group.reset
    progress: dict[Group, int] = {}

    async def reset(self: Group) -> EnvStep:
        for _ in range(20):
            progress[self] = progress.get(self, 0) + 1
            await asyncio.sleep(0.05)
        return await resets(self)

    monkeypatch.setattr(Group, "reset", reset)
    monkeypatch.setattr(Group, "progress", lambda self: progress.get(self))
    assert train(config(tmp_path, stall_timeout_s=0.4)).frames >= 2000
