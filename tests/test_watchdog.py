"""What stands still, hangs or dies is found out, shown, and ends the program."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncagent.signals as signals_module
import asyncagent.watchdog as watchdog_module
from asyncagent.diagnosis import describe_tasks, describe_threads
from asyncagent.errors import CallFailed, Stalled, TaskEnded
from asyncagent.signals import AskedToStop, tidy_end
from asyncagent.tasks import endless, named
from asyncagent.threads import NamedThread
from asyncagent.watchdog import FAILED, STALLED, Component, Watchdog, of_thread

WATCHDOG_S = 60
TIMEOUT_S = 0.2


def run(main: Coroutine[Any, Any, Any]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WATCHDOG_S):
            await main

    asyncio.run(limited())


class Left:
    """Stands in for os._exit: keeps the status, and says that it was called."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.called = threading.Event()

    def __call__(self, status: int) -> None:
        self.statuses.append(status)
        self.called.set()


@pytest.fixture
def dying_threads_say_nothing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What threading.excepthook would show."""
    shown: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(str(args.exc_value)))
    return shown


def test_tasks_are_described_to_the_line_they_wait_at() -> None:
    """Of every task its name, all its frames, outermost first, and the future it waits for."""

    async def inner(event: asyncio.Event) -> None:
        await event.wait()  # here

    async def outer(event: asyncio.Event) -> None:
        await inner(event)

    async def main() -> None:
        event = asyncio.Event()
        task = asyncio.create_task(named("actor-7", outer(event)))
        await asyncio.sleep(0)
        text = describe_tasks(asyncio.get_running_loop())
        lines = text[text.index("  actor-7\n") :].splitlines()
        words = ("in named", "inner(event)", "# here", "Event.wait", "waits for")
        places = [next(i for i, line in enumerate(lines) if word in line) for word in words]
        assert places == sorted(places)
        event.set()
        await task

    run(main())


def test_threads_are_described() -> None:
    """Of every thread its name and where it is."""
    inside, go_on = threading.Event(), threading.Event()

    def hang_about() -> None:
        inside.set()
        go_on.wait(WATCHDOG_S)

    thread = NamedThread("engine-3")
    thread.submit(hang_about)
    assert inside.wait(WATCHDOG_S)
    text = describe_threads()
    go_on.set()
    thread.close()
    assert "hang_about: go_on.wait" in text[text.index("  engine-3\n") :]
    assert "  MainThread\n" in text


def test_what_stopped_first_is_named_and_all_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stalled names the component that stopped first, not the one it starved; the report, on
    stderr and in the file, has last events, queues, tasks and threads."""
    looks = 0

    def survey() -> dict[str, Component]:
        nonlocal looks
        looks += 1
        return {
            "starved": Component("row 5", min(looks, 4)),
            "culprit": Component("update 9", 0),
            "waiting": Component("batch 2", 0, idle=True),
        }

    async def main() -> None:
        with Watchdog(TIMEOUT_S, tmp_path / "stall.txt", Left()) as watchdog:
            with pytest.raises(Stalled, match=r"culprit has not moved .*; 3 in the queue") as e:
                await watchdog.watch(survey, lambda: "3 in the queue")
            assert "stall.txt" in str(e.value)

    run(main())
    text = (tmp_path / "stall.txt").read_text()
    assert text in capsys.readouterr().err
    for words in (
        "culprit has not moved",
        "3 in the queue",
        "  starved: row 5, ",
        "  waiting: batch 2, 0 s ago, has nothing to do",
        "Tasks (1):",
        "in test_what_stopped",
        "  watchdog\n",
    ):
        assert words in text, words


