"""The presets: what each family of levels starts from, by the cores there are."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

from asyncagent.errors import ConfigError
from asyncagent.placement import place

Preset = Literal["paper", "workstation"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
MAX_ACTORS_PER_COLUMN = 16
"""More environments per column of a batch than this make the policy lag too large."""
_MIN_GROUP_SIZE = 4
"""Rather fewer groups than smaller ones: each takes the loop's time, however small it is."""

_PAPER_BATCH_SIZE = 32
"""Config's own default."""

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


def num_levels(level_name: str) -> int:
    """How many levels a name stands for: a list with commas; DMLab-30's are 30."""
    return sum(30 if level == "dmlab30" else 1 for level in level_name.split(","))


def in_workers(level_name: str) -> bool:
    """Whether the environments of a level are stepped by worker processes."""
    return family_of(level_name) not in ("atari", "small")


def preset_values(level_name: str, preset: Preset, num_cores: int) -> dict[str, Any]:
    """Flag values of ``preset`` for the family of ``level_name`` on ``num_cores`` cores.

    Actors and batch are kept in a proportion that leaves the policy lag at a few updates, and
    never goes beyond ``MAX_ACTORS_PER_COLUMN`` where every level can have an actor within it.
    """
    values: dict[str, Any] = {
        "level_name": level_name,
        "preset": preset,
        "logdir": "logdir/" + re.sub(r"[^\w,.-]+", "_", level_name)[-100:],
    }
    family = family_of(level_name)
    groups = max(4, num_cores)
    size, least = 16, _MIN_GROUP_SIZE
    if family in ("small", "gym"):
        values |= _SMALL if family == "small" else _GYM
        groups = 2
    elif family == "dmlab":
        # Levels take milliseconds or half a minute to reset: each environment for itself.
        groups = 4 * num_cores
        size = least = 1
        values |= _DMLAB
    elif preset == "paper":
        # As many actors on any number of cores: the most that the paper's batch can have.
        share = MAX_ACTORS_PER_COLUMN * _PAPER_BATCH_SIZE // groups
        size = max(least, min(64 if family == "atari" else 16, share))
    else:
        # The same algorithm on any machine: more cores step the same few environments faster.
        groups = 2 if num_cores <= 2 else 4
    if family == "doom":
        values |= _DOOM
    if preset == "workstation" and family in ("atari", "doom"):
        values |= _WORKSTATION
    if preset == "workstation" and family == "doom":
        values |= _DOOM_WORKSTATION
    # A group plays one level: every level gets as many groups.
    levels = num_levels(level_name)
    most = MAX_ACTORS_PER_COLUMN * values.get("batch_size", _PAPER_BATCH_SIZE)
    groups = levels * max(1, min(math.ceil(groups / levels), most // (least * levels)))
    size = max(1, min(size, most // groups))
    values |= {"num_groups": groups, "num_actors": size * groups}
    placement = place(
        num_cores,
        groups,
        size,
        in_workers=in_workers(level_name),
        even_steps=family == "doom" and levels == 1,
    )
    return placement._asdict() | values


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
    levels = num_levels(level_name)
    most = max(wanted, levels)
    fitting = [n for n in range(levels, most + 1, levels) if num_actors % n == 0]
    if not fitting:
        raise ConfigError(f"num_actors={num_actors} must be a multiple of the {levels} levels")
    return fitting[-1]
