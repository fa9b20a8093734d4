"""train(config): runs what ``building`` has built, owns the TaskGroup and the shutdown's order.

One event loop runs every actor, the learner's conversation with its queue, the reports and the
checkpoints; whatever blocks (engines, forward passes, updates, files) has a named thread.  A task
that dies ends the run with its traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from asyncagent.accounting import Accounts
from asyncagent.actor import act
from asyncagent.batcher import DynamicBatcher
from asyncagent.board import Counts, TensorBoard
from asyncagent.building import Parts, build, env_seed, level_of_group
from asyncagent.checkpoint import locked
from asyncagent.config import Config
from asyncagent.doctor import Doctor
from asyncagent.envs import dmlab30
from asyncagent.envs.base import EnvGroup
from asyncagent.envs.scratch import sweep
from asyncagent.errors import EndOfUnrolls, GraceOver, NotFinite, UsageError
from asyncagent.filming import Filming
from asyncagent.lockstep import Lockstep
from asyncagent.metrics import (
    NO_HOSTS,
    LearnerStatistics,
    Report,
)
from asyncagent.records import MetricsFile
from asyncagent.remote import Learning, RemoteBridge, Weights
from asyncagent.saving import Saver
from asyncagent.scores import Dmlab30Training
from asyncagent.signals import AskedToStop
from asyncagent.structs import EnvStep, Episode, Loss, Unroll
from asyncagent.tasks import cancel, endless, first_of, named, noted
from asyncagent.terminal import Terminal
from asyncagent.threads import NamedThread
from asyncagent.tracks import Track
from asyncagent.unroll import UnrollQueue
from asyncagent.watchdog import FAILED, LEAVE_S, Component, Watchdog, of_thread
from asyncagent.weights import encode_weights, num_weights

ABANDON_S = 3.0
"""Longest a failed run waits for its engines before it leaves them behind."""

_log = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """What a training session came to."""

    frames: int
    updates: int
    episode_return_mean: float
    """Mean whole-game return of the last 100 games; nan if none ended."""
    time_s: float
    """Seconds of training, all sessions of the run together."""
    last_report: Report | None
    save_failure: str = ""
    """Why the last checkpoint could not be written; empty if it was."""


def train(config: Config) -> TrainResult:
    """Train until ``config.total_environment_frames``, the first SIGINT or SIGTERM.

    Resumes the run found in ``config.logdir``, and leaves a checkpoint of the end there, if it can
    be written.

    Raises:
      UsageError: what was asked for cannot be done.
      CheckpointError: the checkpoint found does not fit this configuration.
      NotFinite: too many updates in a row were skipped, see ``config.max_skipped_updates``.
      BaseExceptionGroup: a task died; its traceback carries a note that names the task.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_train(config))
        except BaseExceptionGroup as group:
            # Some things only an engine can find wrong, when its group begins; and numbers that
            # go wrong are no fault of the task that found them.
            request = group.subgroup((UsageError, NotFinite))
            if request is not None:
                raise first_of(request) from None
            raise


async def _train(config: Config) -> TrainResult:
    logdir = Path(config.logdir)
    logdir.mkdir(parents=True, exist_ok=True)
    with locked(logdir), Watchdog(config.stall_timeout_s, logdir / "stall.txt") as watchdog:
        run = _Run(config, logdir, await build(config, logdir, watchdog), watchdog)
        run.saver.begin()
        with AskedToStop(run.ask_to_stop, run.limit_the_end):
            try:
                with run.terminal:
                    await run.to_the_end()
            finally:
                await run.abandon()
    return run.result()


