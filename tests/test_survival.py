"""Whole programs that are killed, stopped and hung: none stays, and nothing of theirs does."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncagent.checkpoint import checkpoint_paths, load_checkpoint
from tests.test_kill import reports

ROOT = Path(__file__).resolve().parent.parent
WATCHDOG_S = 240

GYM = ("--level_name=tests.my_envs:Switches", "--num_actors=2", "--num_groups=1")
DOOM = (
    *("--level_name=doom_basic", "--num_actors=1", "--num_groups=1", "--batch_size=1"),
    *("--unroll_length=5", "--net=shallow", "--use_lstm=False", "--precision=float32"),
)
CATCH = ("--level_name=catch", "--num_actors=2", "--num_groups=1")

HANGING = """
import os, time
import torch
from pathlib import Path
from asyncagent.bodies import MlpBody
from asyncagent.models import ActorCritic

FLAG = Path(os.environ["TMPDIR"]) / "hang"

class Net(ActorCritic):
    def forward(self, *args):
        if torch.is_grad_enabled() and FLAG.exists():
            FLAG.with_name("hangs").touch()
            time.sleep(1e6)
        return super().forward(*args)

def build(spec, use_lstm):
    return Net(MlpBody(spec.observation), spec.actions, 0)

def never(spec, use_lstm):
    time.sleep(1e6)
