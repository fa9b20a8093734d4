"""WorkerGroup: rows, episodes, and what becomes of environments and workers that fail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from asyncagent.envs import subproc
from asyncagent.envs.base import EnvRecipe
from asyncagent.envs.process import MAX_OUTPUT
from asyncagent.envs.shared import next_seed
from asyncagent.envs.subproc import GOOD_STEPS, Failures, WorkerGroup, pause_s, probe_spec
from asyncagent.errors import ActorLost, UsageError
from asyncagent.structs import ActionArray, ArraySpec, Discrete, EnvSpec, EnvStep, Episode, Loss
from tests.faulty_envs import COUNTER_SPEC, MIRROR_ACTIONS, Mirror

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 120
STAY = np.zeros(2, np.int64)


class SkippingLoop(asyncio.SelectorEventLoop):
    """Its clock can be put forward."""

    skipped_s = 0.0
    watchdog: asyncio.Timeout

    def time(self) -> float:
        return super().time() + self.skipped_s

    async def skip(self, seconds: float) -> None:
        """Let so much time pass at once, and what was due happen."""
        self.skipped_s += seconds
        due_s = self.watchdog.when()
        assert due_s is not None
        self.watchdog.reschedule(due_s + seconds)
        for _ in range(3):
            await asyncio.sleep(0)


def make(
    maker: str = "counter",
    seeds: Sequence[int] = (1, 2),
    *,
    spec: EnvSpec = COUNTER_SPEC,
    max_failures: int = 3,
    close_timeout_s: float = 60.0,
    core: int | None = None,
    **options: Any,
) -> WorkerGroup:
    """A group of environments out of ``faulty_envs``."""
    return WorkerGroup(
        EnvRecipe(f"tests.faulty_envs:{maker}", options),
        spec,
        level_name="level",
        seeds=seeds,
        name="env-7",
        timeout_s=60.0,
        max_failures=max_failures,
        pause_s=lambda failures: 0.0,
        close_timeout_s=close_timeout_s,
        core=core,
    )


def run(
    body: Callable[..., Awaitable[None]],
    *groups: WorkerGroup,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = SkippingLoop,
) -> None:
    """Run ``body(*groups)``, close the groups, and see that no process and no file is left."""

    async def main() -> None:
        async with asyncio.timeout(WATCHDOG_S) as watchdog:
            loop = asyncio.get_running_loop()
            if isinstance(loop, SkippingLoop):
                loop.watchdog = watchdog
            before = open_files()
            try:
                await body(*groups)
            finally:
                await asyncio.gather(*(group.close() for group in groups))
            assert children() == set()
            assert open_files() == before

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def open_files() -> set[str]:
    """What this process has open, but for the memory that live rows still show."""
    links = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.add(f"{descriptor} {os.readlink(f'/proc/self/fd/{descriptor}')}")
    return {link for link in links if "memfd:" not in link}


def children() -> set[int]:
    """Ids of this process's children."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(word) for task in tasks for word in task.read_text().split()}


async def exists(path: Path) -> None:
    """Wait for a file."""
    while not path.exists():
        await asyncio.sleep(0)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def steps_of(row: EnvStep) -> list[int]:
    return [int(steps) for steps in row.observation[:, 0]]


def seeds_of(row: EnvStep) -> list[int]:
    return [int(seed) for seed in row.observation[:, 1]]


def pid_of(row: EnvStep) -> int:
    return int(row.observation[0, 2])


def test_rows_worked_out_by_hand() -> None:
    """End rows show the last observation, the next row opens the episode and ignores its action."""

    async def body(group: WorkerGroup) -> None:
        rows = [await group.reset()]
        shown = [steps_of(rows[0])]
        for action in ([1, 2], [2, 0], [1, 1], [2, 2], [0, 1]):
            rows.append(await group.step(np.array(action)))
            shown.append(steps_of(rows[-1]))
        assert shown == [[0, 0], [1, 1], [2, 2], [3, 3], [3, 3], [4, 4]]
        rewards = [[0, 0], [1, 2], [2, 0], [1, 1], [0, 0], [0, 1]]
        assert [row.reward.tolist() for row in rows] == rewards
        assert [row.first.tolist()[0] for row in rows] == [True, False, False, False, True, False]
        assert [row.terminated.tolist()[1] for row in rows] == [False] * 3 + [True] + [False] * 2
        assert not any(row.truncated.any() or row.lost.any() or row.losses for row in rows)
        assert [len(row.episodes) for row in rows] == [0, 0, 0, 2, 0, 0]
        assert rows[3].episodes == (Episode("level", 4, 3, 0), Episode("level", 3, 3, 1))
        assert seeds_of(rows[0]) == [1, 2]
        for row in rows:
            assert row.reward.dtype == np.float32
            flags = (row.terminated, row.truncated, row.first, row.lost)
            assert all(flag.dtype == np.bool_ and flag.shape == (2,) for flag in flags)

    run(body, make())


