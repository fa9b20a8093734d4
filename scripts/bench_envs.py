#!/usr/bin/env python3
"""What worker processes cost: steps/s of environments that cost nothing but show fresh bytes.

    python scripts/bench_envs.py [--json] [--seconds S] [--rounds N] [--fairness]

Two workers of 16 environments, and two of 1, each environment showing uint8 [72, 128, 3] out of
prepared random frames, awaited by uvloop; beside them, in the same rounds, the barest thing that
could do the same (one thread that blocks on pipes, the same shared memory) and Gymnasium's
AsyncVectorEnv with shared memory (a process per environment).

Every frame is verified on arrival: its first and its last eight bytes must hold the number of the
step; in every 16th row one environment's whole frame is summed up and compared with the sum it
carries.  ``cpu`` is processor time per step of the loop's process and of the workers' together.

``--fairness`` measures something else: see bench_fairness.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.envs.base import EnvRecipe, Outcome
from asyncagent.structs import ArraySpec, Discrete, EnvSpec

SHAPE = (72, 128, 3)
WORDS = int(np.prod(SHAPE)) // 8
FRAMES = 31  # prepared frames of a process
SPEC = EnvSpec(ArraySpec(SHAPE, "uint8"), Discrete(9), 4)
WORKERS = 2
Bytes = npt.NDArray[np.uint8]


class RandomBytes:
    """An environment whose frames are (step, sum of what follows but the last, random, step)."""

    spec = SPEC
    _frames: tuple[list[Bytes], list[memoryview]] | None = None

    def __init__(self) -> None:
        if RandomBytes._frames is None:
            RandomBytes._frames = prepared_frames()
        self._shown, self._words = RandomBytes._frames
        self._step = 0

    def reset(self) -> Bytes:
        return self._show()

    def step(self, action: Any) -> Outcome:
        return Outcome(self._show(), 1.0, False, False)

    def close(self) -> None:
        pass

    def _show(self) -> Bytes:
        step = self._step
        frame = step % FRAMES
        words = self._words[frame]
        words[0] = words[WORDS - 1] = step
        self._step = step + 1
        return self._shown[frame]


def prepared_frames() -> tuple[list[Bytes], list[memoryview]]:
    """FRAMES random frames, and the same memory as 64-bit words."""
    words = np.random.default_rng().integers(0, 2**63, (FRAMES, WORDS), np.uint64)
    words[:, 1] = words[:, 2:-1].sum(axis=1)
    return [frame.view(np.uint8).reshape(SHAPE) for frame in words], [one.data for one in words]


def random_bytes(seed: int) -> RandomBytes:
    """The maker of the worker processes' environments."""
    return RandomBytes()