"""


class Programs:
    """Programs that share a temporary folder of their own, by which they are found again."""

    def __init__(self, folder: Path) -> None:
        self.logdir = folder / "run"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        (folder / "hanging.py").write_text(HANGING)
        path = os.pathsep.join([str(folder), str(ROOT)])
        self._environment = os.environ | {
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
        }
        self._environment.pop("TEST_TMPDIR", None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """``python -m asyncagent``; stdout is a pipe, stderr goes to a file."""
        with (self.temporary.parent / "stderr").open("a") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "asyncagent", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment,
            )

    def train(self, *flags: str) -> subprocess.Popen[str]:
        """A trainer that goes on for ever, and has made its first checkpoint."""
        process = self.start(
            "train",
            f"--logdir={self.logdir}",
            "--total_environment_frames=1000000000",
            "--report_interval_s=0.2",
            "--checkpoint_interval_s=0.5",
            *flags,
        )
        read_until(process, lambda: frames_of(self) > 0 and bool(checkpoint_paths(self.logdir)))
        return process

    def hang(self, process: subprocess.Popen[str]) -> None:
        """Let the trainer's next update hang."""
        (self.temporary / "hang").touch()
        while not (self.temporary / "hangs").exists():
            assert process.poll() is None
            os.sched_yield()

    def errors(self) -> str:
        """What was said on stderr."""
        return (self.temporary.parent / "stderr").read_text()

    def alive(self) -> list[int]:
        """Our processes, and all that they have started."""
        marker = f"TMPDIR={self.temporary}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marker in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def wait_for_all(self) -> None:
        """For the end of every one of them; then nothing must be left."""
        deadline_s = time.monotonic() + WATCHDOG_S
        while alive := self.alive():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(pid)
                    ended, *_ = select.select([descriptor], [], [], WATCHDOG_S)
                    os.close(descriptor)
                    assert ended, f"{pid} is left behind"
            assert time.monotonic() < deadline_s, f"{alive} are left behind"

    def files(self) -> list[str]:
        """What is in the temporary folder; torch's cache, which it makes when it is imported,
        does not count."""
        names = [path.name for path in self.temporary.iterdir()]
        return [name for name in names if not name.startswith("torchinductor_")]

    def shared_memory(self) -> list[Path]:
        """What has a name, and belongs to a game of ours."""
        names = []
        for pid in self.alive():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "+viz_instance_id" in words:
                    names.append(words[words.index("+viz_instance_id") + 1])
        return [path for name in names for path in Path("/dev/shm").glob(f"*{name}*")]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """None of them outlives the test."""
    ours = Programs(tmp_path)
    yield ours
    for pid in ours.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def read_until(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    """Read the program's reports until ``seen()``."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "frames/s" in line and seen():
            return
    raise AssertionError(f"the program ended by itself: {''.join(said)}")


def frames_of(programs: Programs) -> int:
    lines = reports(programs.logdir) if (programs.logdir / "metrics.jsonl").exists() else []
    frames: int = lines[-1]["frames"] if lines else 0
    return frames


@pytest.mark.parametrize(
    ("level", "num_processes"), [(GYM, 3), pytest.param(DOOM, 4, marks=pytest.mark.slow)]
)
def test_a_killed_trainer_leaves_nothing(
    programs: Programs, level: tuple[str, ...], num_processes: int
) -> None:
    """Worker, guard and engine go by themselves after SIGKILL of the trainer; no folder, no shared
    memory is left."""
    if level is DOOM:
        pytest.importorskip("vizdoom")
    process = programs.train(*level)
    # Trainer, worker, guard, engine.
    assert len(programs.alive()) == num_processes
    assert programs.shared_memory() == []
    process.kill()
    programs.wait_for_all()
    assert programs.files() == []
    process.communicate()


@pytest.mark.slow
def test_a_killed_host_leaves_nothing(programs: Programs) -> None:
    """An actor host's environments go with it, and its learner goes on waiting for another."""
    address = f"ipc://{programs.temporary.parent}/hosts"
    learner = programs.start(
        "train", "--level_name=tests.my_envs:Switches", f"--logdir={programs.logdir}",
        f"--listen={address}", "--num_actors=0", "--report_interval_s=0.2",
    )  # fmt: skip
    host = programs.start(
        "actors", f"--connect={address}", "--num_actors=2", "--num_groups=1", "--inference=learner"
    )
    read_until(learner, lambda: frames_of(programs) > 0)
    assert len(programs.alive()) == 4
    host.kill()
    host.communicate()
    while len(programs.alive()) > 1:
        os.sched_yield()
    read_until(learner, lambda: reports(programs.logdir)[-1]["hosts"] == {})
    learner.terminate()
    learner.communicate(timeout=WATCHDOG_S)
    assert learner.returncode == 0
    programs.wait_for_all()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_test_that_is_ended_leaves_nothing(programs: Programs, number: int) -> None:
    """``asyncagent test`` in the midst of its games."""
    train = programs.train(*GYM)
    train.terminate()
    train.communicate(timeout=WATCHDOG_S)
    test = programs.start("test", f"--logdir={programs.logdir}", "--test_num_episodes=1000000")
    while len(programs.alive()) < 3:
        assert test.poll() is None
    test.send_signal(number)
    programs.wait_for_all()
    assert programs.files() == []
    test.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_bench_that_is_ended_leaves_nothing(programs: Programs, number: int) -> None:
    """``asyncagent bench``, while its processes measure the components."""
    bench = programs.start("bench", *GYM, "--seconds=100")
    while len(programs.alive()) < 5:
        assert bench.poll() is None
    bench.send_signal(number)
    programs.wait_for_all()
    assert programs.files() == []
    bench.communicate()


@pytest.mark.slow
def test_the_second_signal_leaves_at_once(programs: Programs) -> None:
    """While the end waits for an update that hangs, SIGTERM ends the program, and its workers go;
    the checkpoint of before is whole."""
    process = programs.train(*GYM, "--net=hanging:build", "--grace_s=1000")
    programs.hang(process)
    process.terminate()
    assert process.stdout is not None
    assert any("a second Ctrl-C leaves at once" in line for line in process.stdout)
    deadline_s = time.monotonic() + WATCHDOG_S
    while process.poll() is None:  # until one is not the same request any more
        assert time.monotonic() < deadline_s
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    assert process.returncode == 128 + signal.SIGTERM
    programs.wait_for_all()
    found = load_checkpoint(programs.logdir)
    assert found is not None and found[1]["frames"] > 0


@pytest.mark.slow
def test_the_grace_is_over(programs: Programs) -> None:
    """An end that an update holds up has status 1, and one line that says what is saved."""
    process = programs.train(*CATCH, "--net=hanging:build", "--grace_s=1")
    programs.hang(process)
    process.terminate()
    process.communicate(timeout=WATCHDOG_S)
    assert process.returncode == 1
    assert programs.errors().splitlines()[-1] == (
        "asyncagent train: --grace_s=1 is over before everything has ended: "
        "nothing was saved since the last checkpoint"
    )
    assert load_checkpoint(programs.logdir) is not None


def test_a_stall_has_status_3(programs: Programs) -> None:
    """An update that hangs ends the program, with what there is to know about it in stall.txt."""
    process = programs.train(*CATCH, "--net=hanging:build", "--stall_timeout_s=10")
    programs.hang(process)
    process.communicate(timeout=WATCHDOG_S)
    assert process.returncode == 3
    text = (programs.logdir / "stall.txt").read_text()
    assert text.startswith("learner has not moved for ")
    assert "in forward: time.sleep(1e6)" in text and "  learner: update " in text
    assert text in programs.errors()


@pytest.mark.slow
def test_a_loop_that_is_held_up_has_status_3(programs: Programs) -> None:
    """A call on the loop's own thread that never returns is found out, too."""
    process = programs.start(
        "train", *CATCH, f"--logdir={programs.logdir}", "--net=hanging:never", "--stall_timeout_s=4"
    )
    process.communicate(timeout=WATCHDOG_S)
    assert process.returncode == 3
    text = (programs.logdir / "stall.txt").read_text()
    assert text.startswith("the event loop has been held up for ") and "in never: time" in text


@pytest.mark.slow
def test_a_suspended_trainer_has_not_stalled(programs: Programs) -> None:
    """Stopped for longer than a stall may take, it goes on later, with its environments."""
    process = programs.train(*GYM, "--stall_timeout_s=25", "--env_timeout_s=20")
    process.send_signal(signal.SIGSTOP)
    time.sleep(30)  # there is nothing to wait for but the time
    frames = frames_of(programs)
    process.send_signal(signal.SIGCONT)
    read_until(process, lambda: frames_of(programs) > frames + 1000)
    process.terminate()
    process.communicate(timeout=WATCHDOG_S)
    assert process.returncode == 0
    assert reports(programs.logdir)[-1]["env_losses"] == 0
