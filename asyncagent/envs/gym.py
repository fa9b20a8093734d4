"""Gymnasium's environments, ``gym:<id>``, and the user's own, ``module:callable``.

``module:callable`` is called without arguments, or with ``seed=`` where it takes that, and gives a
``gymnasium.Env`` or an ``Env`` of ours (see ``base``).  Its module is looked for in the current
folder too.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import operator
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from asyncagent.envs.base import Env, EnvRecipe, Outcome, import_engine
from asyncagent.errors import UsageError
from asyncagent.structs import ActionArray, EnvSpec, Nest

PREFIX = "gym:"
_LARGEST = float(np.finfo(np.float32).max)


def check(level_name: str) -> None:
    """UsageError where ``level_name`` is not of the form ``gym:<id>`` or ``module:callable``.

    Imports nothing: whether there is such an environment shows when one is made.
    """
    if level_name.startswith(PREFIX):
        if level_name == PREFIX:
            raise UsageError(f"level_name={level_name!r} lacks the id: give e.g. gym:CartPole-v1")
        return
    dotted = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    if not re.fullmatch(f"{dotted}:{dotted}", level_name):
        raise UsageError(
            f"level_name={level_name!r} must be module:callable, e.g. my_env:MyEnv for the class "
            "MyEnv in ./my_env.py"
        )


def recipe(level_name: str, action_repeats: int) -> EnvRecipe:
    """How a worker makes an environment of the level."""
    options = {"level_name": level_name, "action_repeats": action_repeats}
    return EnvRecipe("asyncagent.envs.gym:make_env", options)


def make_env(*, seed: int, level_name: str, action_repeats: int) -> Env:
    """One environment of the level; ``seed`` in [0, 2**31) determines all its episodes.

    Raises:
      UsageError: gymnasium or what the environment needs is missing, there is no such
        environment, making it raised, or its spaces are not supported. One line.
    """
    check(level_name)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's path begins with its own folder
    try:
        if level_name.startswith(PREFIX):
            return GymEnv(_registered(level_name.removeprefix(PREFIX)), seed, action_repeats)
        env = _call(level_name, seed)
        if isinstance(getattr(env, "spec", None), EnvSpec):
            return _own(env, action_repeats)
        gymnasium = import_engine("gymnasium", "gym")
        if not isinstance(env, gymnasium.Env):
            kind = type(env)
            raise UsageError(
                f"gave {kind.__module__}.{kind.__qualname__}, which is neither a gymnasium.Env nor "
                "has asyncagent's EnvSpec as its spec"
            )
        return GymEnv(env, seed, action_repeats)
    except UsageError as error:
        raise UsageError(f"level_name={level_name!r}: {error}") from error


def _own(env: Any, action_repeats: int) -> Env:
    if env.spec.action_repeats != action_repeats:
        raise UsageError(
            f"its spec says action_repeats={env.spec.action_repeats}: "
            f"give --num_action_repeats={env.spec.action_repeats}, not {action_repeats}"
        )
    own: Env = env
    return own


def _call(level_name: str, seed: int) -> Any:
    module, _, attribute = level_name.partition(":")
    try:
        make = operator.attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise UsageError(f"cannot be imported from {os.getcwd()}: {_brief(error)}") from error
    if not callable(make):
        raise UsageError(f"{attribute} is no callable but {type(make).__name__}")
    try:
        return make(seed=seed) if _takes_seed(make) else make()
    except (Exception, SystemExit) as error:
        raise UsageError(f"calling it raised {_brief(error)}") from error


def _takes_seed(make: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(make).parameters
    except (TypeError, ValueError):  # some callables written in C have none
        return False


def _registered(env_id: str) -> Any:
    """``gymnasium.make`` that knows where Atari games are and fails in one line."""
    gymnasium = import_engine("gymnasium", "gym")
    # Its warnings are for authors of environments, and every worker would repeat them.
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    if env_id.startswith("ALE/"):
        import_engine("ale_py", "ale")
    try:
        return _make(gymnasium, env_id)
    except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound) as error:
        raise UsageError(_hint(env_id, gymnasium.registry)) from error
    except gymnasium.error.Error as error:  # it says what would be right
        raise UsageError(" ".join(str(error).split())) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"making it raised {_brief(error)}") from error


def _make(gymnasium: Any, env_id: str) -> Any:
    with contextlib.suppress(gymnasium.error.UnregisteredEnv):
        return gymnasium.make(env_id, disable_env_checker=True)
    with contextlib.suppress(ImportError):  # which registers Atari's older ids
        importlib.import_module("ale_py")
    return gymnasium.make(env_id, disable_env_checker=True)


def _hint(env_id: str, registered: Iterable[str]) -> str:
    module, colon, name = env_id.rpartition(":")
    names = {known.lower(): known for known in registered}
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.7)
    if near:
        ids = " or ".join(f"{PREFIX}{module}{colon}{names[known]}" for known in near)
        return f"there is no such id: did you mean {ids}?"
    return "no such id: gym:<module>:<id> if importing a module registers it, or module:callable"


def _brief(error: BaseException) -> str:
    """What was raised, and in which line of the user's."""
    installed = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    others = (*installed, __file__, "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(others)]
    where = f" ({os.path.basename(theirs[-1].filename)}:{theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


class GymEnv:
    """A ``gymnasium.Env`` as an ``Env``.

    The first ``reset`` is seeded, later ones are not: episodes differ, and follow from the seed.
    """

    def __init__(self, env: Any, seed: int, action_repeats: int) -> None:
        """Take over ``env``; UsageError where its spaces are not supported."""
        from asyncagent.envs.gym_spaces import actions, observations

        actions_ = actions(env.action_space)
        observations_ = observations(env.observation_space)
        self.spec = EnvSpec(observations_.spec, actions_.space, action_repeats)
        self._env = env
        self._seed: int | None = seed
        self._act = actions_.to_env
        self._read = observations_.from_env

    def reset(self) -> Nest:
        """See ``Env``. Raises ValueError where the answer is not what its space says."""
        seed, self._seed = self._seed, None
        answer = self._env.reset(seed=seed)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError(f"reset must return (observation, info), not {_shown(answer)}")
        return self._read(answer[0])

    def step(self, action: ActionArray) -> Outcome:
        """Repeat ``action`` as often as ``spec`` says, summing rewards, or until the episode ends.

        Raises:
          ValueError: the reward is no finite number, or the observation not what its space says.
        """
        total = 0.0
        for _ in range(self.spec.action_repeats):
            answer = self._env.step(self._act(action))
            if not isinstance(answer, tuple) or len(answer) != 5:
                raise ValueError(
                    "step must return (observation, reward, terminated, truncated, info), "
                    f"not {_shown(answer)}"
                )
            observation, reward, terminated, truncated, _ = answer
            total += _finite(reward)
            if terminated or truncated:
                break
        terminated = bool(terminated)
        return Outcome(
            self._read(observation), total, terminated, bool(truncated) and not terminated
        )

    def close(self) -> None:
        """See ``Env``."""
        self._env.close()


def _finite(reward: Any) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) <= _LARGEST:
        raise ValueError(f"reward must be a finite number, not {reward!r}")
    return value


def _shown(answer: Any) -> str:
    kind = type(answer).__name__
    return f"{kind} of {len(answer)}" if isinstance(answer, tuple) else kind
