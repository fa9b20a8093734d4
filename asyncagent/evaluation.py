"""A checkpoint's policy put to the test: fresh games of every level, and what they come to."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import uvloop

from asyncagent.batcher import DynamicBatcher
from asyncagent.checkpoint import NEWEST, choose_checkpoint
from asyncagent.config import Config, family_of
from asyncagent.envs import atari, dmlab, env_spec, levels_of, make_group, usable_spec
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.dmlab30 import testing_level
from asyncagent.envs.scratch import sweep
from asyncagent.errors import UsageError
from asyncagent.games import Job, Played, plan, play
from asyncagent.models import load_weights, make_net
from asyncagent.placement import cores
from asyncagent.policy import Policy, resolve_device, resolve_precision
from asyncagent.scores import (
    DMLAB30,
    Dmlab30Scores,
    atari_human_normalised,
    dmlab30_human_normalised,
    dmlab30_score,
)
from asyncagent.structs import EnvSpec, Episode
from asyncagent.tasks import first_of
from asyncagent.video import Camera, Recorder
from asyncagent.watchdog import Watchdog

SEED_OFFSET = 1_000_003
"""Added to the run's seed, so that test games are not the ones the agent was trained on."""

OVERRIDES = ("level_name", "dataset_path", "level_cache", "renderer")
"""Flags of a run that a test may replace by its own."""


