"""The conversation between one environment group and the policy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np

from asyncagent.envs.base import EnvGroup
from asyncagent.structs import ActionArray, EnvStep, Nest, PolicyStep, Unroll
from asyncagent.tracks import KEEPS_BOOKS, STEPS, WAITS_ACTIONS, WAITS_LEARNER, Track
from asyncagent.unroll import UnrollBuffers, UnrollWriter, empty_unroll

Infer = Callable[..., Awaitable[PolicyStep]]
"""(observation, reward, last_action, first, core_state), rows [E, ...] -> PolicyStep."""

Put = Callable[[Unroll, Callable[[Unroll], None]], Awaitable[None]]
"""(unroll, give_back): takes the unroll, waits where it must; see ``UnrollQueue.put``."""


class Carried(NamedTuple):
    """What an actor takes from one unroll to the next."""

    row: EnvStep
    """The last; the next unroll begins with it."""
    last_action: ActionArray
    """[E, ...]; what led to it."""
    core_state: Nest
    """After it; nest of float32 [E, ...]."""


async def act(
    group: EnvGroup,
    infer: Infer,
    put: Put,
    unroll_length: int,
    initial_state: Nest,
    on_row: Callable[[EnvStep], None],
    *,
    carried: Carried | None = None,
    between: Callable[[Carried], Awaitable[None]] | None = None,
    track: Track | None = None,
) -> None:
    """Step ``group`` with the policy for ever and put an unroll every T steps.

    Args:
      initial_state: core state before the first row, nest of float32 [E, ...].
      on_row: called with every row.
      carried: go on from there; the group has been restored, and is not reset.
      between: awaited between two unrolls.
      track: of four states, told what the group does.

    Ends by cancellation, or by EndOfUnrolls once nobody takes unrolls any more.
    """
    track = track or Track(4)
    buffers = UnrollBuffers(
        lambda: empty_unroll(unroll_length, group.num_envs, group.spec, initial_state)
    )
    if carried is None:
        row = await group.reset()
        on_row(row)
        one = group.spec.actions.array
        nothing: ActionArray = np.zeros((group.num_envs, *one.shape), one.dtype)
        carried = Carried(row, nothing, initial_state)
    row, last_action, core_state = carried
    while True:
        writer = UnrollWriter(buffers.take(), core_state)
        writer.add_row(row, last_action)
        for _ in range(unroll_length):
            track.enter(WAITS_ACTIONS)
            choice = await infer(row.observation, row.reward, last_action, row.first, core_state)
            track.enter(STEPS)
            writer.add_choice(choice)
            core_state = choice.core_state
            row = await group.step(choice.action)
            track.enter(KEEPS_BOOKS)
            last_action = action_that_led_to(row, choice.action)
            writer.add_row(row, last_action)
            on_row(row)
        unroll = writer.finish()
        track.enter(WAITS_LEARNER)
        await put(unroll, buffers.give_back)
        if between is not None:
            await between(Carried(row, last_action, core_state))
        track.enter(KEEPS_BOOKS)


def action_that_led_to(row: EnvStep, action: ActionArray) -> ActionArray:
    """``action`` [E, ...], and 0 where none led to the row: it opens an episode, or was lost."""
    went_nowhere = row.first | row.lost
    if not np.count_nonzero(went_nowhere):  # of a few numbers a fifth of the time of any()
        return action
    action = action.copy()
    action[went_nowhere] = 0
    return action
