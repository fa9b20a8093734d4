"""Every flag of a run, in one frozen record.

``Config`` holds *resolved* values only.  ``resolve(level_name, preset)`` gives the family's
preset with actors, groups and threads taken from the cores; the command line overlays the
user's flags on it, and the run's ``config.json`` records the result.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from asyncagent.errors import ConfigError
from asyncagent.files import parse_json
from asyncagent.placement import cores
from asyncagent.presets import (
    MAX_ACTORS_PER_COLUMN,
    PRESETS,
    Preset,
    family_of,
    in_workers,
    num_levels,
    preset_values,
    rows_worth_a_batch,
    split_groups,
)

__all__ = [
    "DETERMINISTIC",
    "IDENTITY_FLAGS",
    "LEARNING_FLAGS",
    "MAX_ACTORS_PER_COLUMN",
    "NETS",
    "PRESETS",
    "TUNED_FLAGS",
    "Config",
    "Preset",
    "family_of",
    "in_workers",
    "num_levels",
    "preset_values",
    "resolve",
    "rows_worth_a_batch",
    "split_groups",
]

NETS = ("auto", "shallow", "deep", "ancestor", "mlp")

TUNED_FLAGS = (
    *("num_actors", "num_groups", "env_threads", "env_niceness", "pin_workers"),
    *("inference_threads", "learner_threads", "min_inference_rows"),
)
"""What changes speed alone, and is asyncagent tune's to choose."""
DETERMINISTIC: dict[str, Any] = {
    "num_groups": 1,
    "inference_threads": 1,
    "learner_threads": 1,
    "device": "cpu",
    "precision": "float32",
}
"""What --deterministic makes of flags left out."""
LEARNING_FLAGS = (
    *("num_action_repeats", "unroll_length", "batch_size", "discounting", "reward_clipping"),
    *("bootstrap_truncated", "entropy_cost", "baseline_cost", "clip_rho_threshold"),
    *("clip_pg_rho_threshold", "vtrace_lambda", "epochs_per_batch", "learning_rate", "decay"),
    *("momentum", "epsilon", "max_grad_norm"),
)
"""What decides how is learned: a resumed run keeps it, but for what ``override`` names."""
IDENTITY_FLAGS = (
    *("level_name", "seed", "net", "use_lstm", "optimizer", "atari_protocol"),
    *("width", "height", "benchmark_mode"),
)
"""What a checkpoint's weights depend on: a resumed run keeps it, whatever is overridden."""
_POSITIVE = (
    "checkpoint_interval_s",
    "summary_interval_s",
    "report_interval_s",
    "stall_timeout_s",
    "grace_s",
    "env_timeout_s",
    "level_cache_gb",
    "switch_interval_ms",
    "inference_timeout_ms",
)