class LevelResult(NamedTuple):
    """Whole games played on one level."""

    level_name: str
    """As the policy learned it."""
    test_level_name: str
    """As it was played: DMLab-30 tests some levels on a counterpart that is never trained on."""
    returns: tuple[float, ...]
    """Undiscounted and unclipped, one per game."""
    steps: tuple[int, ...]
    """Agent steps, one per game."""
    truncated: tuple[bool, ...]
    """A time limit ended it; one per game."""
    action_repeats: int
    env_losses: int
    """Environments that crashed or hung; the games lost with them were played again."""
    video: str | None = None
    """Path of the mp4, if a game was filmed."""

    @property
    def frames(self) -> tuple[int, ...]:
        """Agent steps times action repeats, one per game."""
        return tuple(steps * self.action_repeats for steps in self.steps)

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def spread(self) -> float:
        """Standard deviation of the returns."""
        return float(np.std(self.returns))

    @property
    def human_normalised(self) -> float | None:
        """Score of the mean return: 0 is random, 100 human; None where no figures are known."""
        if self.level_name.startswith(atari.PREFIX):
            return atari_human_normalised(atari.game_of(self.level_name), self.mean)
        return dmlab30_human_normalised(self.level_name, self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Every game and what sums them up, as JSON takes it."""
        summary = {
            "level_name": self.level_name,
            "test_level_name": self.test_level_name,
            "num_episodes": len(self.returns),
            "mean": _finite(self.mean),
            "std": _finite(self.spread),
            "min": _finite(min(self.returns)),
            "max": _finite(max(self.returns)),
            "frames_mean": float(np.mean(self.frames)),
            "truncated_share": float(np.mean(self.truncated)),
            "human_normalised": self.human_normalised,
        }
        games = {"returns": [_finite(value) for value in self.returns], "frames": self.frames}
        return summary | self._asdict() | games


class Evaluation(NamedTuple):
    """Whole games played with one checkpoint."""

    frames: int
    """Frames the checkpoint was trained for."""
    seed: int
    """Of environments and sampling."""
    greedy: bool
    benchmark_mode: bool
    """The training's games were played at random, not by its policy."""
    levels: tuple[LevelResult, ...]
    """In the order of the level list; of each as many games."""
    checkpoint: str = ""
    """Name of its file."""

    @property
    def returns(self) -> tuple[float, ...]:
        """Of all games, level after level."""
        return tuple(value for level in self.levels for value in level.returns)

    @property
    def mean(self) -> float:
        """Mean return of all games; of several levels it says little."""
        return float(np.mean(self.returns))

    @property
    def spread(self) -> float:
        """Standard deviation of all games' returns."""
        return float(np.std(self.returns))

    @property
    def dmlab30(self) -> Dmlab30Scores | None:
        """The suite's scores; None unless exactly its 30 levels were played."""
        returns = {level.level_name: level.returns for level in self.levels}
        if set(returns) != set(DMLAB30):
            return None
        return Dmlab30Scores(dmlab30_score(returns, None), dmlab30_score(returns, 100.0))

    def to_json(self) -> str:
        """An indented JSON object with every game of every level."""
        values = self._asdict() | {
            "dmlab30": None if self.dmlab30 is None else self.dmlab30._asdict(),
            "levels": [level.to_dict() for level in self.levels],
        }
        return json.dumps(values, indent=2) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(
    logdir: str | Path,
    num_episodes: int,
    *,
    checkpoint: str = NEWEST,
    greedy: bool = False,
    seed: int | None = None,
    device: str = "auto",
    video: bool = False,
    camera: Callable[[str, int, EnvSpec], Camera | None] | None = None,
    on_episode: Callable[[Episode, int], None] = lambda episode, left: None,
    **flags: Any,
) -> Evaluation:
    """Play ``num_episodes`` whole games per level with a checkpoint in ``logdir``.

    Args:
      checkpoint: ``newest``, ``best`` or the name of a file.
      greedy: take the likeliest action; otherwise actions are sampled, as in training.
      seed: of environments and sampling; by default the run's seed plus SEED_OFFSET.
      video: film a game of every level (see ``video.Recorder``) into ``<logdir>/video``.
      camera: makes what looks on of a level's name, the frames trained for and the spec; games are
        then played one after another, each level's in one environment.
      on_episode: called with each counted game as it ends, and how many are still to play.
      flags: in place of the run's own, any of OVERRIDES.

    Raises:
      UsageError: num_episodes < 1, an impossible seed or flag, a level that does not fit the
        policy, or one without a picture to film.
      CheckpointError: no such checkpoint there, or none that can be read.
      ActorLost: environments of a level failed again and again.
      Stalled: environments or inference stopped answering.
    """
    if num_episodes < 1:
        raise UsageError(f"test_num_episodes={num_episodes} must be >= 1")
    if seed is not None and not 0 <= seed < 2**31:
        raise UsageError(f"seed={seed} must be in [0, 2**31)")
    unknown = set(flags) - set(OVERRIDES)
    if unknown:
        raise TypeError(f"a test cannot replace {', '.join(sorted(unknown))}")
    logdir = Path(logdir)
    path, state = choose_checkpoint(logdir, checkpoint)
    learned = Config.from_json(state["config"], path)
    config = dataclasses.replace(learned, **flags)
    levels = tuple(dict.fromkeys(levels_of(config.level_name)))
    for level in filter(dmlab.is_dmlab, levels):  # before games of the others are played for hours
        dmlab.check_level(testing_level(level), config.dataset_path, test=True)
    spec = _checked_spec(learned, config)
    frames = int(state["frames"])
    seed = (config.seed + SEED_OFFSET) % 2**31 if seed is None else seed
    policy = _policy(config, spec, state["net"], device, seed, greedy)
    max_envs, num_lanes = _limits(config) if camera is None else (1, 1)
    jobs = plan(levels, num_episodes, max_envs, num_lanes)
    if camera is not None:
        jobs = [job._replace(recorder=camera(job.level_name, frames, spec)) for job in jobs]
    elif video:
        jobs = [_filmed(job, logdir / "video", frames, spec) for job in jobs]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            played = runner.run(_play(config, policy, jobs, num_lanes, seed, on_episode))
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
    results = _results(jobs, played, spec)
    return Evaluation(frames, seed, greedy, config.benchmark_mode, results, path.name)


def _checked_spec(learned: Config, config: Config) -> EnvSpec:
    """Of the level to be played; UsageError unless it is that of the level learned."""
    spec = usable_spec(config)
    if config.level_name != learned.level_name:
        before = env_spec(learned)
        for name in ("observation", "actions", "action_repeats"):
            new, old = getattr(spec, name), getattr(before, name)
            if new != old:
                raise UsageError(
                    f"level_name={config.level_name!r} does not fit a policy that learned "
                    f"{learned.level_name}: its {name} is {new}, not {old}"
                )
    return spec


def _policy(
    config: Config, spec: EnvSpec, weights: dict[str, Any], device_name: str, seed: int,
    greedy: bool,
) -> Policy:  # fmt: skip
    torch.set_num_threads(1)
    device = resolve_device(device_name)
    dtype = resolve_precision(config.precision, device)
    net = make_net(config.net, spec, config.use_lstm, config.seed)
    load_weights(net, weights)
    return Policy(net, spec.actions, device, dtype, seed, config.inference_threads, greedy)


def _limits(config: Config) -> tuple[int, int]:
    """(environments of a level, groups alive at a time).

    A pool's emulators step at once: one pool steps while the other's actions are computed.  A
    worker process steps one environment after another, and each takes some 100 MB in DMLab.
    """
    if family_of(config.level_name) in ("atari", "small"):
        return 64, 2
    return 16, min(16, max(2, cores()))


def _filmed(job: Job, folder: Path, frames: int, spec: EnvSpec) -> Job:
    """The job, with a recorder where it is the first of its level."""
    if job.first_env_index > 0:
        return job
    return job._replace(recorder=Recorder(folder, job.level_name, frames, spec))


async def _play(
    config: Config, policy: Policy, jobs: list[Job], num_lanes: int, seed: int,
    on_episode: Callable[[Episode, int], None],
) -> list[Played]:  # fmt: skip
    def make(job: Job) -> EnvGroup:
        return make_group(
            config,
            level_name=job.level_name,
            num_envs=len(job.quotas),
            first_env_index=job.first_env_index,
            seed=seed,
            name=f"{job.level_name}-{job.first_env_index}",
            test=True,
        )

    batcher = DynamicBatcher(policy.infer)
    playing = play(
        jobs,
        make,
        batcher,
        policy.initial_state,
        num_lanes=num_lanes,
        stall_timeout_s=config.stall_timeout_s,
        on_episode=on_episode,
    )
    with Watchdog(config.stall_timeout_s) as watchdog:
        try:
            return await watchdog.during(playing, dict)
        finally:
            batcher.close()
            sweep()


def _results(jobs: list[Job], played: list[Played], spec: EnvSpec) -> tuple[LevelResult, ...]:
    results = []
    for level in dict.fromkeys(job.level_name for job in jobs):
        mine = [
            (job, of_job)
            for job, of_job in zip(jobs, played, strict=True)
            if job.level_name == level
        ]
        episodes = [episode for _, of_job in mine for episode in of_job.episodes]
        films = [str(job.recorder.path) for job, _ in mine if isinstance(job.recorder, Recorder)]
        results.append(
            LevelResult(
                level_name=level,
                test_level_name=testing_level(level),
                returns=tuple(episode.episode_return for episode in episodes),
                steps=tuple(episode.steps for episode in episodes),
                truncated=tuple(episode.truncated for episode in episodes),
                action_repeats=spec.action_repeats,
                env_losses=sum(of_job.env_losses for _, of_job in mine),
                video=films[0] if films else None,
            )
        )
    return tuple(results)
