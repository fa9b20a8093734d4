"""What a run tells: counters, and the reports made of them."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from asyncagent.stages import Stages, Verdict
from asyncagent.structs import EnvStep, Episode, Loss

EPISODE_WINDOW = 100
"""Episode means are over the last so many games."""
MIN_GAMES = 30
"""A mean return of fewer games is luck: no checkpoint, and no report, is the best by it."""
MAX_LAG_COUNTED = 127
"""Policy lags are counted one by one up to here."""


class LevelReport(NamedTuple):
    """What one level of a run has given, in all its sessions."""

    queue_columns: int
    """Unroll columns that the queue took in."""
    episodes: int
    """Games ended."""
    episode_return_mean: float
    """Mean of the level's last 100 games."""


class HostReport(NamedTuple):
    """One actor host, since the report before."""

    actors: int
    """Environments."""
    frames_per_s: float
    """Acted."""
    policy_lag_mean: float
    """Updates between acting and arriving."""
    received_bytes_per_s: float
    sent_bytes_per_s: float
    round_trip_ms: float
    reconnects: int
    env_steps: float = math.nan
    """Share of the time that its environments step; mean over its groups, as the next."""
    waits: float = math.nan
    """Share of the time that it waits for the connection, or for the learner to take unrolls."""


class Report(NamedTuple):
    """One line of metrics.jsonl; means and rates are since the line before."""

    time_s: float
    """Seconds of training, all sessions of the run together."""
    frames: int
    """Frames learned from: action repeats times valid rows."""
    frames_per_s: float
    """Learned from."""
    acted_frames_per_s: float
    """Produced by the actors."""
    updates: int
    """Those that were skipped included."""
    updates_per_s: float
    learning_rate: float
    episodes: int
    """Games ended, in all sessions of the run together."""
    env_losses: int
    """Environments lost and replaced, in all sessions together."""
    episode_return_mean: float
    """Whole games, undiscounted and unclipped; mean of the last 100."""
    episode_frames_mean: float
    """Frames per game; mean of the last 100."""
    policy_lag_mean: float
    """Updates between acting and learning."""
    policy_lag_max: int
    inference_batch_mean: float
    """Rows per inference batch."""
    queue_columns: int
    """Unroll columns waiting for the learner."""
    total_loss: float
    policy_gradient_loss: float
    baseline_loss: float
    entropy_loss: float
    """Negative entropy; all losses are sums over a batch."""
    entropy: float
    """Nats per row."""
    grad_norm: float
    """Before clipping."""
    skipped_updates: int
    """Whose loss or gradient was no number, since this session started; in no mean."""
    rho_mean: float
    """Mean importance weight before clipping."""
    dmlab30_no_cap: float
    """DMLab-30: mean human-normalised score of the last episodes of all thirty levels."""
    dmlab30_cap_100: float
    """The same with each level's score cut off at 100."""
    levels: dict[str, LevelReport]
    """By level name: what each level has given so far."""
    hosts: dict[str, HostReport]
    """By name: the actor hosts that are here."""
    hosts_refused: int
    """Requests and connections of actor hosts refused since this session started."""
    messages_rejected: int
    """Messages of actor hosts ignored since then: they were not what was agreed on."""
    loop_lag_ms: float = math.nan
    """How late the event loop ran what was due; mean."""
    stages: Stages = Stages()
    """Where the time went."""
    verdict: Verdict = Verdict()
    """What limits the run."""

    def to_json(self) -> str:
        """One JSON object without line breaks; what is not a number is null."""
        values = self._asdict()
        for field in ("levels", "hosts"):
            parts = getattr(self, field).items()
            values[field] = {name: _finite(part._asdict()) for name, part in parts}
        values["stages"] = _finite(self.stages._asdict())
        values["verdict"] = self.verdict._asdict()
        return json.dumps(_finite(values))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


class HostsReport(NamedTuple):
    """What the bridge has seen of actor hosts."""

    hosts: dict[str, HostReport]
    """By name."""
    refused: int
    """Requests and connections since this session started."""
    rejected: int
    """Messages since then."""


NO_HOSTS = HostsReport({}, 0, 0)


class LearnerStatistics(NamedTuple):
    """Means per update since the last call of ``take_statistics``; nan before the first update."""

    frames: int
    """Frames learned from until now."""
    updates: int
    """Updates until now, those that were skipped included."""
    num_updates: int
    """Updates since the last call that were not skipped."""
    total_loss: float
    policy_gradient_loss: float
    baseline_loss: float
    entropy_loss: float
    grad_norm: float
    """Before clipping."""
    entropy: float
    """Nats per valid row."""
    policy_lag_mean: float
    """Updates between acting and learning, mean over rows."""
    policy_lag_max: int
    rho_mean: float
    """Mean importance weight over valid rows, before any clip."""
    learning_rate: float
    action_counts: Any
    """int64 [A]: how often each action was learned from."""
    skipped_updates: int = 0
    """Updates since this session started whose loss or gradient was no number."""
    policy_lag_counts: Any = 0
    """int64 [MAX_LAG_COUNTED + 1]: rows learned from by their policy lag, the last what is more."""


class _Level:
    """What one level has given so far."""

    def __init__(self) -> None:
        self.columns = 0
        self._episodes = 0
        self._returns: deque[float] = deque(maxlen=EPISODE_WINDOW)

    def add(self, episode: Episode) -> None:
        self._episodes += 1
        self._returns.append(episode.episode_return)

    def report(self) -> LevelReport:
        return LevelReport(self.columns, self._episodes, mean(list(self._returns)))

    def state(self) -> list[Any]:
        return [self.columns, self._episodes, list(self._returns)]

    def restore(self, state: list[Any]) -> None:
        self.columns, self._episodes, returns = state
        self._returns.extend(returns)


