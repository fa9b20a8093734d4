"""The worker process of a ``WorkerGroup``: hosts its environments and steps them row by row.

Run as ``python -m asyncagent.envs.worker NAME MEMORY REQUESTS ANSWERS LIFELINE``, the last four
being file descriptors: the memory and the pipes of ``shared``, and a pipe that nobody writes to and
that closes with the program.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from asyncagent.envs.base import Env, EnvRecipe
from asyncagent.envs.shared import (
    EVENTS,
    MAX_MESSAGE,
    MAX_REASON,
    MESSAGE,
    ONLY_LOST,
    ROW,
    Doing,
    Hello,
    Mark,
    SharedArrays,
    SharedRow,
    arrays_in,
    encode_message,
    marks_in,
    next_seed,
    spec_to_json,
    write_message,
)
from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, EnvSpec, Nest

Losses: TypeAlias = list[tuple[int, str]]
"""Index and reason of environments that failed."""

GUARD = "read _; sleep 3; kill -KILL 0"
"""Shell words of the guard, which reads the lifeline: once the program is gone, however it went,
the worker has three seconds to close its environments, then everything in its process group goes,
engines' own processes included, whatever call they are in."""

_ARRAYS = (np.ndarray, np.generic)

_LARGEST = float(np.finfo(np.float32).max)


class Hosted:
    """The environments of this process, in next-step form."""

    def __init__(
        self,
        make: Callable[..., Env],
        seeds: Sequence[int],
        spec: EnvSpec,
        arrays: SharedArrays,
        marks: npt.NDArray[np.uint64],
    ) -> None:
        """Make nothing yet: ``advance`` does.

        Args:
          make: ``make(seed=...)`` gives an environment.
          seeds: one per environment.
          spec: what the environments must be like.
        """
        self._make = make
        self._seeds = list(seeds)
        self._spec = spec
        self._actions = arrays.actions
        self._marks = marks.data
        self._envs: list[Env | None] = [None] * len(seeds)
        self._ended = [True] * len(seeds)
        self._made = [False] * len(seeds)
        self._return = [0.0] * len(seeds)
        self._steps = [0] * len(seeds)
        self._slots = [Slot(row, spec) for row in arrays.rows]

    def advance(self, request: int) -> tuple[bytes, Losses]:
        """Write the row that is asked for; returns ``ROW`` or ``EVENTS``, and what was lost.

        Raises UsageError if the maker does, or makes something else than the spec says.
        """
        index = request % ONLY_LOST
        slot, before = self._slots[index], self._slots[index - 1]
        todo: Sequence[int] = range(len(self._envs))
        if request >= ONLY_LOST:
            todo = np.flatnonzero(slot.flags[3]).tolist()
        elif slot.has_events:
            slot.flags[:] = False
            slot.has_events = False
        actions = self._actions.copy()
        marks, ended = self._marks, self._ended
        marks[Mark.DOING] = Doing.STEPPING
        losses: Losses = []
        for i in todo:
            marks[Mark.ENV] = i
            try:
                if ended[i]:
                    self._begin(i, slot)
                else:
                    self._step(i, slot, before, actions[i])
            except UsageError:
                raise
            except BaseException as error:
                losses.append((i, self._lose(i, slot, error)))
        marks[Mark.DOING] = Doing.NOTHING
        return EVENTS if slot.has_events else ROW, losses

    def close(self) -> None:
        """Let every engine go."""
        for i, env in enumerate(self._envs):
            self._marks[Mark.ENV] = i
            self._close(env)

    def _begin(self, i: int, slot: Slot) -> None:
        env = self._envs[i]
        if env is None:
            self._slow(Doing.MAKING)
            try:
                env = self._make(seed=self._seeds[i])
            except UsageError as error:
                if self._made[i]:
                    # It could be made before, so this is no fault of the request.
                    raise RuntimeError(str(error)) from error
                raise
            self._envs[i] = env
            self._made[i] = True
            if env.spec != self._spec:
                raise UsageError(f"an environment's spec is {env.spec}, not {self._spec}")
        self._slow(Doing.RESETTING)
        try:
            observation = env.reset()
        except UsageError as error:
            raise RuntimeError(str(error)) from error
        slot.writers[i].write(observation)
        self._marks[Mark.DOING] = Doing.STEPPING
        self._return[i] = 0.0
        self._steps[i] = 0
        self._ended[i] = False
        slot.begins(i)

    def _step(self, i: int, slot: Slot, before: Slot, action: Any) -> None:
        env = self._envs[i]
        assert env is not None
        try:
            observation, reward, terminated, truncated, score = env.step(action)
        except UsageError as error:
            raise RuntimeError(str(error)) from error
        score = reward if score is None else score
        if not (abs(reward) <= _LARGEST and abs(score) <= _LARGEST):
            raise ValueError(
                f"reward and score must be finite in float32, not {reward} and {score}"
            )
        slot.reward[i] = reward
        self._return[i] += score
        self._steps[i] += 1
        if observation is not None:
            slot.writers[i].write(observation)
        elif terminated or truncated:
            slot.writers[i].repeat(before.writers[i])
        else:
            raise ValueError("a step within an episode must show an observation")
        if terminated or truncated:
            self._ended[i] = True
            slot.ends(i, bool(terminated), self._return[i], self._steps[i])

    def _lose(self, i: int, slot: Slot, error: BaseException) -> str:
        """Give environment i up; its replacement is made with the next row."""
        traceback.print_exception(error)
        env, self._envs[i] = self._envs[i], None
        self._close(env)
        self._marks[Mark.DOING] = Doing.STEPPING
        self._seeds[i] = next_seed(self._seeds[i])
        self._ended[i] = True
        slot.loses(i)
        return f"{type(error).__name__}: {error}"

    def _close(self, env: Env | None) -> None:
        if env is None:
            return
        self._slow(Doing.CLOSING)
        try:
            env.close()
        except BaseException:
            traceback.print_exc()

    def _slow(self, doing: int) -> None:
        self._marks[Mark.CALLS] += 1
        self._marks[Mark.DOING] = doing