def test_second_game_counts_anew() -> None:
    """A game's return and steps hold nothing of the game before."""

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        rows = [await group.step(np.array([1, 2])) for _ in range(7)]
        episodes = [episode for row in rows for episode in row.episodes]
        assert episodes == 2 * [Episode("level", 3, 3, 0), Episode("level", 6, 3, 1)]

    run(body, make())


def test_time_limit_is_a_truncation() -> None:
    """An episode that its environment truncates is flagged so in its end row and its record."""

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        rows = [await group.step(STAY) for _ in range(3)]
        assert rows[2].truncated.tolist() == [True, True]
        assert not rows[2].terminated.any()
        assert [episode.truncated for episode in rows[2].episodes] == [True, True]

    run(body, make(truncates=True))


def test_score_is_what_the_record_sums() -> None:
    """Where a step names a score, the game's return sums it; the row shows the reward."""

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        rows = [await group.step(np.array([1, 2])) for _ in range(3)]
        assert rows[2].reward.tolist() == [1, 2]
        assert [episode.episode_return for episode in rows[2].episodes] == [7.5, 7.5]

    run(body, make(score=2.5))


def test_end_that_shows_nothing_repeats_the_last_observation() -> None:
    """Where an environment shows nothing at the end, the end row shows what was seen before."""

    async def body(group: WorkerGroup) -> None:
        rows = [await group.reset()]
        shown = [steps_of(rows[0])]
        for _ in range(4):
            rows.append(await group.step(STAY))
            shown.append(steps_of(rows[-1]))
        assert rows[3].terminated.all()
        assert shown == [[0, 0], [1, 1], [2, 2], [2, 2], [3, 3]]

    run(body, make(blind=True))


@pytest.mark.parametrize("space", MIRROR_ACTIONS)
def test_spaces_and_dicts(space: str) -> None:
    """Every action space reaches the environment, and a dict of observations comes back."""
    spec = Mirror(space).spec
    one = spec.actions.array

    async def body(group: WorkerGroup) -> None:
        row = await group.reset()
        assert set(row.observation) == {"action", "steps"}
        assert row.observation["steps"].dtype == np.int64
        for step in range(1, 4):
            action = np.zeros((2, *one.shape), one.dtype)
            action[1] = step / 2 if one.dtype == "float32" else [1, 0, 1][step - 1]
            row = await group.step(action)
            assert row.observation["action"].tolist() == action.tolist()
            assert row.observation["steps"].tolist() == [step, step]
        with pytest.raises(ValueError, match="action must be"):
            await group.step(np.full((2, *one.shape), 99 if one.dtype == "int64" else np.nan))
        row = await group.step(np.zeros((2, *one.shape), one.dtype))
        assert row.observation["steps"].tolist() == [4, 4]

    run(body, make("mirror", spec=spec, space=space))


def test_row_lives_until_the_step_after_next_is_asked_for() -> None:
    """An observation stays as it is while the next step happens, and is readable after the end."""

    async def body(group: WorkerGroup) -> None:
        before = await group.reset()
        for step in range(1, 4):
            row = await group.step(STAY)
            assert steps_of(before) == [step - 1, step - 1]
            assert steps_of(row) == [step, step]
            before = row
        await group.close()
        assert steps_of(before) == [3, 3]

    run(body, make(length=100))


def test_reset_comes_first_and_once() -> None:
    """A step before the reset and a second reset are refused."""

    async def body(group: WorkerGroup) -> None:
        with pytest.raises(RuntimeError, match="before its reset"):
            await group.step(STAY)
        await group.reset()
        with pytest.raises(RuntimeError, match="was reset before"):
            await group.reset()

    run(body, make())


def test_cancelled_step_loses_its_row_only(tmp_path: Path) -> None:
    """A cancelled step happens, its row is dropped, and the next step brings the row after."""
    go_on = tmp_path / "go_on"

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        step = asyncio.create_task(group.step(np.array([1, 1])))
        await exists(tmp_path / "go_on.waits")
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        go_on.touch()
        row = await group.step(np.array([2, 2]))
        assert steps_of(row) == [2, 2]
        assert row.reward.tolist() == [2, 2]

    run(body, make("faulty", faults=[(1, "step", 1, f"wait {go_on}")]))


def test_close_lets_the_environments_close(tmp_path: Path) -> None:
    """close lets every environment go, once, however often it is called; then steps fail."""
    tape = tmp_path / "tape"

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        await asyncio.gather(group.close(), group.close())
        await group.close()
        assert tape.read_text().split("\n")[-3:] == ["close 1", "close 2", ""]
        for _ in range(2):
            with pytest.raises(ActorLost, match="'env-7' is closed"):
                await group.step(STAY)

    run(body, make(tape=str(tape)))


