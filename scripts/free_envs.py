"""Environments and a policy that cost nothing, and a check of what becomes of their rows.

The environments show uint8 [4, 84, 84]: random bytes out of a ring of buffers, every row stamped
in three places with its group, environment and step.  The policy reads the stamp of every row of
its batch and answers with an action that follows from it.
"""

from __future__ import annotations

import numpy as np

from asyncagent.envs.pool import Rows
from asyncagent.structs import (
    ActionArray,
    ArraySpec,
    Discrete,
    EnvSpec,
    EnvStep,
    IntArray,
    Nest,
    PolicyStep,
    Unroll,
)
from asyncagent.unroll import Columns

SHAPE = (4, 84, 84)
WORDS = int(np.prod(SHAPE)) // 8
STAMPED = (0, WORDS // 2, WORDS - 1)
NUM_ACTIONS = 18
SPEC = EnvSpec(ArraySpec(SHAPE, "uint8"), Discrete(NUM_ACTIONS), 4)
STEP_BITS, ENV_BITS = 40, 12
"""A stamp is group, environment and step, from the high bits to the low ones."""


def words_of(observation: np.ndarray) -> np.ndarray:
    """uint8 [..., 4, 84, 84] as uint64 [..., 3528]; a view."""
    return observation.reshape(*observation.shape[:-3], -1).view(np.uint64)


def action_of(stamps: np.ndarray) -> IntArray:
    """int64: what the policy answers to the rows with these stamps."""
    actions: IntArray = (stamps % NUM_ACTIONS).astype(np.int64)
    return actions


class Ring:
    """What the environments of one group show: the next of four buffers, stamped anew.

    Four, because a row must stay as it is until the step after the next is asked for.
    """

    def __init__(self, index: int, num_envs: int) -> None:
        self.name = f"env-{index}"
        self.num_envs = num_envs
        random = np.random.default_rng(index)
        self._buffers = random.integers(0, 256, (4, num_envs, *SHAPE), np.uint8)
        self._words = words_of(self._buffers)
        self._words[..., STAMPED] = 0
        self._sums = self._words.sum(axis=-1)
        envs = np.arange(num_envs, dtype=np.uint64)
        self._base = np.uint64(index << (ENV_BITS + STEP_BITS)) + (envs << np.uint64(STEP_BITS))
        self._step = -1

    def show(self) -> np.ndarray:
        """uint8 [E, 4, 84, 84]: the next observation."""
        self._step += 1
        slot = self._step % len(self._buffers)
        stamps = self.stamps(self._step)
        for word in STAMPED:
            self._words[slot, :, word] = stamps
        observation: np.ndarray = self._buffers[slot]
        return observation

    def stamps(self, step: int) -> np.ndarray:
        """uint64 [E]: of the rows shown at ``step``."""
        stamps: np.ndarray = self._base + np.uint64(step)
        return stamps

    def checksums(self, step: int) -> np.ndarray:
        """uint64 [E]: sums (mod 2**64) of the words shown at ``step``."""
        sums: np.ndarray = self._sums[step % len(self._buffers)]
        return sums + np.uint64(len(STAMPED)) * self.stamps(step)


class FreeGroup:
    """An ``EnvGroup`` that costs nothing."""

    def __init__(self, ring: Ring) -> None:
        self.spec = SPEC
        self.num_envs = ring.num_envs
        self._ring = ring
        no = np.zeros(ring.num_envs, np.bool_)
        self._row = EnvStep(None, np.zeros(ring.num_envs, np.float32), no, no, no, no)

    async def reset(self) -> EnvStep:
        return self._row._replace(observation=self._ring.show(), first=~self._row.first)

    async def step(self, action: ActionArray) -> EnvStep:
        return self._row._replace(observation=self._ring.show())

    def progress(self) -> None:
        pass

    async def close(self) -> None:
        pass


class FreeEngine:
    """An ``Engine`` that costs nothing, for a ``PoolGroup``, which has a thread."""

    def __init__(self, ring: Ring) -> None:
        self.spec = SPEC
        self.num_envs = ring.num_envs
        self._ring = ring
        no = np.zeros(ring.num_envs, np.bool_)
        self._rows = Rows(None, np.zeros(ring.num_envs, np.float32), no, no, no)

    def reset(self) -> Rows:
        return self._rows._replace(observation=self._ring.show())

    def step(self, action: ActionArray) -> Rows:
        return self._rows._replace(observation=self._ring.show())

    def close(self) -> None:
        pass


def free_policy(
    observation: np.ndarray, reward: Nest, last_action: Nest, first: Nest, core_state: Nest
) -> PolicyStep:
    """A policy that costs nothing; its answer says which row it saw."""
    rows = len(observation)
    return PolicyStep(
        action_of(words_of(observation)[:, 0]),
        np.zeros((rows, NUM_ACTIONS), np.float32),
        (),
        np.zeros(rows, np.int64),
    )


class Verifier:
    """Compares what comes out of the queue with what the environments showed."""

    def __init__(self, rings: list[Ring], whole: float) -> None:
        """All bytes of the first ``whole`` unrolls of every group are summed, then of one row."""
        self._rings = rings
        self._whole = whole
        self._unrolls = [0] * len(rings)
        self._random = np.random.default_rng(0)
        self.steps = 0
        self.rows_summed = 0

    def check(self, parts: list[Columns]) -> None:
        """Mismatch unless these are whole unrolls, every row the one that belongs there."""
        for one, start, stop, _ in parts:
            expect((start, stop) == (0, one.reward.shape[1]), "batches are of whole groups here")
            self._check(one)

    def _check(self, one: Unroll) -> None:
        words = words_of(one.observation)
        index = int(words[0, 0, 0]) >> (ENV_BITS + STEP_BITS)
        expect(index < len(self._rings), f"a row of group {index}, which there is not")
        ring, length = self._rings[index], len(one.action)
        seen, self._unrolls[index] = self._unrolls[index], self._unrolls[index] + 1
        step = seen * length
        stamps = ring.stamps(step) + np.arange(length + 1, dtype=np.uint64)[:, None]
        place = f"group {index}, unroll {seen}"
        for word in STAMPED:
            expect((words[..., word] == stamps).all(), f"{place}: a row that belongs elsewhere")
        expect((one.action == action_of(stamps[:-1])).all(), f"{place}: an answer to another row")
        firsts = (one.first[0] == (seen == 0)).all() and not one.first[1:].any()
        expect(firsts and one.valid.all(), f"{place}: flags that no environment showed")
        summed: list[int] = list(range(length + 1))
        if seen >= self._whole:
            summed = [int(self._random.integers(length + 1))]
        for t in summed:
            same = words[t].sum(axis=-1) == ring.checksums(step + t)
            expect(same.all(), f"{place}, row {t}: another checksum")
        self.steps += one.action.size
        self.rows_summed += len(summed) * ring.num_envs


class Mismatch(Exception):
    """What came out of the queue is not what the environments showed."""


def expect(truth: bool | np.bool_, otherwise: str) -> None:
    """Mismatch(otherwise) unless ``truth``."""
    if not truth:
        raise Mismatch(otherwise)