class Slot:
    """The place of one row, as the worker writes it."""

    def __init__(self, row: SharedRow, spec: EnvSpec) -> None:
        self.reward: Any = row.reward.data
        self.flags = row.flags
        self.has_events = False
        """Some flag is True."""
        self.writers = [
            ObservationWriter(spec.observation, row.observation, i) for i in range(len(row.reward))
        ]
        self._row = row

    def begins(self, i: int) -> None:
        """Environment i shows the first observation of an episode."""
        self.reward[i] = 0.0
        self.flags[:, i] = (False, False, True, False)
        self.has_events = True

    def ends(self, i: int, terminated: bool, game_return: float, game_steps: int) -> None:
        """Environment i shows the last one."""
        self.flags[:, i] = (terminated, not terminated, False, False)
        self._row.game_return[i] = game_return
        self._row.game_steps[i] = game_steps
        self.has_events = True

    def loses(self, i: int) -> None:
        """Environment i is no more."""
        self.reward[i] = 0.0
        self.flags[:, i] = (False, False, False, True)
        self.writers[i].clear()
        self.has_events = True


class ObservationWriter:
    """Writes one environment's observation into one row, if it is as the spec says."""

    def __init__(self, spec: Nest, rows: Nest, index: int) -> None:
        self._is_dict = isinstance(spec, dict)
        self._leaves = (
            {name: LeafWriter(name, spec[name], rows[name][index, ...]) for name in spec}
            if self._is_dict
            else {"": LeafWriter("", spec, rows[index, ...])}
        )
        self.write = self._write_dict if self._is_dict else self._leaves[""].write
        """Of an observation; ValueError says what was expected and what came."""

    def _write_dict(self, observation: Nest) -> None:
        if not isinstance(observation, dict) or observation.keys() != self._leaves.keys():
            names = list(self._leaves)
            raise ValueError(f"observation must be a dict of {names}, not {observation}")
        for name, leaf in self._leaves.items():
            leaf.write(observation[name])

    def repeat(self, other: ObservationWriter) -> None:
        """Write what ``other`` wrote."""
        for name, leaf in self._leaves.items():
            leaf.target[...] = other._leaves[name].target

    def clear(self) -> None:
        """Write zeros."""
        for leaf in self._leaves.values():
            leaf.target[...] = 0


