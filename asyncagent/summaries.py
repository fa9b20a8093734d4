"""What TensorBoard reads, in its own terms: scalars, histograms, text, flags and a layout.

Events are made by hand, from TensorBoard's protocol buffers: nothing here needs TensorFlow, nor a
thread of its own.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import api_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from asyncagent.config import LEARNING_FLAGS, Config

MAX_BARS = 30
"""Of a histogram of numbers."""

HYPERPARAMETERS = (
    *("level_name", "preset", "seed", "total_environment_frames"),
    *("num_actors", "num_groups", "net", "use_lstm", "optimizer", *LEARNING_FLAGS),
    *("learner_threads", "precision", "atari_protocol"),
)
"""Flags in the hyper-parameters' table."""

SHOWN_FIRST = ("entropy_cost", "learning_rate", "level_name", "net", "seed")
"""Those whose columns are shown before anything is chosen: there is room for five."""

METRICS = {
    "score/episode_return_mean": "return",
    "speed/frames_per_s": "frames/s",
    "learning/policy_lag_mean": "policy lag",
    "learning/entropy": "entropy",
    "learning/grad_norm": "gradient norm",
    "learning/rho_mean": "mean rho",
}
"""By tag: columns of the hyper-parameters' table, beside the flags."""


class Chart(NamedTuple):
    """Several curves in one picture."""

    title: str
    tags: tuple[str, ...]
    """Regular expressions, each of a whole tag."""


BUSY = (
    "system/stages/(env_steps|inference_computes|learner_computes)",
    "system/stages/(loop|cores)_busy",
)
LAYOUT = {
    "overview": (
        Chart("return, mean of the last 100 games", ("score/episode_return_mean",)),
        Chart("frames per second", ("speed/(acted_)?frames_per_s",)),
        Chart("policy lag, updates", ("learning/policy_lag_(mean|max)",)),
        Chart("losses", ("learning/.*_loss",)),
        Chart("entropy, nats", ("learning/entropy",)),
        Chart("busy, share of the time", BUSY),
    ),
    "levels": (
        Chart(
            "return per level, mean of the last 100 games", ("(?!score/).*/episode_return_mean",)
        ),
        Chart("return per level, game by game", (".*/episode_return",)),
    ),
    "where the time goes": (
        Chart("environments", ("system/stages/env_(steps|waits_.*)",)),
        Chart("inference", ("system/stages/inference_(computes|copies|waits)",)),
        Chart("learner", ("system/stages/learner_(computes|copies|waits)",)),
        Chart("the machine's cores", ("system/stages/(.*_cpu|cores_.*)",)),
        Chart("actor hosts", ("system/stages/hosts_.*",)),
    ),
    "machine": (
        Chart("memory, GiB", ("system/(workers_)?memory_gib",)),
        Chart("event loop's lag, ms", ("system/loop_lag_ms",)),
    ),
}
"""Of the custom scalars' page: by section, its charts."""


def record(event: Any) -> bytes:
    """An event as it stands in an event file."""
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()


def event(step: int, values: Sequence[Any]) -> bytes:
    """Values at so many frames, as they stand in an event file."""
    return record(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def scalar(tag: str, value: float) -> Any:
    """A point of a curve."""
    return Summary.Value(tag=tag, simple_value=value)


def counts(tag: str, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Any:
    """A histogram of whole numbers: element k of ``numbers`` says how often there was a k."""
    taken = np.asarray(numbers)
    return _histogram(tag, taken, np.arange(len(taken) + 1) - 0.5)


def powers(tag: str, numbers: Sequence[int]) -> Any:
    """A histogram: element k of ``numbers`` counts what was 2**k to 2**(k+1) - 1."""
    return _histogram(tag, np.asarray(numbers), 2.0 ** np.arange(len(numbers) + 1) - 0.5)


def numbers(tag: str, values: Sequence[float]) -> Any:
    """A histogram of finite numbers, at least one."""
    found = np.asarray(values, np.float64)
    try:
        with np.errstate(all="ignore"):
            taken, edges = np.histogram(found, MAX_BARS)
    except ValueError:  # so close together, or so far apart, that there are no numbers between bars
        taken, edges = np.array([len(found)]), np.array([found.min(), found.max()])
    return _histogram(tag, taken, edges)


def _histogram(tag: str, taken: npt.NDArray[np.int64], edges: npt.NDArray[Any]) -> Any:
    (bars,) = taken.nonzero()
    first, last = int(bars[0]), int(bars[-1]) + 1
    middles = (edges[1:] + edges[:-1]) / 2
    histogram = HistogramProto(
        min=edges[first],
        max=edges[last],
        num=int(taken.sum()),
        sum=float((middles * taken).sum()),
        sum_squares=float((middles**2 * taken).sum()),
        bucket_limit=edges[first + 1 : last + 1].tolist(),
        bucket=taken[first:last].tolist(),
    )
    return Summary.Value(tag=tag, histo=histogram)


def text(tag: str, markdown: str) -> Any:
    """A page of text."""
    about = text_metadata.create_summary_metadata(tag, "")
    return Summary.Value(tag=tag, metadata=about, tensor=make_tensor_proto([markdown.encode()]))


def flags_table(config: Config) -> Any:
    """Every flag of a run, as a page of text."""
    rows = [
        f"| {name} | `{value}` |" if value != "" else f"| {name} | |"
        for name, value in dataclasses.asdict(config).items()
    ]
    return text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]))


def hyperparameters(config: Config) -> list[Any]:
    """The run as a row of the hyper-parameters' table, and the table's columns."""
    values = {name: getattr(config, name) for name in HYPERPARAMETERS}
    # Without a name of its own a run would be averaged with those of the same flags.
    row = summary_v2.hparams_pb(values, trial_id="")
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, differs=name in SHOWN_FIRST) for name in HYPERPARAMETERS
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=name)
            for tag, name in METRICS.items()
        ],
    )
    table = Summary.Value(
        tag=hparams_metadata.EXPERIMENT_TAG,
        metadata=hparams_metadata.create_summary_metadata(HParamsPluginData(experiment=experiment)),
        tensor=hparams_metadata.NULL_TENSOR,
    )
    return [table, *row.value]


def layout() -> Any:
    """The custom scalars' page."""
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[
                layout_pb2.Chart(
                    title=chart.title,
                    multiline=layout_pb2.MultilineChartContent(
                        tag=[f"{tag}$" for tag in chart.tags]
                    ),
                )
                for chart in charts
            ],
        )
        for title, charts in LAYOUT.items()
    ]
    page = layout_pb2.Layout(category=categories).SerializeToString()
    return Summary.Value(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=make_tensor_proto(page),
    )