def test_worker_keeps_to_its_core() -> None:
    """All of its threads' turns are on the one core that it was given."""
    last = max(os.sched_getaffinity(0))

    async def body(group: WorkerGroup) -> None:
        row = await group.reset()
        assert os.sched_getaffinity(pid_of(row)) == {last}

    run(body, make(core=last))


def test_close_without_reset() -> None:
    """A group that was never reset has nothing to close."""

    async def body(group: WorkerGroup) -> None:
        await group.close()
        with pytest.raises(ActorLost, match="is closed"):
            await group.reset()

    run(body, make())


@pytest.mark.parametrize("how", ["hang", "hang-with-gil"])
def test_close_during_a_hanging_step(tmp_path: Path, how: str) -> None:
    """close fails the pending step at once, and kills a worker that does not go by itself."""

    async def body(group: WorkerGroup) -> None:
        pid = pid_of(await group.reset())
        step = asyncio.create_task(group.step(STAY))
        await exists(tmp_path / "hangs")
        await group.close()
        with pytest.raises(ActorLost, match="is closed"):
            await step
        assert not is_running(pid)

    fault = (1, "step", 1, f"{how} {tmp_path / 'hangs'}")
    run(body, make("faulty", faults=[fault], close_timeout_s=0.01))


def test_close_during_a_start(tmp_path: Path) -> None:
    """close ends a group whose worker is still making its environments."""

    async def body(group: WorkerGroup) -> None:
        reset = asyncio.create_task(group.reset())
        await exists(tmp_path / "hangs")
        await group.close()
        with pytest.raises(ActorLost, match="is closed"):
            await reset

    fault = (1, "make", 1, f"hang {tmp_path / 'hangs'}")
    run(body, make("faulty", faults=[fault], close_timeout_s=0.01))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise", "OSError: emulator 2 on fire"),
        ("sys.exit", "SystemExit: 7"),
        ("usage", "RuntimeError: no such map"),
        ("nan", "ValueError: reward and score must be finite in float32, not nan and nan"),
        ("huge", "ValueError: reward and score must be finite in float32, not -1e+39 and -1e+39"),
        ("score", "ValueError: reward and score must be finite in float32, not 0.0 and inf"),
        ("shape", "ValueError: observation must be an array, float32 [3], not float32 [2, 2]"),
        ("dtype", "ValueError: observation must be an array, float32 [3], not float64 [3]"),
        ("list", "ValueError: observation must be an array, float32 [3], not list"),
        ("nothing", "ValueError: a step within an episode must show an observation"),
    ],
)
def test_environment_that_fails_is_replaced_alone(tmp_path: Path, what: str, reason: str) -> None:
    """Its column is lost for one row, its replacement opens the next; its neighbours live on."""
    tape = tmp_path / "tape"

    async def body(group: WorkerGroup) -> None:
        rows = [await group.reset()]
        pid = pid_of(rows[0])
        shown = [[*steps_of(rows[0]), *seeds_of(rows[0])]]
        for _ in range(4):
            rows.append(await group.step(np.ones(3, np.int64)))
            shown.append([*steps_of(rows[-1]), *seeds_of(rows[-1])])
        assert pid_of(rows[-1]) == pid
        assert [row.lost.tolist() for row in rows] == [
            [False] * 3,
            [False] * 3,
            [False, True, False],
            [False] * 3,
            [False] * 3,
        ]
        new = next_seed(2) % 1000
        assert shown == [
            [0, 0, 0, 1, 2, 3],
            [1, 1, 1, 1, 2, 3],
            [2, 0, 2, 1, 0, 3],
            [3, 0, 3, 1, new, 3],
            [4, 1, 4, 1, new, 3],
        ]
        assert rows[2].losses == (Loss("level", 2, 1, reason),)
        assert rows[2].reward.tolist() == [1, 0, 1]
        assert rows[3].first.tolist() == [False, True, False]
        assert rows[3].reward.tolist() == [1, 0, 1]
        assert not any(row.losses for row in (rows[0], rows[1], rows[3], rows[4]))
        # What the lost game had brought is forgotten.
        rows += [await group.step(np.ones(3, np.int64)) for _ in range(5)]
        episodes = [episode for row in rows for episode in row.episodes]
        assert [(episode.env_index, episode.episode_return) for episode in episodes] == [
            (0, 5),
            (2, 5),
            (1, 5),
        ]
        assert tape.read_text().count("close 2\n") == 1

    group = make("faulty", (1, 2, 3), length=5, tape=str(tape), faults=[(2, "step", 2, what)])
    run(body, group)


def test_failing_reset_loses_one_row() -> None:
    """An environment whose later reset raises is lost in the row that would have been its first."""

    async def body(group: WorkerGroup) -> None:
        rows = [await group.reset()] + [await group.step(STAY) for _ in range(5)]
        assert [row.lost.tolist()[0] for row in rows] == [False] * 4 + [True, False]
        assert [row.first.tolist() for row in rows[3:]] == [
            [False, False],
            [False, True],
            [True, False],
        ]
        assert rows[4].losses[0].reason == "OSError: emulator 1 on fire"

    run(body, make("faulty", faults=[(1, "reset", 2, "raise")]))


