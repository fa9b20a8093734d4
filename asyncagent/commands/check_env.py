"""``asyncagent check-env``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop
from rich.console import Console
from rich.text import Text

from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.envs import env_spec, levels_of, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import ActorLost, UsageError
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    Episode,
    MultiDiscrete,
    Nest,
)

DESCRIPTION = """Make one environment of --level_name as a run would, step it with random
actions, and print what it shows, how fast it is, and what is wrong.

asyncagent check-env <level> is short for --level_name=<level>. Exit status: 0 good, 1 something
is wrong, 2 bad input. The other flags are train's."""

SLOW_STEP_S = 0.1
"""A median step beyond this is called wrong."""


@dataclass(frozen=True)
class CheckFlags(Config):
    """Train's flags, of which those of the environments count, and two more."""

    num_steps: int = 200
    """Steps to take."""
    test: bool = False
    """Play as asyncagent test does.

    DMLab: the levels held out for testing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("num_steps", self.num_steps >= 1, ">= 1")


def main(arguments: Sequence[str]) -> int:
    """Parse the flags and check each level; returns the exit status."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--level_name={arguments[0]}", *arguments[1:]]
    flags = parse_env_flags(
        CheckFlags, arguments, level_name=Config.level_name,
        prog="asyncagent check-env", description=DESCRIPTION,
    )  # fmt: skip
    problems = 0
    try:
        with Console(stderr=True).status(Text(f"making {flags.level_name}")):
            spec = env_spec(flags)
    except ActorLost as error:
        print(f"WRONG    {error}")
        return 1
    for level_name in levels_of(flags.level_name):
        report = Report(spec)
        print(f"level    {level_name}", flush=True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_check(flags, level_name, report))
        for line in report.lines():
            print(line)
        problems += len(report.problems)
    return int(problems > 0)


async def _check(flags: CheckFlags, level_name: str, report: Report) -> None:
    """Play, and fill ``report``, also with what the environment dies of."""
    group: EnvGroup | None = None
    try:
        started_s = time.perf_counter()
        group = make_group(
            flags, level_name=level_name, num_envs=1, first_env_index=0, seed=flags.seed,
            test=flags.test,
        )  # fmt: skip
        report.add(await group.reset(), time.perf_counter() - started_s, opening=True)
        rng = np.random.default_rng(flags.seed)
        for _ in range(flags.num_steps):
            action = random_action(group.spec.actions, rng)
            started_s = time.perf_counter()
            row = await group.step(action)
            report.add(row, time.perf_counter() - started_s)
    except UsageError:
        raise
    except Exception as error:
        report.problem(f"{type(error).__name__}: {error}")
    finally:
        if group is not None:
            await group.close()


def random_action(space: ActionSpace, rng: np.random.Generator) -> ActionArray:
    """One action for a group of one environment, [1, ...]: uniform choices, normal numbers."""
    match space:
        case Discrete():
            return rng.integers(space.num_actions, size=1)
        case MultiDiscrete():
            return rng.integers(space.sizes, size=(1, len(space.sizes)))
        case Box():
            return rng.standard_normal((1, space.num_dims), np.float32)


