"""The runs of a trial: a learner each, with its workers, its actor hosts and its accounts."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from endurance.accounts import Session, Tail, compare, learned_twice, read_line
from endurance.counted_net import learned
from endurance.plan import ENV_TIMEOUT_S
from endurance.processes import Seen, is_at_work, look, workers_of
from endurance.programs import Broken, Place, Program, until
from tests.relay import Relay

BATCH, LENGTH = 4, 20
CHECKPOINT_S = 4.0
STALL_TIMEOUT_S = 60.0
FRESH_LINES = 2
"""Reports after which a figure of the last one is about what happened since."""
COMMON = (
    "--num_actors=4",
    "--num_groups=2",
    f"--batch_size={BATCH}",
    f"--unroll_length={LENGTH}",
    "--total_environment_frames=2000000000",
    "--precision=float32",
    "--inference_threads=1",
    "--learner_threads=1",
    "--env_threads=1",
    "--report_interval_s=0.5",
    f"--checkpoint_interval_s={CHECKPOINT_S}",
    "--summary_interval_s=5",
    "--max_env_failures=8",
)


class Run:
    """A learner and its hosts. What is wrong with its accounts gathers in ``problems``."""

    def __init__(self, place: Place, name: str, repeats: int, workers: int, *flags: str) -> None:
        """``repeats``: frames of a step; ``workers``: worker processes of the learner."""
        self.name = name
        self.place = place
        self.logdir = place.disk(name)
        self.port = 0
        self.keys = place.folder / name / "keys"
        self.hosts: dict[str, Program] = {}
        self.relays: dict[str, Relay] = {}
        self.progress = 0
        """Frames that the reports grew by, whatever they were set back to in between."""
        self.num_lines = 0
        """Reports until now."""
        self.problems: list[str] = []
        self.sessions: list[tuple[int, Session]] = []
        """With the pid of each."""
        self.floor = 0
        """The next session may not begin with fewer frames: they are in a checkpoint."""
        self.damaged = -1
        """Frames of the checkpoint that the next session must not begin with."""
        self._frames_per_update = BATCH * LENGTH * repeats
        self._tail = Tail(self.logdir / "metrics.jsonl")
        self._saved: list[int] = []
        self._flags = (
            f"--logdir={self.logdir}",
            f"--env_timeout_s={place.patience * ENV_TIMEOUT_S}",
            f"--stall_timeout_s={place.patience * STALL_TIMEOUT_S}",
            *COMMON,
            *flags,
        )
        self.learner = Program(place, name, workers, "train", *self._flags)

    async def add_hosts(
        self, stack: AsyncExitStack, hosts: Mapping[str, str], workers: int
    ) -> None:
        """Let hosts act for it, each through a relay; by name, where each infers."""
        self.port = self.place.port()
        keys = self.place.keys(self.name, [*hosts])
        self.learner = Program(
            self.place, self.name, self.learner.workers, "train",
            f"--listen=tcp://127.0.0.1:{self.port}",
            f"--secret_key={keys / 'learner.key_secret'}",
            f"--allowed_keys={keys / 'allowed'}",
            *self._flags,
        )  # fmt: skip
        for name, inference in hosts.items():
            relay = Relay(("127.0.0.1", self.port))
            self.relays[name] = await stack.enter_async_context(relay.running())
            self.hosts[name] = Program(
                self.place, f"{self.name}-{name}", workers, "actors",
                f"--connect=tcp://127.0.0.1:{relay.port}",
                f"--name={name}",
                "--num_actors=4",
                "--num_groups=2",
                f"--inference={inference}",
                f"--secret_key={keys / name}.key_secret",
                f"--learner_key={keys / 'learner.key'}",
            )  # fmt: skip

    @property
    def has(self) -> set[str]:
        """See ``plan``."""
        workers = any(program.workers for program in self.programs)
        there = {"workers": workers, "hosts": bool(self.hosts)}
        return {name for name in there if there[name]}

    @property
    def programs(self) -> list[Program]:
        """All of them, the learner first."""
        return [self.learner, *self.hosts.values()]

    # Reports.

    def start_learner(self) -> None:
        """Begin a session; what was reported before has been read."""
        self._tail.skip()  # a fault may have changed it; the new session writes another file
        self._saved = [int(path.stem.rpartition("_")[2]) for path in self.checkpoints()]
        self.learner.start()
        self.sessions.append((self.learner.pid, Session(-1, self._frames_per_update)))

    async def kill_learner(self) -> None:
        """And read the last that it reported."""
        await self.learner.kill()
        self.read()

    def start(self) -> None:
        """Learner and hosts."""
        self.start_learner()
        for host in self.hosts.values():
            host.start()

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.logdir.glob("checkpoint_*.pt"), reverse=True)

    def read(self) -> None:
        """Take in what has been reported since."""
        for text in self._tail.read():
            line = read_line(text)
            if line is None or not self.sessions:
                continue
            pid, session = self.sessions[-1]
            if session.resumed < 0:
                self.sessions[-1] = pid, (session := self._begin())
            if line.frames <= session.resumed:
                continue  # of a session before, kept
            self.num_lines += 1
            self.progress += max(0, line.frames - session.frames)
            problem = session.add(line)
            if problem:
                self.problems.append(f"{self.name}: {problem}")

    def _begin(self) -> Session:
        found = re.findall(r"resumed from \S*checkpoint_(\d+)", self.learner.said)
        resumed = int(found[-1]) if found else 0
        if resumed < self.floor:
            self.problems.append(
                f"{self.name}: resumed with {resumed} frames, not with the {self.floor} saved last"
            )
        if resumed not in (self._saved or [0]):
            self.problems.append(f"{self.name}: resumed with {resumed} frames, of no checkpoint")
        if resumed == self.damaged:
            self.problems.append(f"{self.name}: resumed from a damaged checkpoint")
        self.floor, self.damaged = 0, -1
        return Session(resumed, self._frames_per_update)

    @property
    def frames(self) -> int:
        """Of the last report."""
        return self.sessions[-1][1].frames if self.sessions else 0

    # How it is.

    def seen(self) -> dict[int, Seen]:
        """All processes of the trial."""
        return look(self.place.mark)

    def workers(self) -> list[Seen]:
        """Of the learner and of the hosts."""
        seen = self.seen()
        return [one for program in self.programs for one in workers_of(program.pid, seen)]

    def fallen(self) -> list[Program]:
        """Programs that do not run."""
        return [program for program in self.programs if program.status is not None]

    def missing(self, since_lines: int) -> str:
        """What is not there that should be; ``num_lines`` when all of it was asked to."""
        seen = self.seen()
        words = []
        for program in self.programs:
            if program.status is not None:
                words.append(program.obituary())
                continue
            at_work = [one for one in workers_of(program.pid, seen) if is_at_work(one)]
            if len(at_work) != program.workers:
                words.append(
                    f"{len(at_work)} of {program.workers} workers of {program.name} are at work"
                )
        if self.hosts:
            _, session = self.sessions[-1]
            fresh = self.num_lines - since_lines >= FRESH_LINES and session.lines
            acting = session.lines[-1].hosts if fresh else frozenset()
            words += [f"host {name} does not act" for name in self.hosts if name not in acting]
        return ", ".join(words)

    async def await_whole(self, within_s: float) -> None:
        """Until all of it is there and learns; Broken otherwise."""
        lines, progress = self.num_lines, self.progress

        def whole() -> bool:
            self.read()
            if self.fallen():
                raise Broken("; ".join(program.obituary() for program in self.fallen()))
            return self.progress > progress and not self.missing(lines)

        try:
            await until(whole, within_s, "")
        except Broken as broken:
            missing = str(broken) if self.fallen() else self.missing(lines) or "no frames"
            raise Broken(f"{self.name} is not whole: {missing}") from None

    async def rebuild(self, within_s: float) -> None:
        """End it all, and start it all; Broken if that does not help."""
        for program in self.programs:
            await program.kill()
        self.read()
        for relay in self.relays.values():
            relay.mend()
        began_s = time.monotonic()
        self.start()
        await self.await_whole(within_s - (time.monotonic() - began_s))


class CountedRun(Run):
    """Whose net writes down what it learns from: its frames are compared exactly."""

    def audit(self) -> list[str]:
        """What is wrong with the frames of all its sessions; call once they have ended."""
        problems, every = [], []
        for pid, session in self.sessions:
            columns = learned(self.place.learned / str(pid))
            every += [column for words in columns for column in words]
            steps = [sum(word.steps for word in words) for words in columns]
            updates = [sum(steps[i : i + BATCH]) for i in range(0, len(steps), BATCH)]
            problems.append(compare(session, updates))
        return [
            f"{self.name}: {problem}" for problem in (*problems, *learned_twice(every)) if problem
        ]

    def num_steps(self) -> int:
        """Steps that were learned from, by the net's own record."""
        paths = (self.place.learned / str(pid) for pid, _ in self.sessions)
        return sum(word.steps for path in paths for words in learned(path) for word in words)


async def make_runs(stack: AsyncExitStack, place: Place) -> dict[str, Run]:
    """Atari with two actor hosts, ViZDoom with worker processes, and one whose frames are known."""
    atari = Run(place, "atari", 4, 0, "--level_name=atari_pong", "--net=shallow")
    await atari.add_hosts(stack, {"one": "host", "two": "learner"}, 0)
    doom = Run(place, "doom", 4, 2, "--level_name=doom_basic", "--net=shallow", "--no_use_lstm")
    level, net = "endurance.counted_env:Counted", "endurance.counted_net:build"
    counted = CountedRun(
        place, "counted", 1, 2, f"--level_name={level}", f"--net={net}"
    )  # fmt: skip
    await counted.add_hosts(stack, {"three": "host", "four": "learner"}, 2)
    return {run.name: run for run in (atari, doom, counted)}
