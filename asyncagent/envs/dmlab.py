"""DeepMind Lab: any of its levels as an ``Env``, with the instruction as token numbers.

The module ``deepmind_lab`` is imported in the process that makes an environment, and there only.
What it asks for, and what it answers with when something is not to its taste, decides much here:

- An action is a contiguous ``np.intc`` array of seven numbers (any other strides are misread), a
  seed is a Python int, and what stands in its configuration are strings.
- An episode's end shows no frame: ``observations`` raises as soon as ``is_running`` is False.
- Nothing but the end itself is told: a level's time limit and an end by its rules look the same, so
  every end is taken for one by the rules, as the ancestor took it.
- A method called on a closed environment ends the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from asyncagent.config import Config
from asyncagent.envs import dmlab30
from asyncagent.envs.base import EnvRecipe, Outcome
from asyncagent.envs.instructions import SPEC as INSTRUCTION
from asyncagent.envs.instructions import tokenise
from asyncagent.envs.level_cache import LevelCache
from asyncagent.envs.scratch import scratch_folder
from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, Nest

PREFIX = "dmlab:"
"""``dmlab:<level>`` is DeepMind Lab's level of any name, also one that looks like another's."""

ACTIONS = np.array(
    [
        (0, 0, 0, 1, 0, 0, 0),  # forward
        (0, 0, 0, -1, 0, 0, 0),  # backward
        (0, 0, -1, 0, 0, 0, 0),  # strafe left
        (0, 0, 1, 0, 0, 0, 0),  # strafe right
        (-20, 0, 0, 0, 0, 0, 0),  # look left
        (20, 0, 0, 0, 0, 0, 0),  # look right
        (-20, 0, 0, 1, 0, 0, 0),  # look left and forward
        (20, 0, 0, 1, 0, 0, 0),  # look right and forward
        (0, 0, 0, 0, 1, 0, 0),  # fire
    ],
    np.intc,
)
"""The ancestor's: look left-right and up-down (pixels per frame), strafe, move, fire, jump, crouch.

A row is contiguous: DeepMind Lab would misread one that is not."""

HOLD_OUT = {"allowHoldOutLevels": "true", "mixerSeed": str(0x600D5EED)}
"""What test mode adds to a level's configuration, as the ancestor's."""

RUNFILES = "ASYNCAGENT_DMLAB_RUNFILES"
"""Environment variable: the module's files, where a build does not find them by itself."""

_SUITE = "contributed/dmlab30/"
_NAMES = re.compile(
    r"(contributed|demos|tests)/.+"
    r"|(rooms|language|lasertag|natlab|skymaze|psychlab|explore|nav_maze|seekavoid|lt|stairway)_.+"
)
_NEEDS_DATASET = {"psychlab_arbitrary_visuomotor_mapping", "psychlab_continuous_recognition"}
_MISSING = (
    "deepmind_lab cannot be imported ({}): no package index has it; build a wheel from DeepMind "
    "Lab's sources, or take one you are given, and install it with Python 3.11 (it imports 'imp', "
    "which later ones have not)"
)


def is_dmlab(level_name: str) -> bool:
    """Whether the name by itself says DeepMind Lab: of the suite, of its other levels, or
    ``dmlab:<any name>``."""
    return (
        level_name.startswith(PREFIX)
        or dmlab30.is_suite_level(level_name)
        or _NAMES.fullmatch(level_name) is not None
    )


def spec(width: int, height: int, action_repeats: int) -> EnvSpec:
    """What a policy must know of any level; asks no engine."""
    rgb = ArraySpec((height, width, 3), "uint8")
    return EnvSpec({"rgb": rgb, "instruction": INSTRUCTION}, Discrete(len(ACTIONS)), action_repeats)


def engine_level(level_name: str) -> str:
    """The name by which DeepMind Lab knows the level: the suite's stand in a folder of theirs."""
    name = level_name.removeprefix(PREFIX)
    return _SUITE + name if dmlab30.is_suite_level(name) else name


def check_installed() -> None:
    """UsageError, one line that says how to get it, unless ``deepmind_lab`` is there to import."""
    if importlib.util.find_spec("deepmind_lab") is None:
        raise UsageError(_MISSING.format("it is not installed"))


def check_level(level_name: str, dataset_path: str, *, test: bool) -> None:
    """UsageError for what can be known beforehand: images that are missing, a level held out.

    Whether DeepMind Lab has a level of that name, only making it shows.
    """
    name = engine_level(level_name).removeprefix(_SUITE)
    learnt = dmlab30.training_level(name)
    if learnt != name and not test:
        raise UsageError(f"level_name={level_name!r} is held out for testing: train on {learnt!r}")
    if name not in _NEEDS_DATASET:
        return
    if not dataset_path:
        raise UsageError(
            f"{name} needs the folder of its images (Brady, Konkle, Oliva 2008): give "
            "--dataset_path, or a list of other levels"
        )
    if not Path(dataset_path).expanduser().is_dir():
        raise UsageError(f"dataset_path={dataset_path!r} is no folder; {name} needs its images")


