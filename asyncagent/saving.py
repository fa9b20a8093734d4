"""A run's saving and resuming: what is written when, what stays, and what may change in between."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from asyncagent.checkpoint import BEST, read_best_return, save_checkpoint, write_state
from asyncagent.config import IDENTITY_FLAGS, LEARNING_FLAGS, Config
from asyncagent.errors import CheckpointError
from asyncagent.files import Attempts, replace_text
from asyncagent.learner import Learner
from asyncagent.metrics import MIN_GAMES
from asyncagent.optim import linear_learning_rate
from asyncagent.policy import Policy

RETRY_S = 60.0
"""A save that failed is tried again after so many seconds, or after the usual interval."""

_log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints and config.json; a disk that fails does not end the run.

    ``begin`` is for the loop's thread, before anything runs, all else for one thread of files.
    """

    def __init__(self, config: Config, logdir: Path) -> None:
        """Reads the best checkpoint there is, for what it has to be measured by."""
        self.num_saves = 0
        """Checkpoints written, in all sessions of the run together."""
        self._config = config
        self._logdir = logdir
        self._saving = Attempts(logdir / "checkpoint_*.pt")
        self._best_saving = Attempts(logdir / BEST)
        self._recording = Attempts(logdir / "config.json")
        self._recorded = ""
        self._best = read_best_return(logdir)

    @property
    def failure(self) -> str:
        """Why the last checkpoint could not be written; empty if it was."""
        return self._saving.failure

    @property
    def wait_s(self) -> float:
        """Seconds until the next save."""
        interval_s = self._config.checkpoint_interval_s
        return min(interval_s, RETRY_S) if self.failure else interval_s

    def begin(self) -> None:
        """Record the configuration."""
        self._record(self._config)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint, and the best one if it is.

        Args:
          state: what a checkpoint holds (see ``checkpoint.save_checkpoint``), but for the
            configuration; ``counters`` as ``Counters.state`` says, ``episode_return_mean``.
        """
        config = dataclasses.replace(self._config, override="")
        number = self.num_saves + 1
        state = {**state, "config": config.to_json(), "num_saves": number}
        every = config.keep_every
        for_good = every > 0 and number % every == 0

        def save() -> None:
            save_checkpoint(self._logdir, state, config.keep_checkpoints, for_good)

        if not self._saving.make(save):
            return
        self.num_saves = number
        self._record(config)  # what was overridden is now as recorded
        mean = state["episode_return_mean"]
        if len(state["counters"]["episodes"]) < MIN_GAMES:
            return
        if self._best is not None and not mean > self._best:
            return
        if self._best_saving.make(lambda: write_state(self._logdir / BEST, state)):
            self._best = mean

    def _record(self, config: Config) -> None:
        path, text = self._logdir / "config.json", config.to_json()
        if text == self._recorded and path.exists():
            return
        if self._recording.make(lambda: replace_text(path, text)):
            self._recorded = text


def resume(
    config: Config, path: Path, state: dict[str, Any], learner: Learner, policy: Policy
) -> float:
    """Restore learner and policy from a checkpoint; returns the seconds of training behind it.

    CheckpointError, which says what differs, where the checkpoint is of another agent, or where
    flags changed that decide what is learned and ``config.override`` does not name them.
    """
    before = Config.from_json(state["config"], path)
    _check_fits(before, config, path)
    learner.restore(state)
    if state["policy_device"] == policy.device.type:
        policy.set_generator_state(state["policy_generator"])
    else:
        _log.warning("%s is from another kind of device: action sampling starts anew", path)
    rate = linear_learning_rate(
        before.learning_rate, learner.frames, before.total_environment_frames
    )
    if learner.learning_rate != rate:
        _log.warning(
            "the learning rate goes on at %.3g, not at %.3g: learning_rate or "
            "total_environment_frames differ from those of the checkpoint",
            learner.learning_rate,
            rate,
        )
    return float(state["time_s"])


def _check_fits(before: Config, config: Config, path: Path) -> None:
    other = _differences(before, config, IDENTITY_FLAGS)
    if other:
        raise CheckpointError(
            f"{path} is of a run with {'; '.join(other.values())}: use another --logdir"
        )
    changed = _differences(before, config, LEARNING_FLAGS)
    named = set(filter(None, config.override.split(",")))
    if changed and not set(changed) <= named:
        raise CheckpointError(
            f"{path} was learned with {'; '.join(changed.values())}: leave them as they were, "
            f"change them on purpose with --override={','.join(changed)}, or use another --logdir"
        )
    for difference in changed.values():
        _log.warning("override: the run was learned with %s from here", difference)


def _differences(before: Config, config: Config, names: tuple[str, ...]) -> dict[str, str]:
    """By flag: its old value and its new one, in words."""
    return {
        name: f"{name}={getattr(before, name)!r}, not {getattr(config, name)!r}"
        for name in names
        if getattr(before, name) != getattr(config, name)
    }