@dataclass(frozen=True)
class Config:
    """One training run. Counts are counts, ``_s`` is seconds, ``_ms`` milliseconds.

    What a comment between fields says is a group's title in --help; a field's help is the first
    paragraph below it, one line of 100 columns; further paragraphs stand in the documentation.
    """

    # The run.
    level_name: str = "atari_breakout"
    """Level: atari_<game>, doom_<name>, gym:<id>, ...

    Several with commas are learnt together. Also doom:<cfg>, a DMLab level, dmlab30, your own
    module:callable, and the small catch, cartpole and memory."""
    preset: Preset = "paper"
    """Where flags left out come from.

    paper is made for 200 M frames, workstation for half an hour."""
    logdir: str = "logdir"
    """Folder of the run; a run found there is resumed.

    It holds checkpoints, metrics and TensorBoard files."""
    seed: int = 1
    """Of environments, action sampling and initial weights."""
    total_environment_frames: int = 200_000_000
    """Frames to learn from: agent steps x action repeats."""
    deterministic: bool = False
    """The same seed gives the same weights: act and learn in turn.

    On one thread each; also when interrupted and resumed, where environments can save
    themselves."""
    tuned: str = ""
    """Flags that asyncagent tune wrote; those by hand go before."""

    # Environments.
    num_actors: int = 64
    """Environments, in all groups together."""
    num_groups: int = 4
    """Equal groups: while one waits for actions, the others step."""
    num_action_repeats: int = 4
    """Frames that each action is held for."""
    atari_backend: Literal["envpool", "ale"] = "envpool"
    """The library that steps Atari games."""
    atari_protocol: Literal["impala2018", "machado2018"] = "impala2018"
    """Atari's rules.

    impala2018: a lost life ends the episode, minimal actions. machado2018: sticky actions, all 18
    of them, whole games."""
    env_timeout_s: float = 120.0
    """Replace an environment whose step or reset takes longer.

    Of those in worker processes: all but Atari and the small ones."""
    max_env_failures: int = 5
    """End the run when one fails so often without ending a game."""
    benchmark_mode: bool = False
    """Act at random, whatever the policy says: measures throughput."""

    # DeepMind Lab.
    width: int = 96
    """Width of an observation."""
    height: int = 72
    """Height of an observation."""
    dataset_path: str = ""
    """Folder of the psychlab data set."""
    renderer: Literal["software", "hardware"] = "software"
    """How it draws."""
    level_cache: str = "~/.cache/asyncagent/dmlab"
    """Folder of compiled levels; empty: none.

    Runs may share it."""
    level_cache_gb: float = 10.0
    """The cache's limit; levels longest unused go first."""

    # Learning.
    unroll_length: int = 20
    """Agent steps per unroll, T."""
    batch_size: int = 32
    """Unrolls per update, B."""
    discounting: float = 0.99
    """Discount per agent step, in [0, 1]."""
    reward_clipping: Literal["abs_one", "soft_asymmetric", "none"] = "abs_one"
    """How rewards are clipped.

    abs_one: to [-1, 1]. soft_asymmetric: 5 tanh(r/5), times 0.3 where r < 0."""
    bootstrap_truncated: bool = False
    """Where a time limit ends an episode, bootstrap from the value."""
    entropy_cost: float = 0.01
    """Weight of the entropy bonus."""
    baseline_cost: float = 0.5
    """Weight of the value loss."""
    clip_rho_threshold: float = 1.0
    """V-trace's rho-bar: limit of the value targets' weights."""
    clip_pg_rho_threshold: float = 1.0
    """Limit of the policy gradient's importance weights."""
    vtrace_lambda: float = 1.0
    """V-trace's lambda, in [0, 1]: below 1 less variance, more bias.

    The paper's remark 2."""
    epochs_per_batch: int = 1
    """Updates made of each batch.

    V-trace corrects for the drift between them."""

    # Optimiser.
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSProp is TensorFlow's.

    Epsilon inside the square root, accumulator starting at one."""
    learning_rate: float = 6e-4
    """At the start; falls linearly to 0 at the last frame."""
    decay: float = 0.99
    """Of the running mean of squared gradients (Adam: beta2)."""
    momentum: float = 0.0
    """RMSProp's momentum (Adam: beta1)."""
    epsilon: float = 0.01
    """Added to the mean square inside the root (Adam: to the root)."""
    max_grad_norm: float = 40.0
    """Limit of the gradient's global norm; 0: none."""
    max_skipped_updates: int = 10
    """End the run after more bad updates in a row.

    An update whose loss or gradient is no number is skipped."""

    # Network.
    net: str = "shallow"
    """auto, shallow, deep, ancestor, mlp, or module:callable.

    auto: shallow for images, else mlp."""
    use_lstm: bool = False
    """Put an LSTM between the network's body and its heads."""

    # Devices.
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    learner_device: str = "auto"
    """Where to learn; auto: as --device, of two GPUs cuda:0."""
    inference_device: str = "auto"
    """Where to infer; auto: as --device, of two GPUs cuda:1."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic; auto: bfloat16 where fast.

    Of convolutions and matrix products."""

    # Speed: asyncagent tune finds values for the machine.
    env_threads: int = 1
    """Threads that step a group (of those without worker processes)."""
    inference_threads: int = 1
    """On a CPU, threads of the inference thread's operators."""
    learner_threads: int = 1
    """On a CPU, threads that share the micro-batches of an update."""
    env_niceness: int = 0
    """Nice value of what steps, in [0, 19]: learning goes first.

    Added to the one that the run was started with."""
    pin_workers: bool = False
    """Deal worker processes out to the cores for good.

    Where their number allows it."""
    micro_batch_rows: int = 0
    """On a CPU, rows learnt from at a time; 0: what fits the cache."""
    min_inference_rows: int = 1
    """Infer once so many rows wait.

    Or every group waits, or inference_timeout_ms have passed."""
    max_inference_rows: int = 1024
    """Infer at most so many rows at a time (or one group's)."""
    inference_timeout_ms: float = 100.0
    """Longest that a group's rows wait for others."""
    switch_interval_ms: float = 5.0
    """Longest that a Python thread keeps others waiting.

    It is sys.setswitchinterval's."""

    # Actor hosts: other processes or machines that act for this learner.
    listen: str = ""
    """Accept actor hosts there, e.g. tcp://0.0.0.0:5555.

    With num_actors=0 there are no actors but theirs."""
    secret_key: str = ""
    """This learner's secret key file (asyncagent keys makes it).

    With it connections are encrypted."""
    allowed_keys: str = ""
    """Folder of the public keys of hosts that may connect.

    It is read again when it changes."""
    insecure: bool = False
    """Listen beyond this machine without keys.

    Whoever reaches the port can send data and read the weights."""
    max_policy_lag: int = 20
    """Updates that a host's weights may be old by: then it waits."""
    weights_precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights on their way to hosts."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """Of observations on their way from hosts."""

    # Checkpoints: one is also written at the end and at the first Ctrl-C.
    checkpoint_interval_s: float = 600.0
    """Time between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest stay."""
    keep_every: int = 0
    """Keep one of so many checkpoints for good; 0: none."""
    override: str = ""
    """Flags, with commas, that may change a resumed run's learning."""

    # Reports and limits.
    quiet: bool = False
    """Print nothing but warnings and how it ended."""
    summary_interval_s: float = 30.0
    """Time between TensorBoard summaries."""
    report_interval_s: float = 5.0
    """Time between lines of metrics.jsonl and of the plain log."""
    video_interval_frames: int = 0
    """Frames between clips of the agent in TensorBoard; 0: none.

    Of levels that show a picture."""
    stall_timeout_s: float = 300.0
    """End the run, with stacks, once a part stands still so long.

    The exit status is 3."""
    grace_s: float = 20.0
    """Longest that the end may take.

    Learning what is queued, the checkpoint, closing the environments."""

    def __post_init__(self) -> None:
        for name in ("total_environment_frames", "unroll_length", "max_policy_lag"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        least = 0 if self.listen else 1
        for name in ("num_actors", "num_groups"):
            self._check(name, getattr(self, name) >= least, f">= {least}")
        if (self.num_actors == 0) != (self.num_groups == 0):
            raise ConfigError(
                f"num_actors={self.num_actors} and num_groups={self.num_groups} must both be 0 or "
                "both be more"
            )
        for name in ("num_action_repeats", "batch_size", "env_threads", "epochs_per_batch"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in ("inference_threads", "learner_threads", "width", "height", "max_env_failures"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        self._check("keep_checkpoints", self.keep_checkpoints >= 1, ">= 1")
        self._check("keep_every", self.keep_every >= 0, ">= 0")
        named = set(filter(None, self.override.split(",")))
        self._check("override", named <= {*LEARNING_FLAGS}, f"some of {', '.join(LEARNING_FLAGS)}")
        self._check("env_niceness", 0 <= self.env_niceness <= 19, "in [0, 19]")
        self._check("min_inference_rows", self.min_inference_rows >= 1, ">= 1")
        self._check(
            "max_inference_rows",
            self.max_inference_rows >= self.min_inference_rows,
            f">= min_inference_rows={self.min_inference_rows}",
        )
        for name in ("micro_batch_rows", "max_skipped_updates", "video_interval_frames"):
            self._check(name, getattr(self, name) >= 0, ">= 0")
        for name in ("entropy_cost", "baseline_cost", "max_grad_norm"):
            value = getattr(self, name)
            self._check(name, value >= 0 and math.isfinite(value), ">= 0 and finite")
        for name in ("learning_rate", "epsilon", "clip_rho_threshold", "clip_pg_rho_threshold"):
            value = getattr(self, name)
            self._check(name, value > 0 and math.isfinite(value), "> 0 and finite")
        for name in _POSITIVE:
            value = getattr(self, name)
            self._check(name, value > 0 and math.isfinite(value), "> 0 and finite")
        for name in ("discounting", "decay", "vtrace_lambda"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        if in_workers(self.level_name) and self.env_timeout_s >= self.stall_timeout_s:
            raise ConfigError(
                f"stall_timeout_s={self.stall_timeout_s:g} must be > env_timeout_s="
                f"{self.env_timeout_s:g}: a hung environment is replaced, not the end of the run"
            )
        if self.optimizer == "adam":
            self._check("decay", self.decay < 1, "< 1 with optimizer=adam")
        self._check("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._check("seed", 0 <= self.seed < 2**31, "in [0, 2**31)")
        self._check(
            "num_groups",
            self.num_groups == 0 or self.num_actors % self.num_groups == 0,
            f"a divisor of num_actors={self.num_actors}: groups are of equal size",
        )
        if self.deterministic:
            self._check_deterministic()
        self._check("level_name", bool(self.level_name), "not empty")
        self._check("logdir", bool(self.logdir), "not empty")
        if ":" not in self.net and self.net not in NETS:
            near = ", ".join(difflib.get_close_matches(self.net, NETS, 2, 0.0))
            raise ConfigError(
                f"net={self.net!r} is unknown: did you mean {near}? (or your own module:callable)"
            )
        for name, choices in _choices(type(self)).items():  # type: ignore[arg-type]
            self._check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    def _check_deterministic(self) -> None:
        for name in ("num_groups", "inference_threads", "learner_threads"):
            self._check(name, getattr(self, name) == 1, "1 with --deterministic")
        self._check("precision", self.precision != "auto", "named with --deterministic")
        self._check("device", self.device == "cpu", "cpu with --deterministic")
        for name in ("learner_device", "inference_device"):
            self._check(name, getattr(self, name) in ("auto", "cpu"), "cpu with --deterministic")
        self._check("listen", not self.listen, "empty with --deterministic")
        self._check(
            "video_interval_frames", not self.video_interval_frames, "0 with --deterministic"
        )
        self._check(
            "num_actors",
            self.num_actors % self.batch_size == 0,
            f"a multiple of batch_size={self.batch_size} with --deterministic",
        )

    def _check(self, field: str, good: bool, bound: str) -> None:
        if not good:
            raise ConfigError(f"{field}={getattr(self, field)!r} must be {bound}")

    @property
    def group_size(self) -> int:
        """Environments per group, E; 0 where only hosts act."""
        return self.num_actors // max(1, self.num_groups)

    def to_json(self) -> str:
        """The resolved configuration as an indented JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str | Path) -> Config:
        """Read what ``to_json`` wrote; ConfigError names ``origin`` and what is wrong with it."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"{origin}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{origin}: expected a JSON object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"{origin}: unknown flags {', '.join(map(repr, unknown))}")
        for name, value in values.items():
            default = known[name].default
            wanted: tuple[type, ...] = (type(default),)
            if isinstance(default, float):
                wanted = (float, int)
            if not isinstance(value, wanted) or (isinstance(value, bool) != (bool in wanted)):
                raise ConfigError(
                    f"{origin}: {name}={value!r} must be of type {type(default).__name__}"
                )
            if isinstance(default, float) and isinstance(value, int) and abs(value) > 10**300:
                raise ConfigError(f"{origin}: {name} is too large for a float")
        return cls(**values)


@functools.cache
def _choices(kind: type[Config]) -> dict[str, tuple[str, ...]]:
    """The values of each flag that has a few."""
    hints = get_type_hints(kind).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


def resolve(level_name: str, preset: Preset = "paper", **flags: Any) -> Config:
    """The preset of the level's family, overlaid with ``flags``; ConfigError if one is impossible.

    A ``num_actors`` given without ``num_groups`` is split into as many groups as the preset has,
    or the next smaller number that divides it.
    """
    values = preset_values(level_name, preset, cores())
    if flags.get("deterministic"):
        values |= DETERMINISTIC
    values |= flags
    if values["num_actors"] == 0 and "num_groups" not in flags:
        values["num_groups"] = 0
    if "num_actors" in flags and "num_groups" not in flags and values["num_actors"] >= 1:
        values["num_groups"] = split_groups(level_name, values["num_actors"], values["num_groups"])
    if "min_inference_rows" not in flags:
        values["min_inference_rows"] = rows_worth_a_batch(
            level_name, values["num_actors"], values["num_groups"]
        )
    return Config(**values)
