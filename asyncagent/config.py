"""Every flag of a run, in one frozen record, and the presets that fill what the user left out.

``Config`` holds *resolved* values only.  ``resolve(level_name, preset)`` gives the family's
preset with actors, groups and threads taken from the cores; the command line overlays the
user's flags on it, and the run's ``config.json`` records the result.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from asyncagent.errors import ConfigError
from asyncagent.files import parse_json
from asyncagent.placement import cores, place

Preset = Literal["paper", "workstation"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
NETS = ("auto", "shallow", "deep", "ancestor", "mlp")


MAX_ACTORS_PER_COLUMN = 16
"""More environments per column of a batch than this make the policy lag too large."""
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
    """One training run. Counts are counts, ``_s`` is seconds, ``_ms`` milliseconds."""

    # The run.
    level_name: str = "atari_breakout"
    """Level to learn, or several with commas: atari_<game>, doom_<scenario>, doom:<cfg>, a DMLab
    level, dmlab30, gym:<id>, your own module:callable, or catch, cartpole, memory."""
    preset: Preset = "paper"
    """Where flags left out come from: paper (200 M frames) or workstation (half an hour)."""
    logdir: str = "logdir"
    """Folder of checkpoints, metrics and TensorBoard files; a run found there is resumed."""
    seed: int = 1
    """Seeds environments, action sampling and initial weights."""
    total_environment_frames: int = 200_000_000
    """Stop after learning from this many frames (agent steps x action repeats)."""
    deterministic: bool = False
    """Act and learn in turn, on one thread each: the same seed gives the same weights, also when
    interrupted and resumed (environments must be able to save themselves)."""

    # Environments.
    num_actors: int = 64
    """Number of environments, in all groups together."""
    num_groups: int = 4
    """Equal groups of environments: while one's actions are computed, the others step."""
    num_action_repeats: int = 4
    """Frames each action is held for."""
    atari_backend: Literal["envpool", "ale"] = "envpool"
    """Which library steps Atari games."""
    atari_protocol: Literal["impala2018", "machado2018"] = "impala2018"
    """impala2018: life loss ends episodes, minimal actions. machado2018: sticky, 18 actions."""

    width: int = 96
    """DMLab: width of an observation in pixels."""
    height: int = 72
    """DMLab: height of an observation in pixels."""
    dataset_path: str = ""
    """DMLab: folder of the psychlab data set."""
    renderer: Literal["software", "hardware"] = "software"
    """DMLab: how it draws."""
    level_cache: str = "~/.cache/asyncagent/dmlab"
    """DMLab: folder of compiled levels, which runs may share; empty: keep none."""
    level_cache_gb: float = 10.0
    """DMLab: the level cache's size limit; the levels longest unused go first."""
    env_timeout_s: float = 120.0
    """Replace an environment whose step or reset takes longer (those in worker processes)."""
    max_env_failures: int = 5
    """End the run once an environment failed so often without ending an episode in between."""
    benchmark_mode: bool = False
    """Act at random, whatever the policy says: measures throughput only."""

    # Learning.
    unroll_length: int = 20
    """Agent steps per unroll, T."""
    batch_size: int = 32
    """Unrolls per update, B."""
    discounting: float = 0.99
    """Discount factor per agent step, in [0, 1]."""
    reward_clipping: Literal["abs_one", "soft_asymmetric", "none"] = "abs_one"
    """abs_one: clip to [-1, 1]. soft_asymmetric: 5 tanh(r/5), times 0.3 where r < 0."""
    bootstrap_truncated: bool = False
    """Bootstrap from the last observation's value where a time limit cut an episode off."""
    entropy_cost: float = 0.01
    """Weight of the entropy bonus."""
    baseline_cost: float = 0.5
    """Weight of the value loss."""
    clip_rho_threshold: float = 1.0
    """V-trace's rho-bar: importance weights in the value targets are cut off here."""
    clip_pg_rho_threshold: float = 1.0
    """Importance weights of the policy gradient are cut off here."""
    vtrace_lambda: float = 1.0
    """V-trace's lambda (the paper's remark 2), in [0, 1]: below 1 less variance, more bias."""
    epochs_per_batch: int = 1
    """Updates made of each batch; V-trace corrects for the drift between them."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """rmsprop is TensorFlow's: epsilon inside the square root, accumulator starting at one."""
    learning_rate: float = 6e-4
    """Initial learning rate; falls linearly to 0 over total_environment_frames."""
    decay: float = 0.99
    """RMSProp: decay of the running mean of squared gradients (Adam: beta2)."""
    momentum: float = 0.0
    """RMSProp: momentum (Adam: beta1)."""
    epsilon: float = 0.01
    """RMSProp: added to the mean square inside the root (Adam: to the root)."""
    max_grad_norm: float = 40.0
    """Cut the gradient's global norm off here; 0 leaves it alone."""
    max_skipped_updates: int = 10
    """An update whose loss or gradient is no number is skipped; end the run once more in a row than
    this were; 0: at the first."""

    # Network.
    net: str = "shallow"
    """auto (shallow for images, else mlp), shallow, deep, ancestor, mlp, or module:callable."""
    use_lstm: bool = False
    """Put an LSTM between the network's body and its heads."""

    # Machine.
    device: str = "auto"
    """Where to infer and learn: auto (cuda if there is one), cpu, cuda or cuda:N."""
    learner_device: str = "auto"
    """Where to learn; auto: as device says, and of two GPUs cuda:0."""
    inference_device: str = "auto"
    """Where to infer; auto: as device says, and of two GPUs cuda:1."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of convolutions and matrix products; auto: bfloat16 where it is fast."""
    env_threads: int = 1
    """Threads that step the environments of one group (those not in worker processes)."""
    inference_threads: int = 1
    """On a CPU, threads of the inference thread's operators."""
    learner_threads: int = 1
    """On a CPU, threads that share the micro-batches of an update out."""
    env_niceness: int = 0
    """Added to the nice value of what steps environments, in [0, 19]: learning goes first."""
    pin_workers: bool = False
    """Deal worker processes out to the cores for good, where their number allows it."""
    micro_batch_rows: int = 0
    """On a CPU, learn from so many rows at a time; 0: as many as fit the cache."""
    min_inference_rows: int = 1
    """Infer once so many rows wait, every group waits, or inference_timeout_ms have passed."""
    max_inference_rows: int = 1024
    """Infer at most so many rows at a time (or one group's)."""
    inference_timeout_ms: float = 100.0
    """Longest that a group's rows wait for others."""
    tuned: str = ""
    """File of flags that asyncagent tune wrote; those given by hand go before it."""
    switch_interval_ms: float = 5.0
    """Longest that a Python thread keeps others waiting (sys.setswitchinterval)."""

    # Actor hosts: other processes or machines that act for this learner.
    listen: str = ""
    """Accept actor hosts there, e.g. tcp://0.0.0.0:5555 (num_actors=0: no actors but theirs)."""
    secret_key: str = ""
    """This learner's secret key file (see asyncagent keys): connections are encrypted."""
    allowed_keys: str = ""
    """Folder of the public key files of the hosts that may connect; read again when it changes."""
    insecure: bool = False
    """Listen beyond this machine without keys: whoever reaches the port can send data and read the
    weights."""
    max_policy_lag: int = 20
    """A host whose weights are more updates old waits for new ones before its next unroll."""
    weights_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that travel to hosts."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """Of the observations that travel from hosts."""

    # Reports.
    checkpoint_interval_s: float = 600.0
    """Seconds between checkpoints (one is also written at the end and at the first Ctrl-C)."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Every so many checkpoints, keep one for good; 0: none."""
    override: str = ""
    """Flags, with commas, that may differ from the resumed run's although they change learning."""
    summary_interval_s: float = 30.0
    """Seconds between TensorBoard summaries."""
    report_interval_s: float = 5.0
    """Seconds between lines of metrics.jsonl and of the plain log."""
    video_interval_frames: int = 0
    """Frames between clips of the agent playing in TensorBoard (levels that show a picture);
    0: none."""
    stall_timeout_s: float = 300.0
    """End the run (exit status 3), showing all stacks, once some part has not moved so long."""
    grace_s: float = 20.0
    """Longest that the end may take: learning what is queued, the checkpoint, the environments."""

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
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                choices = get_args(kind)
                value = getattr(self, name)
                self._check(name, value in choices, f"one of {', '.join(choices)}")

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


