"""Clips of the agent playing, in the run's TensorBoard, while it trains.

An environment of its own, a copy of the policy with a generator of its own, on threads of their
own: training does not notice.  Whatever goes wrong is a warning; the run goes on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from asyncagent.batcher import DynamicBatcher
from asyncagent.config import Config
from asyncagent.envs import levels_of, make_group
from asyncagent.envs.base import EnvGroup, import_engine
from asyncagent.errors import UsageError
from asyncagent.games import Job, play
from asyncagent.host_policy import HostPolicy
from asyncagent.policy import Snapshot
from asyncagent.structs import EnvSpec
from asyncagent.tasks import first_of
from asyncagent.threads import NamedThread
from asyncagent.video import Clip
from asyncagent.weights import encode_weights

LOOK_S = 1.0
"""Seconds between looks at how far the run is."""
MAX_STEPS = 1000
"""A clip shows so many agent steps of a game at most."""
SEED_OFFSET = 2_000_003
"""Added to the run's seed, so that the games shown are neither trained on nor tested with."""

_log = logging.getLogger(__name__)


class Filming:
    """Films a game every ``config.video_interval_frames``, each time of the next level."""

    def __init__(
        self, config: Config, spec: EnvSpec, num_weights: int, snapshot: Callable[[], Snapshot],
        frames: Callable[[], int], show: Callable[[Any, int], Awaitable[Any]],
    ) -> None:  # fmt: skip
        """Makes nothing yet.

        Args:
          num_weights: of the net.
          snapshot: the newest weights; called on a thread.
          frames: learned from until now.
          show: takes a clip for an event file, and the frames learned from when it was filmed.
        """
        self._interval = config.video_interval_frames
        # What acts for the clip takes one core at most, and no device.
        self._config = dataclasses.replace(
            config,
            device="cpu",
            precision="float32",
            env_threads=1,
            inference_threads=1,
            pin_workers=False,
        )
        self._levels = levels_of(config.level_name)
        self._spec = spec
        self._num_weights = num_weights
        self._snapshot = snapshot
        self._frames = frames
        self._show = show
        self._policy: HostPolicy | None = None

    async def run(self) -> None:
        """Film for ever; ends by cancellation, and closes what it has opened."""
        if not self._interval or not self._can_film():
            await asyncio.Event().wait()
        number = self._frames() // self._interval
        levels = deque(self._levels)
        levels.rotate(-number - 1)
        # Made here: a thread that nobody needs is none.
        thread = NamedThread("film")
        batcher = DynamicBatcher(self._infer, name="film", thread=thread)
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                if self._frames() // self._interval == number:
                    continue
                number = self._frames() // self._interval
                if not levels:
                    continue
                level = levels[0]
                levels.rotate(-1)
                try:
                    await self._film(level, batcher, thread)
                except Exception as failure:
                    error = first_of(failure)
                    if isinstance(error, UsageError):  # which no other try will mend
                        _log.warning("no clips of %s: %s", level, error)
                        levels.remove(level)
                    else:
                        _log.warning("no clip of %s; the run goes on: %r", level, error)
        finally:
            batcher.close()
            thread.close()

    def _can_film(self) -> bool:
        try:
            import_engine("PIL", "video")
            Clip(self._levels[0], self._spec)
        except UsageError as error:
            _log.warning("no clips of %s: %s", self._config.level_name, error)
            return False
        return True

    async def _film(self, level: str, batcher: DynamicBatcher, thread: NamedThread) -> None:
        frames = self._frames()
        clip = Clip(level, self._spec)
        await thread.run(self._load)
        assert self._policy is not None
        # Environments of a run are numbered from 0 to num_actors - 1.
        job = Job(level, self._config.num_actors, (1,), clip, MAX_STEPS)

        def make(job: Job) -> EnvGroup:
            return make_group(
                self._config,
                level_name=level,
                num_envs=1,
                first_env_index=job.first_env_index,
                seed=(self._config.seed + SEED_OFFSET + frames) % 2**31,
                name="film-env",
            )

        await play(
            [job],
            make,
            batcher,
            self._policy.policy.initial_state,
            num_lanes=1,
            stall_timeout_s=self._config.stall_timeout_s,
            on_episode=lambda episode, left: None,
        )
        value = await thread.run(clip.summary)
        if value is not None:
            await self._show(value, frames)

    def _load(self) -> None:
        """On the thread that infers: take the newest weights."""
        if self._policy is None:
            seed = (self._config.seed + SEED_OFFSET) % 2**31
            self._policy = HostPolicy(self._config, self._spec, self._num_weights, seed)
        snapshot = self._snapshot()
        self._policy.load(encode_weights(snapshot, "float32"), snapshot.version, "float32")

    def _infer(self, *rows: Any) -> Any:
        assert self._policy is not None
        return self._policy.policy.infer(*rows)