def test_replacement_that_fails_is_lost_again() -> None:
    """Each row that brings no environment is another loss, until one comes."""
    second = next_seed(1)

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        rows = [await group.step(STAY) for _ in range(4)]
        assert [row.lost.tolist() for row in rows] == 2 * [[True, False]] + 2 * [[False, False]]
        assert [loss.seed for row in rows for loss in row.losses] == [1, second]
        assert rows[2].first.tolist() == [True, False]
        assert rows[3].first.tolist() == [False, True]

    faults = [(1, "step", 1, "raise"), (second, "make", 1, "raise")]
    run(body, make("faulty", faults=faults, max_failures=3))


def test_close_that_raises_harms_nobody(tmp_path: Path) -> None:
    """What a failed environment raises when it is let go does not reach its neighbours."""

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        assert (await group.step(STAY)).lost.tolist() == [True, False]
        row = await group.step(STAY)
        assert row.first.tolist() == [True, False]
        assert steps_of(row) == [0, 2]

    run(body, make("faulty", faults=[(1, "step", 1, "raise"), (1, "close", 1, "raise")]))


@pytest.mark.parametrize("call", ["make", "reset"])
def test_failure_at_the_very_start_is_healed_within_reset(call: str) -> None:
    """reset returns when every environment is there, with the losses on the way."""

    async def body(group: WorkerGroup) -> None:
        row = await group.reset()
        assert row.first.tolist() == [True, True]
        assert not row.lost.any()
        assert row.losses == (Loss("level", 1, 0, "OSError: emulator 1 on fire"),)
        assert seeds_of(row) == [next_seed(1) % 1000, 2]
        row = await group.step(np.array([1, 2]))
        assert steps_of(row) == [1, 1]
        assert row.reward.tolist() == [1, 2]

    run(body, make("faulty", faults=[(1, call, 1, "raise")]))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("kill", "worker process was killed by SIGKILL while environment 1 was stepping"),
        ("segfault", "worker process was killed by SIGSEGV while environment 1 was stepping"),
        (
            "exit",
            "worker process exited with status 3 while environment 1 was stepping: last words of 2",
        ),
        ("scribble", "worker process exited with status 3"),
        ("babble one", "worker process talks nonsense: b'x'"),
        ("babble", "worker process spoke out of turn: b'xy'"),
        ("nonsense", "worker process talks nonsense: KeyError('losses')"),
    ],
)
def test_worker_that_dies_is_replaced(what: str, reason: str) -> None:
    """All its columns are lost for one row, then new environments open their episodes."""

    async def body(group: WorkerGroup) -> None:
        rows = [await group.reset()]
        assert steps_of(rows[0]) == [0, 0]
        rows += [await group.step(np.ones(2, np.int64)) for _ in range(2)]
        assert rows[2].lost.tolist() == [True, True]
        assert rows[2].losses == (Loss("level", 1, 0, reason), Loss("level", 2, 1, reason))
        assert not rows[2].observation.any() and not rows[2].reward.any()
        rows += [await group.step(np.ones(2, np.int64)) for _ in range(4)]
        assert not any(row.lost.any() or row.losses for row in rows[3:])
        assert [row.first.tolist() for row in rows[3:]] == [[True] * 2] + 3 * [[False] * 2]
        assert [row.reward.tolist() for row in rows[3:]] == [[0, 0]] + 3 * [[1, 1]]
        assert seeds_of(rows[6]) == [next_seed(1) % 1000, next_seed(2) % 1000]
        # A game that nobody finished is in no record.
        assert [episode.episode_return for episode in rows[6].episodes] == [3, 3]

    run(body, make("faulty", faults=[(2, "step", 2, what)]))


