"""What every installed engine shows for a fixed seed and fixed actions, as a hash.

A game that is not what it was elsewhere gives scores that do not compare.  ``references.json``
holds, by check and by version of the engine's package and kind of processor, the hash that was
seen where the engine shows the same on every such machine: as these do, also where OpenCV and the C
library are kept from using AVX and the like.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optree

from asyncagent.config import Config
from asyncagent.envs import make_group
from asyncagent.envs.base import EnvGroup, how_to_install
from asyncagent.errors import UsageError
from asyncagent.files import parse_json, replace_text
from asyncagent.selftest.outcome import Absent, Outcome, require
from asyncagent.structs import ActionArray, ActionSpace, Box, Discrete, EnvStep

REFERENCES = Path(__file__).parent / "references.json"
NUM_STEPS = 100
NUM_ENVS = 2
SEED = 1
DECIMALS = 3
"""Of floats that count: C libraries differ in the last bits of a sine."""


class Subject(NamedTuple):
    """A level that stands for its engine."""

    level_name: str
    package: str
    """Distribution whose version says what the level shows."""
    extra: str
    """Of asyncagent, that brings it; empty if none does."""
    backend: Literal["envpool", "ale"] = "envpool"
    is_portable: bool = True
    """The engine shows the same on every machine."""


SUBJECTS = {
    "memory": Subject("memory", "numpy", ""),
    "catch": Subject("catch", "envpool", "atari"),
    "cartpole": Subject("cartpole", "envpool", "atari"),
    "atari_envpool": Subject("atari_breakout", "envpool", "atari"),
    "atari_ale": Subject("atari_breakout", "ale-py", "ale", "ale"),
    "doom": Subject("doom_basic", "vizdoom", "doom"),
    "gym": Subject("gym:CartPole-v1", "gymnasium", "gym"),
    "dmlab": Subject("rooms_collect_good_objects_train", "deepmind-lab", "", is_portable=False),
}
"""By the name of the check."""


class Play(NamedTuple):
    """What two environments of one level showed."""

    digest: str
    """64 hexadecimal digits: of every row's observation, reward and flags."""
    rows: int
    ends: int
    points: float

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.ends} ends, rewards {self.points:g}"


def check(name: str) -> Outcome:
    """Make the level of ``SUBJECTS[name]`` twice, play, and compare with each other and with what
    is on record for the version that is installed."""
    subject = SUBJECTS[name]
    version = installed(subject)
    one, two = play(subject), play(subject)
    what = f"{subject.package} {version}"
    require(
        one.digest == two.digest,
        f"{what}: two environments with the same seed differ ({one.digest[:16]} and "
        f"{two.digest[:16]})",
    )
    seen = f"{what}: {one}"
    if not subject.is_portable:
        return Outcome("passed", f"{seen}; a second environment showed the same")
    known = references().get(name, {})
    wanted = known.get(version)
    if wanted is None:
        alike = [other for other, digest in known.items() if digest == one.digest]
        if alike:
            return Outcome("passed", f"{seen}; hash {one.digest[:16]} as that of {alike[-1]}")
        return Outcome(
            "no reference",
            f"{seen}; not compared, nothing is on record for version {version}: {one.digest}",
        )
    require(
        one.digest == wanted,
        f"{seen}; hash {one.digest[:16]} is not {wanted[:16]}, which this version showed elsewhere",
    )
    return Outcome("passed", f"{seen}; hash {one.digest[:16]} as on record")


def installed(subject: Subject) -> str:
    """Version of the engine's package, and kind of processor; Absent if it is not there."""
    processor = platform.machine()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{importlib.metadata.version(subject.package)} {processor}"
    if importlib.util.find_spec(subject.package.replace("-", "_")) is not None:
        return f"unknown {processor}"  # a build that was put on the path
    how = how_to_install(subject.extra) if subject.extra else "on no package index"
    raise Absent(f"{subject.package} is not installed ({how})")


def references(path: Path = REFERENCES) -> dict[str, dict[str, str]]:
    """Hashes by name of the check and version; UsageError if the file is no such thing."""
    try:
        found = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read reference hashes from {str(path)!r}: {error}") from None
    by_version = isinstance(found, dict) and all(isinstance(of, dict) for of in found.values())
    if not by_version:
        raise UsageError(f"{str(path)!r} must hold a JSON object: check -> version -> hash")
    hashes: dict[str, dict[str, str]] = found
    return hashes


def record_to(file: str, name: str) -> Outcome:
    """Play ``SUBJECTS[name]`` and write its hash to ``file``, beside what stands there."""
    path = Path(file)
    subject = SUBJECTS[name]
    version = installed(subject)
    digest = play(subject).digest
    hashes = references(path) if path.exists() else {}
    hashes.setdefault(name, {})[version] = digest
    replace_text(path, json.dumps(hashes, indent=2, sort_keys=True) + "\n")
    return Outcome("passed", f"{subject.package} {version}: {digest}")


def play(subject: Subject) -> Play:
    """Step a group of the level with fixed actions. Failed if an environment is lost."""
    return asyncio.run(_play(subject))


async def _play(subject: Subject) -> Play:
    config = Config(
        level_name=subject.level_name,
        atari_backend=subject.backend,
        num_action_repeats=1 if subject.level_name in ("memory", "catch", "cartpole") else 4,
        num_actors=NUM_ENVS,
        num_groups=1,
        level_cache="",
    )
    group = make_group(
        config, level_name=subject.level_name, num_envs=NUM_ENVS, first_env_index=0, seed=SEED
    )
    try:
        return await _step(group)
    finally:
        await group.close()


async def _step(group: EnvGroup) -> Play:
    # A RandomState's numbers are the same in every version of numpy, for ever.
    numbers = np.random.RandomState(0)
    digest = hashlib.sha256()
    row = await group.reset()
    ends, points = 0, 0.0
    for _ in range(NUM_STEPS):
        _add(digest, row)
        row = await group.step(_action(group.spec.actions, numbers))
        ends += int((row.terminated | row.truncated).sum())
        points += float(row.reward.sum())
    _add(digest, row)
    return Play(digest.hexdigest(), NUM_ENVS * (NUM_STEPS + 1), ends, points)


def _action(space: ActionSpace, numbers: np.random.RandomState) -> ActionArray:
    if isinstance(space, Box):
        return numbers.uniform(-1, 1, (NUM_ENVS, space.num_dims)).astype(np.float32)
    sizes = (space.num_actions,) if isinstance(space, Discrete) else space.sizes
    choices = [numbers.randint(size, size=NUM_ENVS) for size in sizes]
    return choices[0] if isinstance(space, Discrete) else np.stack(choices, axis=1)


def _add(digest: Any, row: EnvStep) -> None:
    """What counts of a row, in the bytes that every machine has for it."""
    reasons = [loss.reason for loss in row.losses]
    require(not reasons, f"an environment was lost: {reasons[:1]}")
    fields = (row.reward, row.terminated, row.truncated, row.first)
    for leaf in (*optree.tree_leaves(row.observation), *fields):
        array = np.asarray(leaf)
        if array.dtype.kind == "f":
            array = np.rint(array.astype(np.float64) * 10**DECIMALS).astype("<i8")
        digest.update(f"{array.dtype.kind}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))))