def recipe(level_name: str, config: Config, *, test: bool) -> EnvRecipe:
    """How a worker process makes one environment of the level.

    Args:
      test: play the level that tests this one, with hold-outs and the mixer seed of test mode.

    Raises:
      UsageError: see ``check_level``.
    """
    if test:
        level_name = dmlab30.testing_level(level_name)
    check_level(level_name, config.dataset_path, test=test)
    options = {
        "level": engine_level(level_name),
        "width": config.width,
        "height": config.height,
        "action_repeats": config.num_action_repeats,
        "dataset_path": _absolute(config.dataset_path),
        "renderer": config.renderer,
        "level_cache": _absolute(config.level_cache),
        "level_cache_gb": config.level_cache_gb,
        "test": test,
    }
    return EnvRecipe("asyncagent.envs.dmlab:make_env", options)


def make_env(
    *,
    seed: int,
    level: str,
    width: int,
    height: int,
    action_repeats: int,
    dataset_path: str = "",
    renderer: str = "software",
    level_cache: str = "",
    level_cache_gb: float = 10.0,
    test: bool = False,
) -> DmlabEnv:
    """One environment; the seed of its n-th episode is the n-th number drawn from ``seed``.

    Args:
      level: as DeepMind Lab knows it (see ``engine_level``).
      width, height: of the observation, pixels.
      level_cache: folder of compiled levels; '' keeps none.
      test: allow levels that are held out, and take test mode's mixer seed.

    Raises:
      UsageError: the module cannot be imported, or does not take the level; in one line.
    """
    cache = LevelCache(level_cache, int(level_cache_gb * 1e9)) if level_cache else None
    config = {
        "width": str(width),
        "height": str(height),
        "datasetPath": dataset_path,
        "logLevel": "WARN",
    }
    lab, has_instruction = _make_lab(level, config | (HOLD_OUT if test else {}), renderer, cache)
    return DmlabEnv(lab, spec(width, height, action_repeats), seed, has_instruction, cache)


class DmlabEnv:
    """One environment of DeepMind Lab, as ``Env`` has it.

    The observation is {"rgb": uint8 [height, width, 3], "instruction": int32 [MAX_WORDS]}.
    """

    def __init__(
        self, lab: Any, spec: EnvSpec, seed: int, has_instruction: bool, cache: LevelCache | None
    ) -> None:
        """Take over ``lab``, which shows INSTR if ``has_instruction``, and uses ``cache``."""
        self.spec = spec
        self.level_cache = cache
        self._lab = lab
        self._has_instruction = has_instruction
        self._rng = np.random.default_rng(seed)

    def reset(self) -> Nest:
        """See ``Env``."""
        # A NumPy integer is refused.
        self._lab.reset(seed=int(self._rng.integers(2**31)))
        return self._observation()

    def step(self, action: Any) -> Outcome:
        """See ``Env``; the end row shows nothing."""
        reward = self._lab.step(ACTIONS[int(action)], num_steps=self.spec.action_repeats)
        if self._lab.is_running():
            return Outcome(self._observation(), reward, terminated=False, truncated=False)
        return Outcome(None, reward, terminated=True, truncated=False)

    def close(self) -> None:
        """See ``Env``; harmless when repeated."""
        # Whatever is called on a closed one kills the process: it must be out of reach.
        lab, self._lab = self._lab, None
        if lab is not None:
            lab.close()

    def _observation(self) -> Nest:
        shown = self._lab.observations()
        instruction = shown["INSTR"] if self._has_instruction else ""
        return {"rgb": shown["RGB_INTERLEAVED"], "instruction": tokenise(instruction)}


def _make_lab(
    level: str, config: dict[str, str], renderer: str, cache: LevelCache | None
) -> tuple[Any, bool]:
    """``deepmind_lab.Lab``, and whether it shows INSTR."""
    module = _import_module()

    def make(*observations: str) -> Any:
        return module.Lab(level, list(observations), config, renderer=renderer, level_cache=cache)

    try:
        with scratch_folder():
            try:
                return make("RGB_INTERLEAVED", "INSTR"), True
            except ValueError:
                # An unknown observation: not every level loads the script that shows INSTR.
                return make("RGB_INTERLEAVED"), False
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise UsageError(
            f"DeepMind Lab cannot make level {level!r} ({renderer}): {reason}"
        ) from error


def _import_module() -> Any:
    # Read when the module is loaded: without the rasteriser's threads one process is faster, two
    # on two cores scale, and a fork does not hang.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    try:
        module = importlib.import_module("deepmind_lab")
    except ImportError as error:
        raise UsageError(_MISSING.format(error)) from error
    if runfiles := os.environ.get(RUNFILES):
        module.set_runfiles_path(runfiles)
    return module


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""