def verify(frames: Bytes, step: int) -> None:
    """SystemExit unless ``frames`` [E, 72, 128, 3] are whole and of this step."""
    words = frames.reshape(len(frames), -1).view(np.uint64)
    if not ((words[:, 0] == step) & (words[:, -1] == step)).all():
        raise SystemExit(f"bench_envs: step {step}: {words[:, 0]} ... {words[:, -1]} arrived")
    if step % 16 == 0:
        one = words[step // 16 % len(words)]
        if one[2:-1].sum() != one[1]:
            raise SystemExit(f"bench_envs: step {step}: a frame's checksum is wrong")


class Sample(NamedTuple):
    """One measurement."""

    steps_per_s: float
    loop_cpu_us: float
    """Processor time per step of this process, microseconds."""
    workers_cpu_us: float
    """Processor time per step of all its children, microseconds."""


class Contender:
    """Something that steps WORKERS * num_envs environments."""

    def play(self, seconds: float) -> int:
        """Steps taken in about so many seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """End the workers."""
        raise NotImplementedError


class Ours(Contender):
    """WorkerGroups, one task each, on uvloop."""

    def __init__(self, num_envs: int) -> None:
        import uvloop

        from asyncagent.envs.subproc import WorkerGroup

        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._num_envs = num_envs
        self._steps = [0] * WORKERS
        self._groups = [
            WorkerGroup(
                EnvRecipe("bench_envs:random_bytes", {}),
                SPEC,
                level_name="bytes",
                seeds=range(num_envs),
                name=f"env-{i}",
                timeout_s=60,
                max_failures=1,
            )
            for i in range(WORKERS)
        ]
        self._runner.run(self._all(lambda i: self._reset(i)))

    def play(self, seconds: float) -> int:
        stop_s = time.perf_counter() + seconds
        before = sum(self._steps)
        self._runner.run(self._all(lambda i: self._play(i, stop_s)))
        return (sum(self._steps) - before) * self._num_envs

    def close(self) -> None:
        self._runner.run(self._all(lambda i: self._groups[i].close()))
        self._runner.close()

    async def _all(self, what: Callable[[int], Any]) -> None:
        await asyncio.gather(*map(what, range(WORKERS)))

    async def _reset(self, i: int) -> None:
        verify((await self._groups[i].reset()).observation, 0)

    async def _play(self, i: int, stop_s: float) -> None:
        group, step = self._groups[i], self._steps[i]
        action = np.zeros(self._num_envs, np.int64)
        while time.perf_counter() < stop_s:
            row = await group.step(action)
            step += 1
            verify(row.observation, step)
        self._steps[i] = step


class Bare(Contender):
    """One thread that blocks on pipes; workers that know no failures and no episodes."""

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self._step = 0
        self._workers = [self._start(num_envs) for _ in range(WORKERS)]
        for *_, frames in self._workers:
            assert frames.shape == (num_envs, *SHAPE)

    def _start(self, num_envs: int) -> tuple[subprocess.Popen[bytes], int, int, Any, Any]:
        memory_fd = os.memfd_create("bare")
        os.ftruncate(memory_fd, bare_size(num_envs))
        their_end, asks = os.pipe()
        answers, answer_end = os.pipe()
        passed = (memory_fd, their_end, answer_end)
        code = f"import bench_envs; bench_envs.bare_worker({num_envs}, *{passed})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=passed, env=environment)
        actions, frames = bare_arrays(num_envs, memory_fd)
        for descriptor in passed:
            os.close(descriptor)
        return process, asks, answers, actions, frames

    def play(self, seconds: float) -> int:
        stop_s = time.perf_counter() + seconds
        before = self._step
        action = np.zeros(self._num_envs, np.int64)
        for _, asks, _, actions, _ in self._workers:
            actions[:] = action
            os.write(asks, b".")
        while True:
            go_on = time.perf_counter() < stop_s
            for _, asks, answers, actions, frames in self._workers:
                os.read(answers, 1)
                verify(frames, self._step)
                if go_on:
                    actions[:] = action
                    os.write(asks, b".")
            self._step += 1
            if not go_on:
                return (self._step - before) * WORKERS * self._num_envs

    def close(self) -> None:
        for process, asks, answers, *_ in self._workers:
            os.close(asks)
            os.close(answers)
            process.wait()


def bare_size(num_envs: int) -> int:
    """Bytes of the bare worker's memory."""
    return num_envs * (8 + 8 * WORDS)


def bare_arrays(num_envs: int, memory_fd: int) -> tuple[Any, Bytes]:
    """Actions int64 [E] and frames [E, 72, 128, 3] in the memory."""
    memory = mmap(memory_fd, bare_size(num_envs))
    frames: Bytes = np.ndarray((num_envs, *SHAPE), np.uint8, memory, 8 * num_envs)
    return np.ndarray(num_envs, np.int64, memory), frames


def bare_worker(num_envs: int, memory_fd: int, asks: int, answers: int) -> None:
    """Step the environments each time a byte comes, until no more can."""
    actions, frames = bare_arrays(num_envs, memory_fd)
    envs = [RandomBytes() for _ in range(num_envs)]
    while os.read(asks, 1):
        for i, env in enumerate(envs):
            frames[i] = env.step(actions[i]).observation
        os.write(answers, b".")


class Gymnasium(Contender):
    """AsyncVectorEnv, observations not copied on arrival; its action is one call for all."""

    def __init__(self, num_envs: int) -> None:
        from gymnasium.vector import AsyncVectorEnv

        from bench_envs import gym_random_bytes  # pickled by its name, not by its code

        self._num_envs = WORKERS * num_envs
        self._step = 0
        makers = [gym_random_bytes] * self._num_envs
        self._envs: Any = AsyncVectorEnv(makers, shared_memory=True, copy=False, context="spawn")
        verify(self._envs.reset()[0], 0)

    def play(self, seconds: float) -> int:
        stop_s = time.perf_counter() + seconds
        before = self._step
        action = np.zeros(self._num_envs, np.int64)
        while time.perf_counter() < stop_s:
            frames, *_ = self._envs.step(action)
            self._step += 1
            verify(frames, self._step)
        return (self._step - before) * self._num_envs

    def close(self) -> None:
        self._envs.close()


def gym_random_bytes() -> Any:
    """RandomBytes as a gymnasium.Env."""
    import gymnasium

    class Env(gymnasium.Env[Any, Any]):
        def __init__(self) -> None:
            self.observation_space = gymnasium.spaces.Box(0, 255, SHAPE, np.uint8)
            self.action_space = gymnasium.spaces.Discrete(9)
            self._env = RandomBytes()

        def reset(self, **_: Any) -> tuple[Bytes, dict[str, Any]]:
            return self._env.reset(), {}

        def step(self, action: Any) -> tuple[Bytes, float, bool, bool, dict[str, Any]]:
            outcome = self._env.step(action)
            return outcome.observation, outcome.reward, False, False, {}

    return Env()


def measure(contender: Contender, children: set[int], seconds: float) -> Sample:
    """One round; ``children`` are the contender's workers."""
    workers_before = cpu_s(children)
    own_before = time.process_time()
    started_s = time.perf_counter()
    steps = contender.play(seconds)
    took_s = time.perf_counter() - started_s
    own = time.process_time() - own_before
    workers = cpu_s(children) - workers_before
    return Sample(steps / took_s, own / steps * 1e6, workers / steps * 1e6)


def our_children() -> set[int]:
    """Ids of this process's children."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(word) for task in tasks for word in task.read_text().split()}


def cpu_s(processes: set[int]) -> float:
    """Processor time they have used until now, seconds."""
    return (
        sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in processes) / 1e9
    )


@contextlib.contextmanager
def started(
    make: Callable[[int], Contender], num_envs: int
) -> Iterator[tuple[Contender, set[int]]]:
    """A contender and its children."""
    before = our_children()
    contender = make(num_envs)
    try:
        contender.play(0.2)
        yield contender, our_children() - before
    finally:
        contender.close()


CONTENDERS: dict[str, Callable[[int], Contender]] = {
    "WorkerGroup": Ours,
    "bare pipes": Bare,
    "AsyncVectorEnv": Gymnasium,
}


def overhead(num_envs: int, seconds: float, rounds: int) -> dict[str, list[Sample]]:
    """Samples of every contender, interleaved."""
    samples: dict[str, list[Sample]] = {name: [] for name in CONTENDERS}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(started(make, num_envs)) for name, make in CONTENDERS.items()
        }
        for _ in range(rounds):
            for name, (contender, children) in running.items():
                samples[name].append(measure(contender, children, seconds))
    return samples


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def show_overhead(results: dict[int, dict[str, list[Sample]]]) -> None:
    """A table per number of environments."""
    from rich.console import Console
    from rich.table import Table

    for num_envs, samples in results.items():
        table = Table(title=f"{WORKERS} workers of {num_envs}: median (range)")
        columns = ("", "steps/s", "against bare pipes", "loop cpu, µs/step", "workers cpu, µs/step")
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for name, rounds in samples.items():
            bare = [sample.steps_per_s for sample in samples["bare pipes"]]
            rates, loop_cpu, workers_cpu = (list(column) for column in zip(*rounds, strict=True))
            ratios = [rate / other for rate, other in zip(rates, bare, strict=True)]
            table.add_row(
                name, spread(rates), spread(ratios, 2), spread(loop_cpu, 1), spread(workers_cpu, 1)
            )
        Console().print(table)


def main() -> None:
    """Measure and print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object of all samples")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    parser.add_argument("--fairness", action="store_true", help="two levels, one slow to reset")
    flags = parser.parse_args()
    if flags.fairness:
        import bench_fairness

        bench_fairness.measure_and_print(flags.seconds, flags.rounds, flags.json)
        return
    samples = {n: overhead(n, flags.seconds, flags.rounds) for n in (16, 1)}
    if flags.json:
        rows = {
            n: {name: [s._asdict() for s in rounds] for name, rounds in by_name.items()}
            for n, by_name in samples.items()
        }
        print(json.dumps(rows))
    else:
        show_overhead(samples)


if __name__ == "__main__":
    main()