# Each family's values; what a family does not name is Config's own default (Atari, the paper).
_WORKSTATION: dict[str, Any] = {
    "total_environment_frames": 16_000_000,
    "batch_size": 8,
    "optimizer": "adam",
    "learning_rate": 7e-4,
    "decay": 0.999,
    "momentum": 0.9,
    "epsilon": 1e-5,
    "vtrace_lambda": 0.9,
    "entropy_cost": 0.002,
}
# The ancestor's defaults, with its network.
_DOOM: dict[str, Any] = {
    "net": "ancestor",
    "use_lstm": True,
    "batch_size": 64,
    "unroll_length": 32,
    "learning_rate": 0.00048,
    "epsilon": 0.1,
    "entropy_cost": 0.00025,
    "max_grad_norm": 0.0,
}
# On health_gathering, an entropy cost of 0.002 let one policy of two make up its mind too early.
_DOOM_WORKSTATION: dict[str, Any] = {
    "net": "shallow",
    "use_lstm": False,
    "entropy_cost": 0.01,
    "max_grad_norm": 40.0,
}
# The paper's, of its experts and of DMLab-30.
_DMLAB: dict[str, Any] = {
    "net": "deep",
    "use_lstm": True,
    "batch_size": 32,
    "unroll_length": 100,
    "learning_rate": 0.00031866995608948655,
    "epsilon": 0.1,
    "entropy_cost": 0.0033391318945337044,
    "reward_clipping": "soft_asymmetric",
    "total_environment_frames": 1_000_000_000,
}
_SMALL: dict[str, Any] = {
    "num_action_repeats": 1,
    "net": "mlp",
    "total_environment_frames": 500_000,
    "batch_size": 16,
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "decay": 0.999,
    "momentum": 0.9,
    "epsilon": 1e-5,
    "precision": "float32",
    "learner_threads": 1,
}