class LeafWriter:
    """Writes one array of an observation."""

    def __init__(self, name: str, spec: ArraySpec, target: npt.NDArray[Any]) -> None:
        self.target = target
        self._name = name
        self._shape = spec.shape
        self._dtype = np.dtype(spec.dtype)

    def write(self, value: Any) -> None:
        """ValueError unless it is an array as the spec says."""
        if not isinstance(value, _ARRAYS):
            came = type(value).__name__
        elif value.shape != self._shape or value.dtype != self._dtype:
            came = f"{value.dtype} {list(value.shape)}"
        else:
            self.target[...] = value
            return
        what = f"observation {self._name!r}" if self._name else "observation"
        expected = f"{self._dtype} {list(self._shape)}"
        raise ValueError(f"{what} must be an array, {expected}, not {came}")


def find_maker(recipe: EnvRecipe) -> Callable[..., Env]:
    """``make(seed=...)`` of the recipe; UsageError if there is no such function."""
    module_name, _, function_name = recipe.maker.partition(":")
    try:
        function: Callable[..., Env] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{recipe.maker!r} is no module:function to import: {error}") from error
    return lambda seed: function(seed=seed, **recipe.options)


def main(name: str, *descriptors: str) -> None:
    """Serve until nobody can ask for a row any more."""
    memory_fd, requests, answers, lifeline = map(int, descriptors)
    for descriptor in (memory_fd, requests, answers, lifeline):
        os.set_inheritable(descriptor, False)
    faulthandler.enable()
    _start_guard(lifeline)
    memory = mmap(memory_fd, 0)
    os.close(memory_fd)
    try:
        _serve(requests, answers, memory)
    except UsageError as error:
        _tell(answers, memory, {"usage_error": str(error)[: MAX_MESSAGE // 8]})
    except BrokenPipeError:
        pass  # the program has gone in the middle of a row


def _start_guard(lifeline: int) -> None:
    os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", GUARD],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, lifeline, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
    )
    os.close(lifeline)


def _serve(requests: int, answers: int, memory: mmap) -> None:
    hello = Hello.read(memory)
    os.nice(hello.niceness)
    if hello.core is not None:
        os.sched_setaffinity(0, {hello.core})
    make = find_maker(hello.recipe)
    marks = marks_in(memory)
    if hello.spec is None:
        marks[Mark.DOING] = Doing.MAKING
        env = make(seed=hello.seeds[0])
        _tell(answers, memory, {"spec": spec_to_json(env.spec)})
        env.close()
        return
    arrays = arrays_in(memory, hello.spec, len(hello.seeds))
    hosted = Hosted(make, hello.seeds, hello.spec, arrays, marks)
    try:
        while request := os.read(requests, 1):
            answer, losses = hosted.advance(request[0])
            if losses:
                _tell(answers, memory, {"losses": _told(losses)})
            else:
                os.write(answers, answer)
    finally:
        hosted.close()


def _told(losses: Losses) -> Losses:
    """With reasons of one line, which leave room for all."""
    width = min(MAX_REASON, MAX_MESSAGE // (8 * len(losses)))
    return [(i, " ".join(reason.split())[:width]) for i, reason in losses]


def _tell(answers: int, memory: mmap, words: dict[str, Any]) -> None:
    write_message(memory, encode_message(words))
    os.write(answers, MESSAGE)


if __name__ == "__main__":
    main(*sys.argv[1:])