class _Run:
    """Everything one training session is made of."""

    def __init__(self, config: Config, logdir: Path, parts: Parts, watchdog: Watchdog) -> None:
        groups, policy, learner = parts.groups, parts.policy, parts.learner
        self.config = config
        self.watchdog = watchdog
        self.logdir = logdir
        self.groups = groups
        self.policy = policy
        self.learner = learner
        self.counters = parts.counters
        self.stop = asyncio.Event()
        self.learner_thread = NamedThread("learner")
        self.files_thread = NamedThread("files")
        self.batcher = DynamicBatcher(
            noted("inference", policy.infer),
            config.min_inference_rows,
            max(config.max_inference_rows, config.group_size),
            config.inference_timeout_ms,
            track=policy.track,
        )
        self.accounts = Accounts(
            len(groups),
            policy.track,
            learner.track,
            config.inference_threads if policy.device.type == "cpu" else 1,
        )
        self.doctor = Doctor(config)
        self.queue = UnrollQueue(max(config.batch_size, config.group_size), config.batch_size)
        self.terminal = Terminal(
            config.level_name, config.total_environment_frames, learner.frames, config.quiet
        )
        self.metrics_file = MetricsFile(
            logdir / "metrics.jsonl", learner.frames, self.counters.time_s
        )
        self.tensorboard = TensorBoard(logdir, config, learner.frames)
        self.filming = Filming(
            config,
            parts.spec,
            num_weights(learner.net),
            policy.snapshot,
            lambda: learner.frames,
            lambda clip, frames: self.files_thread.run(self.tensorboard.add, clip, frames),
        )
        self.saver = Saver(config, logdir)
        self.dmlab30 = Dmlab30Training()
        self.last_report: Report | None = None
        self._figures: LearnerStatistics | None = None
        self._counts = Counts()
        # How often each actor and the learner have moved.
        self._moves = dict.fromkeys(("learner", *map(_actor_name, range(len(groups)))), 0)
        self._batcher_before = self.batcher.statistics()
        self.lockstep = None
        if parts.begin is not None:
            self.lockstep = Lockstep(
                parts.begin, self.queue, self.stop, self._save, lambda: self.saver.wait_s
            )
        self.bridge = None
        if parts.listener is not None:
            self.bridge = RemoteBridge(
                config, parts.spec, parts.listener, self._learning(), env_seed(config, learner)
            )
            _log.info("actor hosts may connect to %s", self.bridge.endpoint)
        if parts.resumed is not None:
            self._restore(parts.resumed)

    async def to_the_end(self) -> None:
        await self.files_thread.run(self.accounts.read_cpu)
        self.accounts.begin()
        async with asyncio.TaskGroup() as tasks:
            actors = [
                tasks.create_task(
                    endless(
                        _actor_name(index),
                        self._act(
                            _actor_name(index), level_of_group(self.config, index), group, track
                        ),
                    )
                )
                for index, (group, track) in enumerate(
                    zip(self.groups, self.accounts.groups, strict=True)
                )
            ]
            if self.bridge is not None:
                actors.append(tasks.create_task(endless("actor hosts", self.bridge.serve())))
            learner = tasks.create_task(named("learner", self._learn()))
            reporter = tasks.create_task(endless("reporter", self._report_forever()))
            saver = tasks.create_task(endless("checkpointer", self._save_forever()))
            lag = tasks.create_task(endless("accounts", self.accounts.watch_loop()))
            watchdog = tasks.create_task(endless("watchdog", self._watch_forever()))
            filming = tasks.create_task(endless("filming", self.filming.run()))
            try:
                await self.stop.wait()
            except asyncio.CancelledError:  # a task has failed
                self.watchdog.leave_within(LEAVE_S, FAILED, "what was left did not end")
                raise
            self.limit_the_end()
            self.accounts.end()
            grace = self.config.grace_s
            deadline_s = asyncio.get_running_loop().time() + grace
            if self.lockstep is not None:
                await self.lockstep.park(learner, grace / 2)
            filming.cancel()  # what is filmed may take a while to end: meanwhile all is saved
            await cancel(*actors, saver, watchdog, lag)
            self.batcher.close()
            self.queue.close()
            await asyncio.wait({learner}, timeout=grace / 2)
            await cancel(learner, reporter)
            self.counters.stop_clock()
            if self.bridge and self.learner.frames >= self.config.total_environment_frames:
                self.bridge.farewell()
            end = asyncio.timeout_at(deadline_s)
            saved = False
            with contextlib.suppress(TimeoutError):
                async with end:
                    await self._save()
                    saved = True
                    await self._report(summary=True)
                    closing = [group.close() for group in self.groups]
                    await asyncio.gather(cancel(filming), *closing)
        if end.expired():
            what = "the end is saved" if saved else "nothing was saved since the last checkpoint"
            raise GraceOver(f"--grace_s={grace:g} is over before everything has ended: {what}")

    async def abandon(self) -> None:
        """Let everything go, waiting for nothing that may hang; harmless after an orderly end."""
        self.batcher.close()
        self.queue.close()
        if self.bridge is not None:
            self.bridge.close()
        writers = (self.metrics_file, self.tensorboard)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABANDON_S):
                closing: list[Awaitable[None]] = [group.close() for group in self.groups]
                closing += [self.files_thread.run(writer.close) for writer in writers]
                await asyncio.gather(*closing, return_exceptions=True)
                await self.files_thread.run(sweep)
        self.learner.close()
        self.learner_thread.close()
        self.files_thread.close()

    def ask_to_stop(self) -> None:
        """End the run in good order."""
        self.terminal.say("stopping: writing a checkpoint (a second Ctrl-C leaves at once)")
        self.stop.set()

    def limit_the_end(self) -> None:
        """From now on an end that does not come is enforced; from any thread."""
        seconds = self.config.grace_s + ABANDON_S + 1.0
        self.watchdog.leave_within(
            seconds, FAILED, f"--grace_s={self.config.grace_s:g} is over: leaving what hangs behind"
        )

    def result(self) -> TrainResult:
        return TrainResult(
            self.learner.frames,
            self.learner.updates,
            self.counters.episode_return_mean,
            self.counters.time_s,
            self.last_report,
            self.saver.failure,
        )

    def _learning(self) -> Learning:
        def encode() -> Weights:
            snapshot = self.policy.snapshot()
            precision = self.config.weights_precision
            return Weights(snapshot.version, encode_weights(snapshot, precision))

        async def put(level_name: str, unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
            await self.queue.put(unroll, give_back, f"{level_name}, an actor host")
            self.counters.on_unroll(level_name, unroll.reward.shape[1])

        def tell(episodes: Sequence[Episode], losses: Sequence[Loss], frames: int) -> None:
            self.counters.on_afar(episodes, losses, frames)
            self._score(episodes)

        return Learning(
            initial_state=self.policy.initial_state,
            version=lambda: self.policy.version,
            num_weights=num_weights(self.learner.net),
            encode_weights=encode,
            put=put,
            act=self._act,
            tell=tell,
        )

    async def _act(
        self, name: str, level_name: str, group: EnvGroup, track: Track | None = None
    ) -> None:
        def on_row(row: EnvStep) -> None:
            if name in self._moves:
                self._moves[name] += 1
            self.counters.on_row(row)
            self._score(row.episodes)

        caller = self.batcher.register()

        async def put(unroll: Unroll, give_back: Callable[[Unroll], None]) -> None:
            nonlocal caller
            caller.close()  # nobody needs to wait for an actor that waits for the learner
            await self.queue.put(unroll, give_back, f"{level_name}, {name}")
            caller = self.batcher.register()
            self.counters.on_unroll(level_name, group.num_envs)

        try:
            await act(
                group,
                self.batcher,
                put,
                self.config.unroll_length,
                self.policy.initial_state(group.num_envs),
                on_row,
                carried=None if self.lockstep is None else self.lockstep.begin,
                between=None if self.lockstep is None else self.lockstep.between,
                track=track,
            )
        finally:
            caller.close()

    def _score(self, episodes: Sequence[Episode]) -> None:
        if self.config.level_name != dmlab30.NAME:
            return
        for episode in episodes:
            scores = self.dmlab30.add(episode.level_name, episode.episode_return)
            if scores is not None:
                self.counters.dmlab30_scores = scores

    async def _learn(self) -> None:
        while self.learner.frames < self.config.total_environment_frames:
            try:
                parts = await self.queue.get()
            except EndOfUnrolls:
                return
            try:
                await self.learner_thread.run(self.learner.update, parts)
            except NotFinite:
                with contextlib.suppress(NotFinite):  # the weights are spoilt, too
                    await self._save()
                raise
            self.queue.release(parts)
            self._moves["learner"] += 1
        self.stop.set()

    async def _watch_forever(self) -> None:
        def situation() -> str:
            return (
                f"{len(self.queue)} unroll columns wait for the learner, "
                f"{self.batcher.statistics().pending_rows} rows for inference"
            )

        await self.watchdog.watch(self._survey, situation)

    def _survey(self) -> dict[str, Component]:
        """Whoever acts, infers, learns or writes."""
        batches = self.batcher.statistics()
        # Without unrolls the learner has nothing to do: the actors have to answer for it.
        starved = len(self.queue) < self.config.batch_size and self.learner_thread.num_pending == 0
        survey = {
            "learner": Component(
                f"update {self.learner.updates:,}", self._moves["learner"], starved
            ),
            "inference": Component(
                f"batch {batches.batches:,}", batches.batches, not self.batcher.busy
            ),
            "files": of_thread(self.files_thread)._replace(vital=False),
        }
        for index, group in enumerate(self.groups):
            name = _actor_name(index)
            rows = self._moves[name]
            survey[name] = Component(f"row {rows:,}", (rows, group.progress()))
        if self.bridge is not None:
            hosts = self.bridge.progress()
            survey["actor hosts"] = Component(f"unrolls {hosts}", hosts, not hosts)
        return survey

    async def _report_forever(self) -> None:
        loop = asyncio.get_running_loop()
        summary_due_s = loop.time() + self.config.summary_interval_s
        while True:
            await asyncio.sleep(self.config.report_interval_s)
            summary = loop.time() >= summary_due_s
            if summary:
                summary_due_s = loop.time() + self.config.summary_interval_s
            await self._report(summary)

    async def _report(self, summary: bool) -> None:
        # First: it may have to wait for a checkpoint, and frames belong to the time of the report.
        cpu = await self.files_thread.run(self.accounts.read_cpu)
        figures = await self.learner_thread.run(self.learner.take_statistics)
        batches = self.batcher.statistics()
        recent = batches.since(self._batcher_before)
        self._counts = self._counts.plus(figures, recent.batch_size_histogram)
        if figures.num_updates == 0 and self._figures is not None:
            # Means are still the last ones; where the learner is, is known.
            figures = self._figures._replace(
                frames=figures.frames,
                updates=figures.updates,
                skipped_updates=figures.skipped_updates,
                learning_rate=figures.learning_rate,
            )
        self._figures = figures
        report = self.counters.report(
            figures,
            recent.mean_batch_size,
            len(self.queue),
            NO_HOSTS if self.bridge is None else self.bridge.report(),
        )
        self._batcher_before = batches
        stages, lag_ms = self.accounts.take(cpu, report.hosts.values())
        # At the end hosts are sent home.
        hosts = None if self.stop.is_set() else len(report.hosts)
        verdict = self.doctor.see(report.time_s, report.frames_per_s, stages, lag_ms, hosts)
        report = report._replace(stages=stages, loop_lag_ms=lag_ms, verdict=verdict)
        self.last_report = report
        self.terminal.show(report)
        await self.files_thread.run(self.metrics_file.write, report)
        if summary:
            episodes, counts = self.counters.take_episodes(), self._counts
            self._counts = Counts()
            await self.files_thread.run(self.tensorboard.write, report, episodes, counts)

    async def _save_forever(self) -> None:
        if self.lockstep is not None:  # which knows when to save
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(self.saver.wait_s)
            await self._save()

    async def _save(self) -> None:
        # The learner's thread copies between two updates; the files' thread writes meanwhile.
        state = await self.learner_thread.run(self.learner.state)
        state["policy_generator"] = self.policy.generator_state()
        state["policy_device"] = self.policy.device.type
        state["time_s"] = self.counters.time_s
        state["counters"] = self.counters.state()
        state["episode_return_mean"] = self.counters.episode_return_mean
        state["dmlab30"] = self.dmlab30.state()
        if self.lockstep is not None:
            state["lockstep"] = await self.lockstep.state()
        await self.files_thread.run(self.saver.save, state)

    def _restore(self, state: dict[str, Any]) -> None:
        """What reports and saves go on from; a checkpoint of format 1 knows nothing of it."""
        if "counters" in state:
            self.counters.restore(state["counters"])
            self.dmlab30.restore(state["dmlab30"])
            self.saver.num_saves = state["num_saves"]


def _actor_name(index: int) -> str:
    return f"actor-{index}"
