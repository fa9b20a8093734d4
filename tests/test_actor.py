"""Alignment of unrolls with trajectories worked out by hand, through group, actor and queue."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from asyncagent.actor import act
from asyncagent.structs import EnvStep, Episode, Unroll
from asyncagent.unroll import UnrollQueue, gather_columns
from tests.fakes import CounterGroup, CountingPolicy

WATCHDOG_S = 30


def collect(
    group: CounterGroup, unroll_length: int, count: int
) -> tuple[list[Unroll], list[Episode]]:
    """The first ``count`` unrolls that an actor makes of ``group``, copied."""
    policy = CountingPolicy()
    episodes: list[Episode] = []
    stepped = 0

    def on_row(row: EnvStep) -> None:
        nonlocal stepped
        stepped += len(row.reward)
        episodes.extend(row.episodes)

    async def run() -> list[Unroll]:
        queue = UnrollQueue(group.num_envs, group.num_envs)
        state = policy.initial_state(group.num_envs)
        actor = asyncio.create_task(act(group, policy, queue.put, unroll_length, state, on_row))
        unrolls = []
        async with asyncio.timeout(WATCHDOG_S):
            for _ in range(count):
                parts = await queue.get()
                unrolls.append(gather_columns(parts))
                queue.release(parts)
        actor.cancel()
        with pytest.raises(asyncio.CancelledError):
            await actor
        return unrolls

    unrolls = asyncio.run(run())
    assert stepped >= count * unroll_length * group.num_envs
    return unrolls, episodes


def test_every_field_of_an_unroll() -> None:
    """Two unrolls of T=4 of one environment: an end in mid-unroll, its opening row, the seam.

    Episodes last 2 steps: rows 0 1 2* | 3 4 5* | 6 7 8* (* marks end rows), rewards are the row
    numbers, the action chosen at row n is n % 3, opening rows have reward 0 and last action 0.
    """
    (one, two), _ = collect(CounterGroup([[2]]), unroll_length=4, count=2)
    assert one.observation[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert one.first[:, 0].tolist() == [True, False, False, True, False]
    assert one.terminated[:, 0].tolist() == [False, False, True, False, False]
    assert one.truncated[:, 0].tolist() == [False] * 5
    assert one.reward[:, 0].tolist() == [0, 1, 2, 0, 4]
    assert one.action[:, 0].tolist() == [0, 1, 2, 0]
    assert one.last_action[:, 0].tolist() == [0, 0, 1, 0, 0]
    assert one.valid[:, 0].tolist() == [True, True, False, True]
    assert one.behaviour_logits[:, 0, 1].tolist() == [0, 1, 2, 3]
    assert one.policy_version[:, 0].tolist() == [0, 1, 2, 3]
    assert one.core_state[0].tolist() == [[0]]

    assert two.observation[:, 0, 0].tolist() == [4, 5, 6, 7, 8]
    assert two.first[:, 0].tolist() == [False, False, True, False, False]
    assert two.terminated[:, 0].tolist() == [False, True, False, False, True]
    assert two.reward[:, 0].tolist() == [4, 5, 0, 7, 8]
    assert two.action[:, 0].tolist() == [1, 2, 0, 1]
    assert two.last_action[:, 0].tolist() == [0, 1, 0, 0, 1]
    assert two.valid[:, 0].tolist() == [True, False, True, True]
    assert two.policy_version[:, 0].tolist() == [4, 5, 6, 7]


def test_core_state_is_taken_before_row_0_and_before_its_zeroing() -> None:
    """The state counts rows since ``first``; an unroll holds it as it was before its row 0.

    T=3 and episodes of 2 steps: the second unroll opens an episode at its row 0 (row 3), so the
    state recorded there is that of the old episode, 3 rows long, although the net zeroes it.
    """
    (one, two, three), _ = collect(CounterGroup([[2]]), unroll_length=3, count=3)
    assert two.first[0, 0]
    assert one.core_state[0].tolist() == [[0]]
    assert two.core_state[0].tolist() == [[3]]
    assert three.core_state[0].tolist() == [[3]]


def test_last_row_is_the_next_unrolls_first() -> None:
    """Row T of one unroll and row 0 of the next agree in every field, ends on the seam included."""
    group = CounterGroup([[4], [3, 1, 7]], truncations=[(0, 0)])
    unrolls, _ = collect(group, unroll_length=4, count=4)
    assert unrolls[0].truncated[4, 0], "the trajectory has an end on the seam"
    for before, after in itertools.pairwise(unrolls):
        for field in ("observation", "reward", "terminated", "truncated", "first", "last_action"):
            assert np.array_equal(getattr(before, field)[-1], getattr(after, field)[0]), field


def test_end_row_on_the_seam_is_invalid_in_the_next_unroll() -> None:
    """An end row at row T carries no action there; at row 0 of the next unroll it is not valid."""
    (one, two), _ = collect(CounterGroup([[4]]), unroll_length=4, count=2)
    assert one.terminated[4, 0]
    assert one.valid[:, 0].all()
    assert two.valid[:, 0].tolist() == [False, True, True, True]
    assert two.first[:, 0].tolist() == [False, True, False, False, False]


def test_neighbouring_columns_are_independent() -> None:
    """An environment's end leaves its neighbour's flags, rewards and validity alone."""
    (one,), _ = collect(CounterGroup([[2], [9]]), unroll_length=4, count=1)
    assert one.reward[:, 1].tolist() == [0, 101, 102, 103, 104]
    assert one.valid[:, 1].all()
    assert not one.terminated[:, 1].any()


def test_truncation_is_kept_apart_from_termination() -> None:
    """A time limit sets ``truncated`` and not ``terminated``; both make the row invalid."""
    (one,), _ = collect(CounterGroup([[2]], truncations=[(0, 0)]), unroll_length=4, count=1)
    assert one.truncated[:, 0].tolist() == [False, False, True, False, False]
    assert not one.terminated.any()
    assert one.valid[:, 0].tolist() == [True, True, False, True]


def test_engine_receives_the_recorded_actions() -> None:
    """Action t of an unroll is what the engine was sent between rows t and t+1."""
    group = CounterGroup([[3], [5]])
    (one, two), _ = collect(group, unroll_length=3, count=2)
    sent = np.stack(group.actions[:6])
    assert np.array_equal(sent, np.concatenate([one.action, two.action]))


def test_episodes_are_counted_once_with_their_steps() -> None:
    """Episodes of 2 steps over rows 1 2 | 4 5 have returns 3 and 9, and 2 steps each."""
    _, episodes = collect(CounterGroup([[2]]), unroll_length=6, count=1)
    assert [(e.episode_return, e.steps) for e in episodes[:2]] == [(3.0, 2), (9.0, 2)]


def test_buffers_are_reused_but_never_while_in_use() -> None:
    """An unroll that the learner holds is not written to; released ones come back."""
    group = CounterGroup([[1000]])
    policy = CountingPolicy()

    async def run() -> None:
        queue = UnrollQueue(1, 1)
        actor = asyncio.create_task(
            act(group, policy, queue.put, 2, policy.initial_state(1), lambda row: None)
        )
        async with asyncio.timeout(WATCHDOG_S):
            held = await queue.get()
            before = held[0].unroll.observation.copy()
            seen = set()
            for _ in range(20):
                parts = await queue.get()
                seen.add(id(parts[0].unroll))
                queue.release(parts)
            assert np.array_equal(held[0].unroll.observation, before)
            assert id(held[0].unroll) not in seen
            assert len(seen) <= 3, "buffers are reused"
        actor.cancel()

    asyncio.run(run())


def test_a_lost_environment_masks_its_own_column_until_it_is_replaced() -> None:
    """Neither the action on the way to a lost row nor those at lost rows are valid; the first row
    of the replacement is as any episode's; the neighbour's column does not notice."""
    group = CounterGroup([[1000], [1000]], lost=[(0, 2), (0, 3), (0, 5)])
    first, second = collect(group, 4, 2)[0]
    t, f = True, False
    assert first.valid[:, 0].tolist() == [t, f, f, f]
    assert first.first[:, 0].tolist() == [t, f, f, f, t]
    # Row 5 is lost on the seam's far side: the replacement's only action went nowhere.
    assert second.valid[:, 0].tolist() == [f, f, t, t]
    assert second.first[:, 0].tolist() == [t, f, t, f, f]
    assert first.valid[:, 1].all() and second.valid[:, 1].all()
    assert first.last_action[:, 0, ...].tolist() == [0, 0, 0, 0, 0]
    assert second.last_action[:, 0].tolist() == [0, 0, 0, 0, 1]
    assert second.last_action[:, 1].tolist() == [0, 1, 2, 0, 1]


def test_an_environment_lost_on_the_seam_masks_the_unroll_before() -> None:
    """Row T is lost: the last action of the unroll that ends there is not valid."""
    first, second = collect(CounterGroup([[1000]], lost=[(0, 3)]), 3, 2)[0]
    assert first.valid[:, 0].tolist() == [True, True, False]
    assert second.valid[:, 0].tolist() == [False, True, True]
    assert second.first[:, 0].tolist() == [False, True, False, False]


def test_frames_of_lost_rows_are_not_counted() -> None:
    """A lost row is a loss and no frame; the games of the replacement are counted anew."""
    episodes = collect(CounterGroup([[3]], lost=[(0, 2)]), 8, 1)[1]
    assert [(e.episode_return, e.steps) for e in episodes[:1]] == [(4.0 + 5.0 + 6.0, 3)]