class Report:
    """What the rows of one environment show, and what is wrong with them."""

    def __init__(self, spec: EnvSpec) -> None:
        self.problems: list[str] = []
        self._spec = spec
        leaves = spec.observation if isinstance(spec.observation, dict) else {"": spec.observation}
        self._leaves = {name: LeafReport(name, leaf) for name, leaf in leaves.items()}
        self._was_lost = False
        self._making_s = 0.0
        self._reset_s: list[float] = []
        self._step_s: list[float] = []
        self._rewards: list[float] = []
        self._episodes: list[Episode] = []

    def problem(self, text: str) -> None:
        """Something is wrong; told once, however often it is found."""
        if text not in self.problems:
            self.problems.append(text)

    def add(self, row: EnvStep, time_s: float, opening: bool = False) -> None:
        """One row, and the seconds it took; ``opening``: with the environment's making."""
        for loss in row.losses:
            self.problem(f"lost, and made anew: {loss.reason} (seed {loss.seed})")
        self._episodes += row.episodes
        was_lost, self._was_lost = self._was_lost, bool(row.lost[0])
        if self._was_lost:
            return
        if opening:
            self._making_s = time_s
        elif not row.first[0]:
            self._step_s.append(time_s)
            self._rewards.append(float(row.reward[0]))
        elif not was_lost:  # that reset comes with the making of the replacement
            self._reset_s.append(time_s)
        if not np.isfinite(row.reward).all():
            self.problem(f"a reward is {row.reward[0]}")
        observation = row.observation
        if not isinstance(observation, dict):
            observation = {"": observation}
        if observation.keys() != self._leaves.keys():
            self.problem(f"it shows {sorted(observation)}, not {sorted(self._leaves)}")
            return
        for name, leaf in self._leaves.items():
            leaf.add(observation[name])

    def lines(self) -> list[str]:
        """The report; what is wrong comes last. To be asked for when all rows are in."""
        for leaf in self._leaves.values():
            for text in leaf.problems():
                self.problem(text)
        if self._step_s and np.median(self._step_s) > SLOW_STEP_S:
            self.problem(f"steps take longer than {SLOW_STEP_S:g} s: actors will wait for them")
        held = self._spec.action_repeats
        lines = [f"shows    {leaf}" for leaf in self._leaves.values()]
        frames = "a frame" if held == 1 else f"{held} frames"
        lines.append(f"actions  {self._spec.actions}, each held for {frames}")
        lines.append(f"rewards  {self._describe_rewards()}")
        lines.append(f"episodes {self._describe_episodes()}")
        lines.append(f"made     in {self._making_s:.2f} s, first reset included")
        lines.append(f"resets   {_times(self._reset_s)}")
        lines.append(f"steps    {_times(self._step_s)}{self._speed()}")
        lines += [f"WRONG    {text}" for text in self.problems] or ["good     nothing is wrong"]
        return lines

    def _speed(self) -> str:
        if not self._step_s:
            return ""
        stepping = len(self._step_s) / sum(self._step_s)
        whole = len(self._step_s) / (sum(self._step_s) + sum(self._reset_s))
        return f"; {stepping:,.0f} steps/s, resets included {whole:,.0f}"

    def _describe_rewards(self) -> str:
        if not self._rewards:
            return "none seen"
        rewards = np.array(self._rewards)
        return (
            f"{rewards.min():g} ... {rewards.max():g}, {np.count_nonzero(rewards)} of "
            f"{len(rewards)} not 0"
        )

    def _describe_episodes(self) -> str:
        if not self._episodes:
            return "none ended within these steps"
        returns = [episode.episode_return for episode in self._episodes]
        steps = [episode.steps for episode in self._episodes]
        cut = sum(episode.truncated for episode in self._episodes)
        return (
            f"{len(steps)} ended ({cut} by a time limit), of {min(steps)} ... {max(steps)} steps, "
            f"returns {min(returns):g} ... {max(returns):g}"
        )


class LeafReport:
    """One array of the observation over all rows."""

    def __init__(self, name: str, spec: ArraySpec) -> None:
        self._name = f"{name} " if name else ""
        self._spec = spec
        self._rows = 0
        self._first: npt.NDArray[Any] | None = None
        self._constant = True
        self._min = np.inf
        self._max = -np.inf
        self._problems: dict[str, None] = {}

    def add(self, rows: Nest) -> None:
        """One row of a group of one environment, [1, ...]."""
        shape = (1, *self._spec.shape)
        if (
            not isinstance(rows, np.ndarray)
            or rows.shape != shape
            or rows.dtype != self._spec.dtype
        ):
            came = f"{getattr(rows, 'dtype', type(rows).__name__)} {list(np.shape(rows)[1:])}"
            self._wrong(f"is {came}, not {self._spec.dtype} {list(self._spec.shape)}")
            return
        self._rows += 1
        if rows.size == 0:
            return
        low, high = float(rows.min()), float(rows.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            self._wrong("has numbers that are not finite")
            return
        if self._spec.num_tokens and not 0 <= low <= high <= self._spec.num_tokens:
            self._wrong(f"has tokens {low:g} ... {high:g} beyond 0 ... {self._spec.num_tokens}")
        self._min, self._max = min(self._min, low), max(self._max, high)
        if self._first is None:
            self._first = rows.copy()
        self._constant = self._constant and np.array_equal(self._first, rows)

    def problems(self) -> list[str]:
        """What is wrong with it."""
        # Many an instruction never changes, and most levels have none.
        if self._rows > 1 and self._constant and not self._spec.num_tokens:
            self._wrong("never changes")
        return list(self._problems)

    def _wrong(self, text: str) -> None:
        self._problems[f"observation {self._name}{text}"] = None

    def __str__(self) -> str:
        what = f"{self._name}{self._spec.dtype} {list(self._spec.shape)}"
        if self._max < self._min:
            return f"{what}, nothing seen"
        if self._spec.num_tokens and self._max == 0:
            return f"{what}, no words"
        return f"{what}, {self._min:g} ... {self._max:g}"


def _times(seconds: list[float]) -> str:
    if not seconds:
        return "none"
    median, late = np.percentile(seconds, (50, 99))
    return (
        f"{len(seconds)}, median {_ms(median)}, 99% below {_ms(late)}, longest {_ms(max(seconds))}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:{',.0f' if seconds > 0.1 else '.3g'}} ms"