class Counters:
    """Counts what actors and learner do and turns it into reports. Belongs to the loop's thread."""

    def __init__(self, action_repeats: int, frames: int, updates: int, time_s: float) -> None:
        """``frames``, ``updates`` and ``time_s`` are those of the checkpoint resumed from."""
        self._action_repeats = action_repeats
        self._acted_frames = 0
        self._episodes: deque[Episode] = deque(maxlen=EPISODE_WINDOW)
        self._new_episodes: deque[Episode] = deque(maxlen=EPISODE_WINDOW)
        self.num_episodes = 0
        self.num_losses = 0
        self._levels: dict[str, _Level] = {}
        self.dmlab30_scores: tuple[float, float] = (math.nan, math.nan)
        """The newest, uncapped and capped at 100."""
        self._time_before_s = time_s
        self._started_s = time.monotonic()
        self._stopped_s: float | None = None
        self._last = (time_s, frames, 0, updates)

    def on_row(self, row: EnvStep) -> None:
        """Count one row of a group, the games that ended with it and the environments lost."""
        self._acted_frames += int(np.count_nonzero(~row.lost)) * self._action_repeats
        self.num_losses += len(row.losses)
        self._on_episodes(row.episodes)

    def _on_episodes(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            self._level(episode.level_name).add(episode)
            self._episodes.append(episode)
            self._new_episodes.append(episode)
            self.num_episodes += 1

    def on_afar(
        self, episodes: Sequence[Episode], losses: Sequence[Loss], acted_frames: int
    ) -> None:
        """Count what happened on an actor host that infers itself."""
        self._acted_frames += acted_frames
        self.num_losses += len(losses)
        self._on_episodes(episodes)

    def on_unroll(self, level_name: str, columns: int) -> None:
        """Count an unroll that the queue took in."""
        self._level(level_name).columns += columns

    def _level(self, level_name: str) -> _Level:
        return self._levels.setdefault(level_name, _Level())

    @property
    def time_s(self) -> float:
        """Seconds of training, all sessions of the run together."""
        now_s = time.monotonic() if self._stopped_s is None else self._stopped_s
        return self._time_before_s + now_s - self._started_s

    def stop_clock(self) -> None:
        """Learning is over: the last checkpoint and the last report are of the same time."""
        self._stopped_s = time.monotonic()

    @property
    def episode_return_mean(self) -> float:
        """Mean whole-game return of the last games; nan before the first."""
        return mean([episode.episode_return for episode in self._episodes])

    def state(self) -> dict[str, Any]:
        """What reports go on from in another session: plain numbers, strings and lists."""
        return {
            "episodes": [list(episode) for episode in self._episodes],
            "num_episodes": self.num_episodes,
            "num_losses": self.num_losses,
            "levels": {name: level.state() for name, level in self._levels.items()},
            "dmlab30_scores": [score for score in self.dmlab30_scores if math.isfinite(score)],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state()`` gave; before anything is counted."""
        self._episodes.extend(Episode(*values) for values in state["episodes"])
        self.num_episodes = state["num_episodes"]
        self.num_losses = state["num_losses"]
        for name, level in state["levels"].items():
            self._level(name).restore(level)
        if state["dmlab30_scores"]:
            no_cap, cap_100 = state["dmlab30_scores"]
            self.dmlab30_scores = (no_cap, cap_100)

    def take_episodes(self) -> list[Episode]:
        """The games that ended since the last call; of many, the last EPISODE_WINDOW."""
        episodes = list(self._new_episodes)
        self._new_episodes.clear()
        return episodes

    def report(
        self, figures: LearnerStatistics, inference_batch_mean: float, queue_columns: int,
        afar: HostsReport,
    ) -> Report:  # fmt: skip
        """The report since the last one."""
        frames, updates = figures.frames, figures.updates
        now_s = self.time_s
        last_s, last_frames, last_acted, last_updates = self._last
        self._last = (now_s, frames, self._acted_frames, updates)
        elapsed_s = max(now_s - last_s, 1e-9)
        return Report(
            time_s=round(now_s, 3),
            frames=frames,
            frames_per_s=(frames - last_frames) / elapsed_s,
            acted_frames_per_s=(self._acted_frames - last_acted) / elapsed_s,
            updates=updates,
            updates_per_s=(updates - last_updates) / elapsed_s,
            learning_rate=figures.learning_rate,
            episodes=self.num_episodes,
            env_losses=self.num_losses,
            episode_return_mean=self.episode_return_mean,
            episode_frames_mean=mean([e.steps * self._action_repeats for e in self._episodes]),
            policy_lag_mean=figures.policy_lag_mean,
            policy_lag_max=figures.policy_lag_max,
            inference_batch_mean=inference_batch_mean,
            queue_columns=queue_columns,
            total_loss=figures.total_loss,
            policy_gradient_loss=figures.policy_gradient_loss,
            baseline_loss=figures.baseline_loss,
            entropy_loss=figures.entropy_loss,
            entropy=figures.entropy,
            grad_norm=figures.grad_norm,
            skipped_updates=figures.skipped_updates,
            rho_mean=figures.rho_mean,
            dmlab30_no_cap=self.dmlab30_scores[0],
            dmlab30_cap_100=self.dmlab30_scores[1],
            levels={name: level.report() for name, level in self._levels.items()},
            hosts=afar.hosts,
            hosts_refused=afar.refused,
            messages_rejected=afar.rejected,
        )


def mean(values: list[Any]) -> float:
    """Of nothing: nan."""
    return float(np.mean(values)) if values else math.nan
