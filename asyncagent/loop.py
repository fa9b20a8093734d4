"""train(config): builds everything, owns the TaskGroup and the order of the shutdown.

One event loop runs every actor, the learner's conversation with its queue, the reports and the
checkpoints; whatever blocks (engines, forward passes, updates, files) has a named thread.  A task
that dies ends the run with its traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import torch
import uvloop

from asyncagent.actor import act
from asyncagent.batcher import DynamicBatcher
from asyncagent.checkpoint import load_checkpoint, save_checkpoint
from asyncagent.config import Config
from asyncagent.envs import env_spec, make_group
from asyncagent.envs.base import EnvGroup
from asyncagent.errors import CheckpointError, EndOfUnrolls
from asyncagent.learner import Learner
from asyncagent.metrics import (
    Counters,
    LearnerStatistics,
    MetricsFile,
    Report,
    TensorBoard,
    Terminal,
)
from asyncagent.models import make_net
from asyncagent.optim import linear_learning_rate
from asyncagent.policy import Policy, resolve_device, resolve_precision
from asyncagent.threads import NamedThread
from asyncagent.unroll import UnrollQueue

GRACE_S = 30.0
"""Longest an orderly shutdown may take, all stages together."""
ABANDON_S = 3.0
"""Longest a failed run waits for its engines before it leaves them behind."""

# What of the configuration a checkpoint's weights depend on.
_IDENTITY = ("level_name", "net", "use_lstm", "optimizer", "atari_protocol")

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


def train(config: Config) -> TrainResult:
    """Train until ``config.total_environment_frames``, the first SIGINT or SIGTERM.

    Resumes the run found in ``config.logdir``; always leaves a checkpoint of the end there.

    Raises:
      UsageError: what was asked for cannot be done.
      CheckpointError: the checkpoint found does not fit this configuration.
      BaseExceptionGroup: a task died; its traceback carries a note that names the task.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_train(config))


async def _train(config: Config) -> TrainResult:
    logdir = Path(config.logdir)
    logdir.mkdir(parents=True, exist_ok=True)
    run = await _Run.build(config, logdir)
    (logdir / "config.json").write_text(config.to_json())
    with _Signals(run.stop, run.terminal.say):
        try:
            with run.terminal:
                await run.to_the_end()
        finally:
            await run.abandon()
    return run.result()