def test_what_moves_or_is_idle_has_not_stalled() -> None:
    """A component may be idle for as long as it likes; one that moves now and then is fine."""
    looks = 0

    async def main() -> None:
        enough = asyncio.Event()

        def survey() -> dict[str, Component]:
            nonlocal looks
            looks += 1
            if looks == 20:
                enough.set()
            return {"idle": Component("", 0, idle=True), "slow": Component("", looks // 4)}

        with Watchdog(TIMEOUT_S, leave=Left()) as watchdog:
            watching = asyncio.create_task(watchdog.watch(survey))
            await asyncio.wait({asyncio.create_task(enough.wait()), watching},
                               return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            assert not watching.done()
            watching.cancel()

    run(main())


def test_what_is_not_vital_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A thread that does not come out of a call, and that nobody waits for, ends no run."""
    go_on = threading.Event()

    async def main() -> None:
        files = NamedThread("files")
        files.submit(lambda: None)
        files.run(go_on.wait)
        enough = asyncio.Event()

        def survey() -> dict[str, Component]:
            if len(caplog.records) == 2:
                enough.set()
            return {"files": of_thread(files)._replace(vital=False)}

        with Watchdog(TIMEOUT_S, leave=Left()) as watchdog:
            watching = asyncio.create_task(watchdog.watch(survey))
            await enough.wait()
            assert not watching.done()
            watching.cancel()
        go_on.set()
        files.close()

    run(main())
    for record in caplog.records:
        assert "files has not moved" in record.message and "call 1 was the last" in record.message


def test_a_loop_that_is_held_up_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no task gets a turn any more the thread reports where the loop is, and leaves."""
    monkeypatch.setattr(watchdog_module, "HELD_UP_S", 0.0)
    left = Left()

    async def main() -> None:
        with Watchdog(TIMEOUT_S, tmp_path / "stall.txt", left) as watchdog:
            survey = {"learner": Component("update 3", 3)}
            watching = asyncio.create_task(watchdog.watch(lambda: survey))
            await asyncio.sleep(0)
            assert left.called.wait(WATCHDOG_S)  # holds the loop up
            watching.cancel()

    run(main())
    assert left.statuses == [STALLED]
    text = (tmp_path / "stall.txt").read_text()
    assert "the event loop has been held up" in text and "learner: update 3" in text
    assert "assert left.called.wait(WATCHDOG_S)" in text


def test_a_report_that_cannot_be_written_holds_up_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the folder is gone the reason is said, and the stall shown, on stderr."""

    def broken() -> str:
        raise ValueError("torn queue")

    async def main() -> None:
        path = tmp_path / "no" / "stall.txt"
        with Watchdog(TIMEOUT_S, path, Left()) as watchdog, pytest.raises(Stalled):
            await watchdog.watch(lambda: {"learner": Component("", 0)}, broken)

    run(main())
    error = capsys.readouterr().err
    assert "No such file" in error and "torn queue" in error


def test_a_program_that_does_not_end_is_left() -> None:
    """Of two limits the earlier counts."""
    left = Left()

    async def main() -> None:
        with Watchdog(TIMEOUT_S, leave=left) as watchdog:
            watchdog.leave_within(0.0, FAILED, "the grace is over")
            watchdog.leave_within(1000.0, STALLED, "later")
            await asyncio.to_thread(left.called.wait, WATCHDOG_S)

    run(main())
    assert left.statuses == [FAILED]


def test_a_program_that_ends_is_not_left() -> None:
    """After the watchdog's end its limits are none."""
    left = Left()
    before = set(threading.enumerate())  # of other tests

    async def main() -> None:
        with Watchdog(TIMEOUT_S, leave=left) as watchdog:
            watchdog.leave_within(1000.0, FAILED, "")
        for thread in set(threading.enumerate()) - before:
            if thread.name == "watchdog":
                thread.join(WATCHDOG_S)
                assert not thread.is_alive()

    run(main())
    assert left.statuses == []


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(0), KeyboardInterrupt()])
def test_a_dead_thread_ends_the_run(
    error: BaseException, dying_threads_say_nothing: list[str]
) -> None:
    """Whatever a call raises, the watch raises; and the thread takes no calls any more."""

    def broken() -> None:
        raise error

    async def main() -> None:
        thread = NamedThread("engine-4")
        with Watchdog(1000.0, leave=Left()) as watchdog:
            watching = asyncio.create_task(watchdog.watch(dict))
            thread.submit(broken)
            with pytest.raises(CallFailed, match="thread 'engine-4' died of") as caught:
                await watching
            assert caught.value.__cause__ is error
        with pytest.raises(RuntimeError, match="is closed"):
            thread.submit(broken)
        thread.join(WATCHDOG_S)

    run(main())
    assert dying_threads_say_nothing == [str(error)]


def test_a_callback_that_raises_ends_the_run() -> None:
    """What asyncio would only log, with nobody answered ever after, comes out of the watch."""

    async def main() -> None:
        with Watchdog(1000.0, leave=Left()) as watchdog:
            watching = asyncio.create_task(watchdog.watch(dict))
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await watching
        assert asyncio.get_running_loop().get_exception_handler() is None

    run(main())


def test_during_gives_the_result_or_the_stall() -> None:
    """Work is watched over while it goes on: its result and its exception are its own."""

    async def main() -> None:
        async def three() -> int:
            return 3

        async def broken() -> int:
            raise ValueError("mine")

        async def stuck() -> int:
            await asyncio.Event().wait()
            return 0

        with Watchdog(TIMEOUT_S, leave=Left()) as watchdog:
            still = {"build-envs": Component("call 2", 2)}
            assert await watchdog.during(three(), lambda: still) == 3
            with pytest.raises(ValueError, match="mine"):
                await watchdog.during(broken(), lambda: still)
            with pytest.raises(Stalled, match="build-envs"):
                await watchdog.during(stuck(), lambda: still)

    run(main())


async def _cancelled() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def _exits() -> None:
    raise SystemExit(0)


async def _ends() -> None:
    pass


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: named("bridge", _cancelled()), "'bridge' awaited something that was cancelled"),
        (lambda: named("bridge", _exits()), "'bridge' raised SystemExit"),
        (lambda: endless("bridge", _ends()), "'bridge' has ended"),
    ],
)
def test_no_task_dies_in_silence(
    task: Callable[[], Coroutine[Any, Any, None]], message: str
) -> None:
    """What a TaskGroup would pass over, or leave the program for, is a failure like another."""

    async def main() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(task())
                tasks.create_task(named("other", asyncio.Event().wait()))  # type: ignore[arg-type]
        (error,) = caught.value.exceptions
        assert isinstance(error, TaskEnded) and message in str(error)

    run(main())