_GYM: dict[str, Any] = _SMALL | {
    "net": "auto",
    "total_environment_frames": 2_000_000,
    "batch_size": 8,
    "vtrace_lambda": 0.95,
    "entropy_cost": 0.003,
}


def family_of(level_name: str) -> str:
    """Whose preset a level takes, judged by its name alone: atari, doom, dmlab, gym or small."""
    first = level_name.partition(",")[0]
    if ":" in first and not first.startswith(("doom:", "dmlab:")):
        return "gym"
    if first in ("catch", "cartpole", "memory"):
        return "small"
    if first.startswith("atari_"):
        return "atari"
    if first.startswith(("doom_", "doom:")):
        return "doom"
    return "dmlab"


def in_workers(level_name: str) -> bool:
    """Whether the environments of a level are stepped by worker processes."""
    return family_of(level_name) not in ("atari", "small")


def preset_values(level_name: str, preset: Preset, num_cores: int) -> dict[str, Any]:
    """Flag values of ``preset`` for the family of ``level_name`` on ``num_cores`` cores.

    Actors and batch are kept in a proportion that leaves the policy lag at a few updates.
    """
    values: dict[str, Any] = {
        "level_name": level_name,
        "preset": preset,
        "logdir": "logdir/" + re.sub(r"[^\w,.-]+", "_", level_name)[-100:],
    }
    family = family_of(level_name)
    groups = max(4, num_cores)
    size = 16
    if family in ("small", "gym"):
        values |= _SMALL if family == "small" else _GYM
        groups = 2
    elif family == "dmlab":
        # Levels take milliseconds or half a minute to reset: each environment for itself.
        groups = 4 * num_cores
        size = 1
        values |= _DMLAB
    elif preset == "paper":
        # The batch is the paper's 32 on any machine: at most 16 actors per column.
        size = max(4, min(64 if family == "atari" else 16, 16 * 32 // groups))
    else:
        # The same algorithm on any machine: more cores step the same few environments faster.
        groups = 2 if num_cores <= 2 else 4
    # A group plays one level: every level gets as many groups.
    levels = 30 if level_name == "dmlab30" else level_name.count(",") + 1
    groups = levels * math.ceil(groups / levels)
    if family == "doom":
        values |= _DOOM
    if preset == "workstation" and family in ("atari", "doom"):
        values |= _WORKSTATION
    if preset == "workstation" and family == "doom":
        values |= _DOOM_WORKSTATION
    values |= {"num_groups": groups, "num_actors": size * groups}
    placement = place(
        num_cores,
        groups,
        size,
        in_workers=in_workers(level_name),
        even_steps=family == "doom" and levels == 1,
    )
    return placement._asdict() | values


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


def rows_worth_a_batch(level_name: str, num_actors: int, num_groups: int) -> int:
    """min_inference_rows: on ViZDoom, two groups' rows where at least two others go on stepping.

    A recurrent net's larger batch is worth their waiting.
    """
    if family_of(level_name) != "doom" or num_groups < 4:
        return 1
    return 2 * (num_actors // num_groups)


def split_groups(level_name: str, num_actors: int, wanted: int) -> int:
    """The largest number of equal groups, at most ``wanted``, that ``num_actors`` splits into.

    A group plays one level: every level of a list gets as many groups, DMLab has one for each
    actor. ConfigError where that cannot be.
    """
    if family_of(level_name) == "dmlab":
        return num_actors
    levels = level_name.count(",") + 1
    most = max(wanted, levels)
    fitting = [n for n in range(levels, most + 1, levels) if num_actors % n == 0]
    if not fitting:
        raise ConfigError(f"num_actors={num_actors} must be a multiple of the {levels} levels")
    return fitting[-1]