@pytest.mark.parametrize("loop_factory", [SkippingLoop, uvloop.new_event_loop])
def test_idle_worker_that_is_killed_is_replaced(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A worker that dies between two steps costs one row, on either kind of event loop."""

    async def body(group: WorkerGroup) -> None:
        pid = pid_of(await group.reset())
        os.kill(pid, signal.SIGKILL)
        row = await group.step(STAY)
        assert row.lost.all()
        assert row.losses[0].reason == "worker process was killed by SIGKILL"
        row = await group.step(STAY)
        assert row.first.all() and not row.lost.any()
        assert pid_of(row) != pid

    run(body, make(), loop_factory=loop_factory)


@pytest.mark.parametrize("how", ["hang", "hang-with-gil"])
@pytest.mark.parametrize("call", ["step", "reset"])
def test_hanging_worker_is_replaced(tmp_path: Path, how: str, call: str) -> None:
    """A worker that gives no sign of life for timeout_s is killed, whatever call it is in."""
    fault = (2, call, 2, f"{how} {tmp_path / 'hangs'}")

    async def body(group: WorkerGroup) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        pid = pid_of(await group.reset())
        for _ in range(1 if call == "step" else 3):
            await group.step(STAY)
        step = asyncio.create_task(group.step(STAY))
        await exists(tmp_path / "hangs")
        for _ in range(8):
            await loop.skip(7.5)
            assert not step.done()
        await loop.skip(7.5)
        await loop.skip(7.5)
        row = await step
        doing = "stepping" if call == "step" else "resetting"
        reason = f"worker process hung for 60 s while environment 1 was {doing}"
        assert [loss.reason for loss in row.losses] == 2 * [reason]
        row = await group.step(STAY)
        assert row.first.all()
        assert not is_running(pid)

    run(body, make("faulty", faults=[fault]))


def test_suspended_program_kills_nobody(tmp_path: Path) -> None:
    """A program that slept for an hour finds its workers late by one tick only."""
    go_on = tmp_path / "go_on"

    async def body(group: WorkerGroup) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        await group.reset()
        step = asyncio.create_task(group.step(STAY))
        await exists(tmp_path / "go_on.waits")
        for _ in range(3):
            await loop.skip(3600.0)
        go_on.touch()
        assert not (await step).lost.any()

    run(body, make("faulty", faults=[(1, "step", 1, f"wait {go_on}")]))


def test_slow_environments_add_up_to_no_hang(tmp_path: Path) -> None:
    """timeout_s is one environment's: many slow resets in a row are no hang."""
    go_on = [tmp_path / f"go_on_{seed}" for seed in range(6)]
    faults = [(seed, "reset", 1, f"wait {path}") for seed, path in enumerate(go_on)]

    async def body(group: WorkerGroup) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        reset = asyncio.create_task(group.reset())
        for path in go_on:
            await exists(path.with_name(path.name + ".waits"))
            for _ in range(5):
                await loop.skip(7.5)
            path.touch()
        assert (await reset).losses == ()

    run(body, make("faulty", range(6), faults=faults))


def test_worker_that_does_not_start_at_first() -> None:
    """A worker that dies while it starts is started again, within reset."""
    second = next_seed(1)
    faults = [(1, "make", 1, "exit"), (second, "make", 1, "kill")]

    async def body(group: WorkerGroup) -> None:
        row = await group.reset()
        assert row.first.all() and not row.lost.any()
        assert [(loss.seed, loss.env_index) for loss in row.losses] == [
            (1, 0),
            (2, 1),
            (second, 0),
            (next_seed(2), 1),
        ]
        assert row.losses[0].reason == (
            "worker process exited with status 3 while environment 0 was being made: "
            "last words of 1"
        )
        assert steps_of(await group.step(STAY)) == [1, 1]

    run(body, make("faulty", faults=faults))


def test_what_nobody_expects_of_a_start_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of ours while a worker is started is no loss of an environment, and not silent."""

    def broken(*args: Any) -> None:
        raise LookupError("no such thing")

    async def body(group: WorkerGroup) -> None:
        with pytest.raises(LookupError, match="no such thing"):
            await group.reset()

    monkeypatch.setattr(subproc, "WorkerProcess", broken)
    run(body, make())


def test_system_that_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the system refuses is a failure like others, and leaves nothing behind."""
    real = sys.executable

    async def body(group: WorkerGroup) -> None:
        pid = pid_of(await group.reset())
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        os.kill(pid, signal.SIGKILL)
        assert (await group.step(STAY)).lost.all()
        row = await group.step(STAY)
        assert row.lost.all()
        assert row.losses[1].reason.startswith("worker process did not start: ")
        assert "/nowhere/python" in row.losses[1].reason
        monkeypatch.setattr(sys, "executable", real)
        row = await group.step(STAY)
        assert row.first.all()

    run(body, make(max_failures=4))


@pytest.mark.parametrize(
    ("call", "what", "who", "reason"),
    [
        ("step", "raise", "environment 1", "OSError: emulator {} on fire"),
        ("reset", "raise", "environment 1", "OSError: emulator {} on fire"),
        ("make", "raise", "environment 1", "OSError: emulator {} on fire"),
        ("step", "exit", "environment 1", "worker process exited with status 3 while"),
        ("make", "exit", "environment 1", "worker process exited with status 3 while"),
    ],
)
def test_failing_again_and_again_ends_the_group(
    call: str, what: str, who: str, reason: str
) -> None:
    """At the limit the group ends with the level, the seed, the reason and the last output."""
    seeds = [2, next_seed(2), next_seed(next_seed(2))]
    faults = [(seed, call, 1, what) for seed in seeds]

    async def body(group: WorkerGroup) -> None:
        losses = 0
        with pytest.raises(ActorLost) as caught:
            losses += len((await group.reset()).losses)
            for _ in range(20):
                losses += len((await group.step(STAY)).losses)
        said = str(caught.value)
        assert said.startswith(f"environment group 'env-7', level level: {who} failed 3 times ")
        assert f"seed {seeds[-1]}: {reason.format(seeds[-1])}" in said
        words = "last words of" if what == "exit" else "OSError: emulator"
        assert f"{words} {seeds[-1]}" in said.split("last output of the worker:\n")[1]
        if call == "step":
            assert losses == (2 if what == "raise" else 4)
        for _ in range(2):
            with pytest.raises(ActorLost, match="has failed before") as again:
                await group.step(STAY)
            assert again.value.__cause__ is caught.value

    run(body, make("faulty", faults=faults, length=100))


def test_good_conduct_is_remembered() -> None:
    """Failures count from zero after an episode's end or a thousand steps, per environment."""
    failures = Failures(2, limit=3)
    assert [failures.failed(0), failures.failed(0), failures.failed(1)] == [1, 2, 1]
    failures.rows += 1
    failures.ended(0)
    assert [failures.failed(0), failures.failed(1)] == [1, 2]
    failures.rows += GOOD_STEPS - 1
    assert failures.failed(1) == 3
    failures.rows += GOOD_STEPS
    assert failures.failed(1) == 4
    failures.rows += GOOD_STEPS + 1
    assert failures.failed(1) == 1
    # The worker's own count: any environment's episode is a good sign.
    assert [failures.failed(None), failures.failed(None)] == [1, 2]
    failures.rows += 1
    failures.ended(1)
    assert failures.failed(None) == 1


def test_pauses_grow_to_a_limit() -> None:
    """The first replacement is made at once; then pauses double up to ten seconds."""
    assert [pause_s(failures) for failures in (1, 2, 3, 4)] == [0, 0.4, 0.8, 1.6]
    assert pause_s(1000) == 10


def test_pause_comes_before_the_replacement() -> None:
    """pause_s is asked with the number of failures, and waited for."""
    asked: list[int] = []

    def pause(failures: int) -> float:
        asked.append(failures)
        return 3600.0 if failures == 2 else 0.0

    async def body(group: WorkerGroup) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        await group.reset()
        assert [(await group.step(STAY)).lost.tolist() for _ in range(2)] == 2 * [[True, False]]
        assert asked == [1, 2]
        step = asyncio.create_task(group.step(STAY))
        for _ in range(100):
            await asyncio.sleep(0)
        await loop.skip(3500.0)
        assert not step.done()
        await loop.skip(200.0)
        assert (await step).first.tolist() == [True, False]

    faults = [(1, "step", 1, "raise"), (next_seed(1), "reset", 1, "raise")]
    group = WorkerGroup(
        EnvRecipe("tests.faulty_envs:faulty", {"faults": faults}),
        COUNTER_SPEC,
        level_name="level",
        seeds=(1, 2),
        name="env-7",
        timeout_s=60.0,
        max_failures=3,
        pause_s=pause,
    )
    run(body, group)


@pytest.mark.parametrize(
    ("maker", "options", "message"),
    [
        ("faulty", {"faults": [(None, "make", 1, "usage")]}, "^no such map$"),
        ("nothing", {}, "'tests.faulty_envs:nothing' is no module:function to import"),
        ("bad_spec", {}, "spec"),
        ("mirror", {"space": "Box"}, "an environment's spec is .*Box.*, not .*Discrete"),
    ],
)
def test_bad_recipe_is_a_usage_error(maker: str, options: dict[str, Any], message: str) -> None:
    """What the user got wrong comes out of reset in plain words, at the first try."""

    async def body(group: WorkerGroup) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            await group.reset()
        assert "\n" not in str(caught.value)
        with pytest.raises(ActorLost, match="has failed before"):
            await group.step(STAY)

    run(body, make(maker, max_failures=1, **options))


def test_recipe_that_fails_later_is_no_usage_error() -> None:
    """A maker that worked once and then refuses is a failure that may pass, and the neighbour's
    column lives on."""

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        assert (await group.step(STAY)).lost.tolist() == [True, False]
        row = await group.step(STAY)
        assert row.lost.tolist() == [True, False]
        assert row.losses[0].reason == "RuntimeError: no such map"
        row = await group.step(STAY)
        assert not row.lost.any() and row.first[0]

    faults = [(1, "step", 1, "raise"), (next_seed(1), "make", 1, "usage")]
    run(body, make("faulty", faults=faults))


def test_options_must_be_json() -> None:
    """Options that JSON does not have, or too many of them, are refused before anything starts."""
    with pytest.raises(UsageError, match=r"options of tests\.faulty_envs:counter: must be JSON"):
        make(length=object())
    with pytest.raises(UsageError, match="bytes of JSON must be <= "):
        make(tape="x" * 100_000)


def test_flood_of_output_blocks_nobody() -> None:
    """A worker that prints megabytes goes on, and the end of it is kept."""

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        await group.step(STAY[:1])
        with pytest.raises(ActorLost) as caught:
            await group.step(STAY[:1])
        said = str(caught.value)
        assert len(said) < MAX_OUTPUT + 1000
        assert "line 19999 of seed 1" in said

    faults = [(1, "step", 1, "flood"), (1, "step", 2, "raise")]
    run(body, make("faulty", (1,), faults=faults, max_failures=1))


def test_nothing_is_left_over_after_many_replacements() -> None:
    """Replacing workers and environments leaves no process and no open file behind."""

    async def body(group: WorkerGroup) -> None:
        gc.collect()
        pid = pid_of(await group.reset())
        for round_ in range(6):
            os.kill(pid, signal.SIGKILL)
            assert (await group.step(STAY)).lost.all()
            row = await group.step(STAY)
            pid = pid_of(row)
            assert children() == {pid}
            assert num_memories() <= 2, round_
            for _ in range(3):
                assert not (await group.step(STAY)).lost.any()

    run(body, make())


def test_a_closed_group_holds_no_memory() -> None:
    """Nor a file descriptor of it, although the group itself is still held."""
    gc.collect()

    async def body(group: WorkerGroup) -> None:
        before = num_memories()
        pid_of(await group.reset())
        assert num_memories() == before + 1
        await group.close()
        await group.close()
        assert num_memories() == before
        group.progress()

    gc.disable()
    try:
        run(body, make())
    finally:
        gc.enable()


def num_memories() -> int:
    """Shared memories that this process holds."""

    def is_memory(descriptor: str) -> bool:
        try:
            return "memfd:" in os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            return False

    return sum(map(is_memory, os.listdir("/proc/self/fd")))


def test_processes_of_the_engine_go_with_the_worker(tmp_path: Path) -> None:
    """An engine's own processes outlive neither their worker's death nor the group's close."""
    path = tmp_path / "engine"

    async def body(group: WorkerGroup) -> None:
        await group.reset()
        first = int(path.read_text())
        assert is_running(first)
        assert (await group.step(STAY)).lost.all()
        wait_for_end(first)
        await group.step(STAY)
        second = int(path.read_text())
        assert is_running(second) and second != first
        await group.close()
        wait_for_end(second)

    engines = [(seed, "make", 1, f"engine {path}") for seed in (1, next_seed(1))]
    run(body, make("faulty", faults=[*engines, (2, "step", 1, "segfault")]))


PARENT = """
import asyncio, sys
import numpy as np
from tests.test_envs_subproc import make, pid_of

async def main():
    faults = [(1, "make", 1, "engine " + sys.argv[1]), (2, "step", 1, sys.argv[2])]
    group = make("faulty", faults=faults)
    print(pid_of(await group.reset()), flush=True)
    await group.step(np.zeros(2, np.int64))
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_killed_program_leaves_no_process(tmp_path: Path) -> None:
    """After SIGKILL of the program worker, guard and engine go, whatever call they are in."""
    groups = []
    for how in ("none", "hang", "hang-with-gil"):
        engine, hangs = tmp_path / f"{how}-engine", tmp_path / how
        command = [sys.executable, "-c", PARENT, str(engine), f"{how} {hangs}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            while how != "none" and not hangs.exists():
                os.sched_yield()
            group = [pid for pid in all_processes() if group_of(pid) == worker]
            # The worker, its guard, the engine.
            assert len(group) == 3 and int(engine.read_text()) in group
            parent.kill()
        groups.append(group)
    for pid in itertools.chain(*groups):
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    """Of a process that need not be a child."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        ended, *_ = select.select([descriptor], [], [], WATCHDOG_S)
        os.close(descriptor)
        assert ended


def all_processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def test_stalled_group_holds_up_nobody(tmp_path: Path) -> None:
    """While one group's reset hangs, another's steps go on."""
    go_on = tmp_path / "go_on"

    async def body(stalled: WorkerGroup, other: WorkerGroup) -> None:
        reset = asyncio.create_task(stalled.reset())
        await exists(tmp_path / "go_on.waits")
        rows = [await other.reset()] + [await other.step(STAY) for _ in range(50)]
        assert not reset.done()
        assert sum(len(row.episodes) for row in rows) == 2 * 12
        go_on.touch()
        assert (await reset).first.all()

    run(body, make("faulty", faults=[(1, "reset", 1, f"wait {go_on}")]), make())


def test_few_workers_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker waits for its turn until fewer than MAX_STARTING have yet to show a row."""
    monkeypatch.setattr(subproc, "MAX_STARTING", 2)
    go_on = [tmp_path / name for name in "ab"]

    async def body(*groups: WorkerGroup) -> None:
        resets = [asyncio.create_task(group.reset()) for group in groups]
        for path in go_on:
            await exists(path.with_name(path.name + ".waits"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(children()) == 2
        go_on[0].touch()
        await resets[0]
        await resets[2]
        assert not resets[1].done()
        # Dying gives the turn back, too.
        (child,) = children() - {pid_of(resets[i].result()) for i in (0, 2)}
        os.kill(child, signal.SIGKILL)
        go_on[1].touch()
        assert (await resets[1]).first.all()

    slow = [make("faulty", faults=[(1, "make", 1, f"wait {path}")]) for path in go_on]
    run(body, *slow, make())


def test_spec_of_a_fresh_environment() -> None:
    """probe_spec tells an environment's spec, also while an event loop runs."""

    async def body() -> None:
        recipe = EnvRecipe("tests.faulty_envs:mirror", {"space": "MultiDiscrete"})
        assert probe_spec(recipe, timeout_s=60) == Mirror("MultiDiscrete").spec

    run(body)


@pytest.mark.parametrize(
    ("maker", "options", "error", "message"),
    [
        ("tests.faulty_envs:tell", {}, UsageError, '"cwd": '),
        (
            "tests.faulty_envs:bad_spec",
            {},
            UsageError,
            "observation must be an ArraySpec or a dict",
        ),
        ("tests.faulty_envs:nothing", {}, UsageError, "is no module:function to import"),
        ("tests.nothing:counter", {}, UsageError, "No module named 'tests.nothing'"),
        ("tests.faulty_envs", {}, UsageError, "is no module:function to import"),
        ("tests.faulty_envs:NOT_CALLABLE", {}, ActorLost, "'int' object is not callable"),
        ("tests.faulty_envs:counter", {"lenght": 3}, ActorLost, "unexpected keyword argument"),
        (
            "tests.faulty_envs:faulty",
            {"faults": [(None, "make", 1, "segfault")]},
            ActorLost,
            "SIGSEGV while environment 0 was being made\nlast output of the worker:\nFatal Python",
        ),
    ],
)
def test_recipe_without_an_environment(
    maker: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """probe_spec says in plain words what the user got wrong, and shows how a worker died."""
    with pytest.raises(error) as caught:
        probe_spec(EnvRecipe(maker, options), timeout_s=60)
    assert message in str(caught.value)


def test_worker_is_small_and_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker loads no torch, has its own process group, and no more threads than asked for."""
    monkeypatch.setenv("LP_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        probe_spec(EnvRecipe("tests.faulty_envs:tell", {}), timeout_s=60)
    facts = json.loads(str(caught.value))
    # stdin, stdout, stderr, the memory, two pipes, and the folder that is being listed.
    assert facts == {
        "torch": False,
        "pickled": False,
        "cwd": str(tmp_path),
        "group": True,
        "descriptors": 7,
        "OMP_NUM_THREADS": "1",
        "LP_NUM_THREADS": "3",
    }


def test_module_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment out of a file that lies where the program was started can be made."""
    (tmp_path / "my_own_env.py").write_text("from tests.faulty_envs import counter\n")
    monkeypatch.chdir(tmp_path)
    assert probe_spec(EnvRecipe("my_own_env:counter", {}), timeout_s=60) == COUNTER_SPEC


def test_no_row_is_counted_twice(tmp_path: Path) -> None:
    """Whatever dies, each row that is neither first nor lost is one more step of its environment.

    The row shows the action that was asked for, and every loss is told of exactly once.
    """
    seeds = (1, 2, 3)
    faults = [
        (1, "step", 4, "raise"),
        (2, "step", 9, "segfault"),
        (next_seed(3), "step", 2, "shape"),
        (next_seed(next_seed(1)), "reset", 2, "exit"),
    ]

    async def body(group: WorkerGroup) -> None:
        row = await group.reset()
        random = np.random.default_rng(1)
        lost = np.zeros(3, np.int64)
        told = np.zeros(3, np.int64)
        for _ in range(60):
            action: ActionArray = random.integers(0, 3, 3)
            before, shown = row, row.observation.copy()
            row = await group.step(action)
            went_on = ~(row.first | row.lost)
            assert (row.observation[went_on, 0] == shown[went_on, 0] + 1).all()
            assert (row.observation[went_on, 1] == shown[went_on, 1]).all()
            assert (row.reward == np.where(went_on, action, 0)).all()
            over = before.terminated | before.truncated | before.lost
            assert (row.first == (over & ~row.lost)).all()
            lost += row.lost
            for loss in row.losses:
                told[loss.env_index] += 1
        assert lost.tolist() == told.tolist() == [3, 2, 3]

    run(body, make("faulty", seeds, length=5, faults=faults))


def test_first_row_of_discrete_spec_only() -> None:
    """A spec is compared as a whole: another number of actions is another environment."""
    spec = EnvSpec(ArraySpec((3,), "float32"), Discrete(4), 1)

    async def body(group: WorkerGroup) -> None:
        with pytest.raises(UsageError, match=r"num_actions=3.*num_actions=4"):
            await group.reset()

    run(body, make(spec=spec))
