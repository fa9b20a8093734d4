"""The bench of the loop: it measures the program's own path, and it sees what goes wrong there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import bench_loop
from asyncagent import batch
from asyncagent.structs import EnvStep, Unroll
from asyncagent.unroll import Columns, UnrollWriter, empty_unroll
from free_envs import SPEC, Mismatch, Ring, Verifier, action_of, free_policy, words_of

T, E = 3, 2
WATCHDOG_S = 60


def unroll_of(ring: Ring) -> Unroll:
    """The first unroll of the ring's environments, as an actor makes it."""
    no = np.zeros(E, np.bool_)
    row = EnvStep(ring.show(), np.zeros(E, np.float32), no, no, ~no, no)
    last = np.zeros(E, np.int64)
    writer = UnrollWriter(empty_unroll(T, E, SPEC, ()), ())
    writer.add_row(row, last)
    for _ in range(T):
        writer.add_choice(free_policy(row.observation, row.reward, last, row.first, ()))
        row = EnvStep(ring.show(), row.reward, no, no, no, no)
        writer.add_row(row, last)
    return writer.finish()


def flip_a_bit(unroll: Unroll) -> None:
    unroll.observation[1, 1, 2, 40, 40] ^= 4


def swap_columns(unroll: Unroll) -> None:
    unroll.observation[2] = unroll.observation[2, ::-1].copy()


def repeat_a_row(unroll: Unroll) -> None:
    unroll.observation[3] = unroll.observation[2]


def tear(unroll: Unroll) -> None:
    unroll.observation[2, 0, 2:] = unroll.observation[1, 0, 2:]


def swap_answers(unroll: Unroll) -> None:
    unroll.action[1] = unroll.action[1, ::-1].copy()


def open_an_episode(unroll: Unroll) -> None:
    unroll.first[2, 1] = True


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (flip_a_bit, "row 1: another checksum"),
        (swap_columns, "a row that belongs elsewhere"),
        (repeat_a_row, "a row that belongs elsewhere"),
        (tear, "a row that belongs elsewhere"),
        (swap_answers, "an answer to another row"),
        (open_an_episode, "flags that no environment showed"),
    ],
)
def test_the_verifier_sees(spoil: Callable[[Unroll], None], verdict: str) -> None:
    """An unroll as the environments showed it passes; with anything spoilt it does not."""
    ring = Ring(0, E)
    unroll = unroll_of(ring)
    verifier = Verifier([ring], whole=1)
    verifier.check([Columns(unroll, 0, E)])
    assert (verifier.steps, verifier.rows_summed) == (T * E, (T + 1) * E)
    spoil(unroll)
    with pytest.raises(Mismatch, match=verdict):
        Verifier([ring], whole=1).check([Columns(unroll, 0, E)])


def test_every_row_is_another() -> None:
    """No two rows have the same stamp, and answers differ between neighbours."""
    rings = [Ring(index, E) for index in range(2)]
    stamps = np.array([ring.stamps(step) for ring in rings for step in range(9)])
    assert len(np.unique(stamps)) == stamps.size
    assert (action_of(stamps[1:9]) != action_of(stamps[:8])).all()
    shown = [words_of(ring.show()) for ring in rings]
    assert [(words[:, 0] == ring.stamps(0)).all() for words, ring in zip(shown, rings, strict=True)]


async def briefly(cell: bench_loop.Cell) -> bench_loop.Result:
    async with asyncio.timeout(WATCHDOG_S):
        return await bench_loop.measure(cell, seconds=0.0)


@pytest.mark.parametrize("env_threads", [False, True])
def test_measure(env_threads: bool) -> None:
    """Every step that is counted went through batcher and queue and was verified."""
    cell = bench_loop.Cell(3, E, T, 1024, env_threads)
    profile = bench_loop.Profile()
    with profile():
        result = asyncio.run(briefly(cell))
    assert {label for _, label in profile.seconds} == {label for *_, label in bench_loop.HOT_PATH}
    assert result.group_steps >= T and result.steps_per_s > 0
    assert 1 / (T + 1) <= result.summed_share * 1.001 <= 1.001
    assert {"MainThread", "inference", "verifier"} <= result.cpu_s.keys()
    assert ("env" in result.cpu_s) == env_threads


def test_measure_fails_where_answers_are_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batcher that hands callers each other's rows ends the measurement."""
    split = batch._split

    def mixed(outputs: Any, sizes: Any) -> Any:
        return split(outputs, sizes)[::-1]

    monkeypatch.setattr(batch, "_split", mixed)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(briefly(bench_loop.Cell(3, E, T, 1024, False)))
    assert caught.group_contains(Mismatch, match="an answer to another row")
