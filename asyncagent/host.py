"""An actor host: runs the environments that a learner on another machine gives it.

With inference on the host this is the trainer without its learner: ``act``, ``DynamicBatcher``,
``Policy``; with inference at the learner it is environments alone, and torch is never imported.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import uvloop

from asyncagent import wire
from asyncagent.config import Config
from asyncagent.conversation import PING_S, SILENCE_S, Conversation
from asyncagent.envs import make_group, usable_spec
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.scratch import sweep
from asyncagent.envs.shared import spec_from_json
from asyncagent.errors import UsageError
from asyncagent.host_duties import Assignment, Duty, HostInfers, LearnerInfers
from asyncagent.keys import check_endpoint, load_public, load_secret
from asyncagent.placement import cores, place
from asyncagent.signals import AskedToStop
from asyncagent.tasks import cancel, endless, first_of
from asyncagent.threads import NamedThread
from asyncagent.watchdog import FAILED, LEAVE_S, Component, Watchdog
from asyncagent.wire import FromLearner, Hello, Welcome

__all__ = ["PING_S", "SILENCE_S", "ActorHost", "HostFlags", "run_host"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostFlags:
    """What a host decides for itself; the rest is the learner's."""

    connect: str = "tcp://127.0.0.1:5555"
    """Where the learner listens."""
    num_actors: int = 64
    """Environments to run here."""
    num_groups: int = 0
    """Groups they step in; 0: the learner chooses."""
    inference: wire.Inference = "host"
    """Where actions are computed.

    host: here, with weights from the learner. learner: there, which needs no torch here."""
    name: str = ""
    """In the learner's reports; none: the machine's own name."""
    secret_key: str = ""
    """This host's secret key file (see asyncagent keys)."""
    learner_key: str = ""
    """The learner's public key file."""
    device: str = "auto"
    """Where to infer here: auto, cpu, cuda or cuda:N."""
    env_threads: int = 0
    """Threads that step a group; 0: by the cores there are."""
    dataset_path: str = ""
    """DMLab: folder of the psychlab data set; none: the learner's."""
    level_cache: str = ""
    """DMLab: folder of compiled levels; none: the learner's."""
    renderer: Literal["", "software", "hardware"] = ""
    """DMLab: how it draws; none: as the learner."""
    give_up_s: float = 0.0
    """End once the learner has been away so long; 0: wait for ever."""

    def __post_init__(self) -> None:
        check_endpoint(self.connect, "connect", listening=False)
        if not 1 <= self.num_actors <= 4096:
            raise UsageError(f"num_actors={self.num_actors} must be in [1, 4096]")
        if self.num_groups < 0 or (self.num_groups and self.num_actors % self.num_groups):
            raise UsageError(
                f"num_groups={self.num_groups} must be 0 or a divisor of num_actors="
                f"{self.num_actors}: groups are of equal size"
            )
        if bool(self.secret_key) != bool(self.learner_key):
            raise UsageError("secret_key and learner_key belong together: give both, or neither")
        if self.env_threads < 0 or not self.give_up_s >= 0:
            raise UsageError("env_threads and give_up_s must be >= 0")
        if self.name and not re.fullmatch(wire.HOST_NAME, self.name):
            raise UsageError(
                f"name={self.name!r} must be 1 to 64 of letters, digits and '_.:@+-', of which the "
                "first is a letter, a digit or '_'"
            )


def run_host(flags: HostFlags) -> None:
    """Act for the learner until it refuses, or the first SIGINT or SIGTERM.

    Raises:
      UsageError: keys, address or environments are not what they should be, or we are refused.
      TimeoutError: the learner was away for longer than ``give_up_s``.
      BaseExceptionGroup: a task died.
    """
    if flags.inference == "host":
        # Now: to load torch takes seconds, in which nobody would answer the learner.
        importlib.import_module("asyncagent.host_policy")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(ActorHost(flags).run())
        except BaseExceptionGroup as group:
            for kind in (UsageError, TimeoutError):
                told = group.subgroup(kind)
                if told is not None:
                    raise first_of(told) from None
            raise