def test_a_cancelled_task_is_cancelled() -> None:
    """A task that somebody cancels ends as asyncio has it."""

    async def main() -> None:
        task = asyncio.create_task(endless("actor", asyncio.Event().wait()))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


# Signals.


@pytest.fixture
def own_handlers() -> Iterator[tuple[Any, Any]]:
    """The handlers of a program that embeds us; put back afterwards."""

    def mine(number: int, frame: object) -> None:
        pass

    kept = [signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)]
    yield mine, mine
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), kept, strict=True):
        signal.signal(number, handler)


def test_the_second_signal_is_obeyed_where_the_loop_is_held_up(
    monkeypatch: pytest.MonkeyPatch, own_handlers: tuple[Any, Any]
) -> None:
    """The first signal is told of at once, and asks once the loop turns; another, later, ends the
    process by its number, whatever the loop does."""
    monkeypatch.setattr(signals_module, "SAME_S", -1.0)
    left, told, asked = Left(), threading.Event(), asyncio.Event()

    async def main() -> None:
        with AskedToStop(asked.set, told.set, left):
            signal.raise_signal(signal.SIGTERM)
            assert told.wait(WATCHDOG_S)
            signal.raise_signal(signal.SIGINT)
            assert left.called.wait(WATCHDOG_S)
            assert not asked.is_set()
            await asked.wait()

    run(main())
    assert left.statuses == [128 + signal.SIGINT]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == own_handlers


def test_signals_that_follow_at_once_are_the_same_request(
    own_handlers: tuple[Any, Any],
) -> None:
    """timeout(1) sends each twice: that asks once, and leaves nothing."""
    left, asked = Left(), 0

    async def main() -> None:
        nonlocal asked
        event = asyncio.Event()

        def ask() -> None:
            nonlocal asked
            asked += 1
            event.set()

        with AskedToStop(ask, leave=left):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            await event.wait()

    run(main())
    assert (asked, left.statuses) == (1, [])


def test_sigterm_unwinds(own_handlers: tuple[Any, Any]) -> None:
    """Within ``tidy_end`` what a with block would tidy up is tidied up."""
    tape = []
    with pytest.raises(SystemExit) as caught, tidy_end():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            tape.append("tidy")
    assert caught.value.code == 128 + signal.SIGTERM and tape == ["tidy"]
    assert signal.getsignal(signal.SIGTERM) is own_handlers[1]
