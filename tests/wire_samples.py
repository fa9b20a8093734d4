"""Environments of every kind, and unrolls and rows of them that could be real."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree

from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    EnvStep,
    MultiDiscrete,
    Nest,
    Unroll,
)
from asyncagent.unroll import empty_unroll

PIXELS = ArraySpec((4, 16, 16), "uint8")
MIXED = {
    "frame": ArraySpec((16, 20, 3), "uint8"),
    "measurements": ArraySpec((3,), "float32"),
    "sentence": ArraySpec((6,), "int64", num_tokens=9),
    "stack": PIXELS,
    "stack_of_two": ArraySpec((2, 17, 19), "uint8"),
    "switch": ArraySpec((), "bool"),
}
SPECS = {
    "vector": EnvSpec(ArraySpec((3,), "float32"), Box(2), 1),
    "pixels": EnvSpec(PIXELS, Discrete(5), 4),
    "mixed": EnvSpec(MIXED, MultiDiscrete((3, 2, 4)), 4),
}


def state_of(num_envs: int, lstm: bool) -> Nest:
    """A net's state of so many environments."""
    zeros = np.zeros((num_envs, 5), np.float32)
    return (zeros, (zeros[:, :2],)) if lstm else ()


def _observation(leaf: ArraySpec, rows: int, envs: int, rng: np.random.Generator) -> Any:
    shape = (rows, envs, *leaf.shape)
    if leaf.dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    most = {"bool": 1, "uint8": 255, "int64": leaf.num_tokens}[leaf.dtype]
    values = rng.integers(0, most, shape, endpoint=True).astype(leaf.dtype)
    if leaf.shape[:1] in ((4,), (2,)) and len(leaf.shape) == 3:  # mostly true stacks
        for t in range(1, rows):
            keep = rng.random(envs) < 0.8
            values[t, keep, :-1] = values[t - 1, keep, 1:]
    return values


def _actions(space: ActionSpace, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    if isinstance(space, Discrete):
        return rng.integers(0, space.num_actions, shape)
    if isinstance(space, MultiDiscrete):
        return rng.integers(0, np.array(space.sizes), (*shape, len(space.sizes)))
    return rng.standard_normal((*shape, space.num_dims)).astype(np.float32)


def unroll_of(
    spec: EnvSpec, length: int, num_envs: int, state: Nest, rng: np.random.Generator,
    version: int = 0,
) -> Unroll:  # fmt: skip
    """An unroll of noise that breaks no rule; all of one policy version."""
    unroll = empty_unroll(length, num_envs, spec, state)
    rows = (length + 1, num_envs)
    for target, leaf in zip(
        optree.tree_leaves(unroll.observation), optree.tree_leaves(spec.observation), strict=True
    ):
        target[:] = _observation(leaf, *rows, rng)
    unroll.reward[:] = rng.standard_normal(rows)
    unroll.terminated[:] = rng.random(rows) < 0.2
    unroll.truncated[:] = ~unroll.terminated & (rng.random(rows) < 0.2)
    unroll.first[:] = rng.random(rows) < 0.2
    unroll.valid[:] = rng.random((length, num_envs)) < 0.8
    unroll.last_action[:] = _actions(spec.actions, rows, rng)
    unroll.action[:] = _actions(spec.actions, (length, num_envs), rng)
    unroll.behaviour_logits[:] = rng.standard_normal(unroll.behaviour_logits.shape)
    unroll.policy_version[:] = version
    for leaf in optree.tree_leaves(unroll.core_state):
        leaf[:] = rng.standard_normal(leaf.shape)
    return unroll


def rows_of(spec: EnvSpec, num_rows: int, num_envs: int, rng: np.random.Generator) -> list[EnvStep]:
    """Consecutive rows; the first one opens every episode."""
    whole = unroll_of(spec, max(num_rows - 1, 1), num_envs, (), rng)
    whole.first[0] = True
    return [
        EnvStep(
            optree.tree_map(lambda leaf, t=t: leaf[t], whole.observation),
            whole.reward[t], whole.terminated[t], whole.truncated[t], whole.first[t],
            rng.random(num_envs) < 0.1,
        )
        for t in range(num_rows)
    ]  # fmt: skip


def blank(nest: Nest) -> Nest:
    """Arrays like those of ``nest``, full of something else."""
    return optree.tree_map(lambda leaf: np.full_like(leaf, 1), nest)


def same(one: Nest, other: Nest) -> bool:
    """Bit for bit, dtypes included."""
    pairs = zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