class _Run:
    """Everything one training session is made of."""

    def __init__(
        self, config: Config, logdir: Path, groups: list[EnvGroup], policy: Policy,
        learner: Learner, counters: Counters,
    ) -> None:  # fmt: skip
        self.config = config
        self.logdir = logdir
        self.groups = groups
        self.policy = policy
        self.learner = learner
        self.counters = counters
        self.stop = asyncio.Event()
        self.learner_thread = NamedThread("learner")
        self.files_thread = NamedThread("files")
        self.batcher = DynamicBatcher(
            _noted("inference", policy.infer),
            1,
            max(1024, config.group_size),
            config.inference_timeout_ms,
        )
        self.queue = UnrollQueue(max(config.batch_size, config.group_size), config.batch_size)
        self.terminal = Terminal(config.level_name, config.total_environment_frames, learner.frames)
        self.metrics_file = MetricsFile(logdir / "metrics.jsonl", learner.frames)
        self.tensorboard = TensorBoard(logdir, config.num_action_repeats, learner.frames)
        self.last_report: Report | None = None
        self._figures: LearnerStatistics | None = None
        self._batcher_before = self.batcher.statistics()

    @classmethod
    async def build(cls, config: Config, logdir: Path) -> _Run:
        torch.set_num_threads(1)
        device = resolve_device(config.device)
        dtype = resolve_precision(config.precision, device)
        spec = env_spec(config)
        net = make_net(config.net, spec, config.use_lstm, config.seed)
        policy = Policy(net, device, dtype, config.seed, config.inference_threads)
        learner = Learner(config, net, device, dtype, policy)
        time_s = 0.0
        found = load_checkpoint(logdir)
        if found is not None:
            path, state = found
            time_s = _resume(config, path, state, learner, policy)
            _log.info("resumed from %s", path)
        builder = NamedThread("build-envs")
        try:
            groups = [
                await builder.run(
                    lambda index=index: make_group(
                        config,
                        num_envs=config.group_size,
                        first_env_index=index * config.group_size,
                        # A resumed run plays other games than those it began with.
                        seed=(config.seed + learner.updates) % 2**31,
                    )
                )
                for index in range(config.num_groups)
            ]
        finally:
            builder.close()
        counters = Counters(config.num_action_repeats, learner.frames, learner.updates, time_s)
        return cls(config, logdir, groups, policy, learner, counters)

    async def to_the_end(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            actors = [
                tasks.create_task(_named(f"actor-{i}", self._act(group)), name=f"actor-{i}")
                for i, group in enumerate(self.groups)
            ]
            learner = tasks.create_task(_named("learner", self._learn()), name="learner")
            reporter = tasks.create_task(_named("reporter", self._report_forever()))
            saver = tasks.create_task(_named("checkpointer", self._save_forever()))
            await self.stop.wait()
            async with asyncio.timeout(GRACE_S):
                for task in (*actors, saver):
                    task.cancel()
                await asyncio.gather(*actors, saver, return_exceptions=True)
                self.batcher.close()
                self.queue.close()
                await learner
                reporter.cancel()
                await asyncio.gather(reporter, return_exceptions=True)
                await self._report(summary=True)
                await self._save()
                await asyncio.gather(*(group.close() for group in self.groups))

    async def abandon(self) -> None:
        """Let everything go, waiting for nothing that may hang; harmless after an orderly end."""
        self.batcher.close()
        self.queue.close()
        self.metrics_file.close()
        self.tensorboard.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABANDON_S):
                closing = (group.close() for group in self.groups)
                await asyncio.gather(*closing, return_exceptions=True)
        self.learner_thread.close()
        self.files_thread.close()

    def result(self) -> TrainResult:
        return TrainResult(
            self.learner.frames,
            self.learner.updates,
            self.counters.episode_return_mean,
            self.counters.time_s,
            self.last_report,
        )

    async def _act(self, group: EnvGroup) -> None:
        await act(
            group,
            self.batcher,
            self.queue,
            self.config.unroll_length,
            self.policy.initial_state(group.num_envs),
            self.counters.on_row,
        )

    async def _learn(self) -> None:
        while self.learner.frames < self.config.total_environment_frames:
            try:
                parts = await self.queue.get()
            except EndOfUnrolls:
                return
            await self.learner_thread.run(self.learner.update, parts)
            self.queue.release(parts)
        self.stop.set()

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
        figures = await self.learner_thread.run(self.learner.take_statistics)
        if math.isnan(figures.total_loss) and self._figures is not None:
            figures = self._figures  # no update since the last report
        self._figures = figures
        batches = self.batcher.statistics()
        report = self.counters.report(
            self.learner.frames,
            self.learner.updates,
            figures,
            batches.since(self._batcher_before).mean_batch_size,
            len(self.queue),
        )
        self._batcher_before = batches
        self.last_report = report
        self.terminal.show(report)
        await self.files_thread.run(self.metrics_file.write, report)
        if summary:
            await self.files_thread.run(
                self.tensorboard.write, report, self.counters.take_episodes(), figures.action_counts
            )

    async def _save_forever(self) -> None:
        while True:
            await asyncio.sleep(self.config.checkpoint_interval_s)
            await self._save()

    async def _save(self) -> None:
        # The learner's thread copies between two updates; the files' thread writes meanwhile.
        state = await self.learner_thread.run(self.learner.state)
        state["config"] = self.config.to_json()
        state["policy_generator"] = self.policy.generator_state()
        state["time_s"] = self.counters.time_s
        await self.files_thread.run(save_checkpoint, self.logdir, state)


async def _named(name: str, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        _note(name, error)
        raise


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            _note(name, error)
            raise

    return call


def _note(name: str, error: Exception) -> None:
    """Say where it began: an exception of the inference comes out of every actor, too."""
    if not any(note.startswith("in task") for note in getattr(error, "__notes__", ())):
        error.add_note(f"in task {name!r}")


def _resume(
    config: Config, path: Path, state: dict[str, Any], learner: Learner, policy: Policy
) -> float:
    """Restore a checkpoint; returns the seconds of training behind it."""
    before = Config.from_json(state["config"], path)
    for name in _IDENTITY:
        old, new = getattr(before, name), getattr(config, name)
        if old != new:
            raise CheckpointError(
                f"{path} is of a run with {name}={old!r}, not {new!r}: use another --logdir"
            )
    learner.restore(state)
    policy.set_generator_state(state["policy_generator"])
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


class _Signals:
    """The first SIGINT or SIGTERM asks the run to end, the second has its ordinary effect."""

    def __init__(self, stop: asyncio.Event, say: Callable[[str], None]) -> None:
        self._stop = stop
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._signals = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> None:
        for number in self._signals:
            self._loop.add_signal_handler(number, self._first)

    def _first(self) -> None:
        self._restore()
        self._say("stopping: writing a checkpoint (a second Ctrl-C leaves at once)")
        self._stop.set()

    def _restore(self) -> None:
        for number in self._signals:
            self._loop.remove_signal_handler(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        self._restore()
        signal.signal(signal.SIGINT, signal.default_int_handler)