class ActorHost:
    """One host process. Belongs to one event loop."""

    def __init__(self, flags: HostFlags) -> None:
        """Reads the key files."""
        self._flags = flags
        self._name = flags.name or _machine_name()
        self._incarnation = os.urandom(16)
        keys = None
        if flags.secret_key:
            keys = (load_secret(Path(flags.secret_key)), load_public(Path(flags.learner_key)))
        self._conversation = Conversation(
            flags.connect,
            keys,
            flags.give_up_s,
            self._hello,
            self._on_message,
            is_bulky=flags.inference == "host",
            shares=lambda: (0.0, 0.0) if self._duty is None else self._duty.shares(),
        )
        self._stop = asyncio.Event()
        self._given: Assignment | None = None
        self._duty: Duty | None = None
        self._changed = asyncio.Event()
        self._watchdog = Watchdog(Config.stall_timeout_s)
        self._threads = (NamedThread("wire"), NamedThread("weights"))

    async def run(self) -> None:
        """See ``run_host``."""
        try:
            with (
                self._watchdog as watchdog,
                AskedToStop(self.stop, lambda: _limit_the_end(watchdog)),
            ):
                async with asyncio.TaskGroup() as tasks:
                    work = [
                        tasks.create_task(endless("conversation", self._conversation.run())),
                        tasks.create_task(endless("environments", self._play())),
                        tasks.create_task(endless("watchdog", watchdog.watch(self._survey))),
                    ]
                    try:
                        await self._stop.wait()
                    finally:
                        _limit_the_end(watchdog)
                    await cancel(*work)
        finally:
            for thread in self._threads:
                thread.close()

    def stop(self) -> None:
        """Leave in good order."""
        self._stop.set()

    def _survey(self) -> dict[str, Component]:
        return {} if self._duty is None else self._duty.survey()

    # The conversation.

    def _hello(self) -> Hello:
        return Hello(
            protocol=wire.PROTOCOL,
            incarnation=self._incarnation,
            name=self._name,
            inference=self._flags.inference,
            num_actors=self._flags.num_actors,
            num_groups=self._flags.num_groups,
            num_cores=min(cores(), 4096),
        )

    async def _on_message(self, header: FromLearner, parts: list[Any]) -> None:
        if isinstance(header, Welcome):
            self._on_welcome(header)
        elif isinstance(header, wire.Ended):
            _log.info("%s: the run is complete", self._flags.connect)
            self.stop()
        elif self._duty is not None:
            await self._duty.on_message(header, parts)

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._given is not None and self._duty is not None:
            present = self._given.welcome
            if welcome.session == present.session and welcome.groups == present.groups:
                self._duty.go_on(welcome)
                return
            # What was not taken may be in the checkpoint that another learner began with.
            self._duty.end()
        config = Config.from_json(welcome.config, "the learner's configuration")
        spec = spec_from_json(json.loads(welcome.spec))
        self._watchdog.stall_timeout_s = config.stall_timeout_s
        self._given = given = Assignment(welcome, self._placed(config, welcome), spec)
        send = self._conversation.send
        if self._flags.inference == "host":
            self._duty = HostInfers(given, send, self._incarnation, self._threads)
        else:
            self._duty = LearnerInfers(given, send)
        self._changed.set()
        _log.info(
            "%s: %d environments in %d groups of %s",
            self._flags.connect,
            self._flags.num_actors,
            len(welcome.groups),
            config.level_name,
        )

    def _placed(self, config: Config, welcome: Welcome) -> Config:
        """The learner's configuration on this machine."""
        size = welcome.groups[0].num_envs
        placement = place(cores(), len(welcome.groups), size, in_workers=False, even_steps=False)
        return dataclasses.replace(
            config,
            num_actors=size * len(welcome.groups),
            num_groups=len(welcome.groups),
            dataset_path=self._flags.dataset_path or config.dataset_path,
            level_cache=self._flags.level_cache or config.level_cache,
            renderer=self._flags.renderer or config.renderer,
            device=self._flags.device,
            learner_device="auto",
            inference_device="auto",
            env_threads=self._flags.env_threads or placement.env_threads,
            env_niceness=0,
            pin_workers=False,
            inference_threads=placement.inference_threads,
        )

    # Environments.

    async def _play(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._play_on()
            # What was played hangs together in circles, with its rows and their shared memory.
            gc.collect()

    async def _play_on(self) -> None:
        """With the duty there is, until there is another."""
        assert self._given is not None and self._duty is not None
        async with asyncio.TaskGroup() as tasks:
            playing = tasks.create_task(endless("groups", _play(self._given, self._duty)))
            await self._changed.wait()
            await cancel(playing)


def _limit_the_end(watchdog: Watchdog) -> None:
    watchdog.leave_within(LEAVE_S, FAILED, "the end takes too long: leaving what hangs behind")


def _machine_name() -> str:
    """Of this machine, with nothing in it that a host's name may not have."""
    found = re.sub(r"[^A-Za-z0-9_.:@+-]", "-", os.uname().nodename)[:64]
    return found if re.fullmatch(wire.HOST_NAME, found) else "host"


async def _play(given: Assignment, duty: Duty) -> None:
    """Make the environments, and run them for ever."""
    builder = NamedThread("build-envs")
    groups: list[EnvGroup] = []
    try:
        spec = await builder.run(usable_spec, given.config)
        if spec != given.spec:
            raise UsageError(
                f"{given.config.level_name} differs here from the learner's ({spec} and "
                f"{given.spec}): the same versions must be installed on both sides"
            )
        for group in given.welcome.groups:
            groups.append(
                await builder.run(
                    lambda group=group: make_group(
                        given.config,
                        level_name=group.level_name,
                        num_envs=group.num_envs,
                        first_env_index=group.first_env_index,
                        seed=given.welcome.seed,
                    )
                )
            )
        await duty.play(groups)
    finally:
        await asyncio.gather(*(group.close() for group in groups))
        builder.submit(sweep)
        builder.close()
