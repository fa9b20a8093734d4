"""The battles' measurements and shaped rewards, as functions of ViZDoom's game variables.

Variables come as a mapping from their names (``HEALTH``) to numbers; what a scenario does not
offer is missing from it and counts as zero, or, in a change, not at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from asyncagent.structs import FloatArray

NUM_MEASUREMENTS = 23

_NUM_SLOTS = 8
_PREFERENCE = (1, 1, 1, 5, 5, 5, 10, 10)
"""How much the weapon of a slot, and its ammo, is worth; fists, pistol, ..., plasma gun, BFG."""

_PER_UNIT = {
    "HEALTH": (0.005, -0.003),
    "ARMOR": (0.005, -0.001),
    "HITCOUNT": (0.01, -0.01),
    "DAMAGECOUNT": (0.003, -0.003),
    "FRAGCOUNT": (1.0, -1.5),
    "DEATHCOUNT": (-0.75, 0.75),
    **{f"WEAPON{k}": (0.02 * p, -0.01 * p) for k, p in enumerate(_PREFERENCE)},
    **{f"AMMO{k}": (0.0002 * p, -0.0001 * p) for k, p in enumerate(_PREFERENCE)},
}
"""Reward per unit of a variable's gain, and of its loss."""

_LARGEST_GAIN = {"HITCOUNT": 5.0, "DAMAGECOUNT": 200.0}
"""Of one step: a rocket into a crowd is not worth more."""

_HELD_REWARD = 0.0002
_HELD_STEPS = 4


def measurements(variables: Mapping[str, float]) -> FloatArray:
    """What a battle tells besides the image: float32 [23], scaled to small numbers.

    In this order: slot of the selected weapon; its ammo / 15, at most 5; health / 30; armour / 30;
    kills (USER2) / 10; whether an attack is possible; players / 5; number of weapons in slots
    0 ... 7; ammo of slots 0 ... 7, / 15, at most 5.
    """

    def of(name: str) -> float:
        return variables.get(name, 0.0)

    return np.array(
        [
            selected_weapon(variables),
            _ammo(of("SELECTED_WEAPON_AMMO")),
            max(0.0, of("HEALTH")) / 30,
            of("ARMOR") / 30,
            of("USER2") / 10,
            of("ATTACK_READY"),
            variables.get("PLAYER_COUNT", 1.0) / 5,
            *(max(0.0, of(f"WEAPON{k}")) for k in range(_NUM_SLOTS)),
            *(_ammo(of(f"AMMO{k}")) for k in range(_NUM_SLOTS)),
        ],
        np.float32,
    )


def selected_weapon(variables: Mapping[str, float]) -> int:
    """Slot of the weapon in hand; 0 where the engine says -1, none."""
    return round(max(0.0, variables.get("SELECTED_WEAPON", 0.0)))


def shaping(
    before: Mapping[str, float], after: Mapping[str, float], weapon_held_steps: int
) -> float:
    """What a step within an episode earns besides the scenario's own reward.

    Args:
      before: variables before the step.
      after: variables after it.
      weapon_held_steps: consecutive steps that ended with the weapon now in hand, this one
        included.
    """
    reward = sum(
        _change_reward(name, after[name] - before[name])
        for name in _PER_UNIT
        if name in after and name in before
    )
    if weapon_held_steps > _HELD_STEPS and after.get("SELECTED_WEAPON_AMMO", 0.0) > 0:
        slot = selected_weapon(after)
        reward += _HELD_REWARD * (_PREFERENCE[slot] if slot < _NUM_SLOTS else 1)
    return reward


def _change_reward(name: str, change: float) -> float:
    gain, loss = _PER_UNIT[name]
    if change < 0:
        return -change * loss
    return min(change, _LARGEST_GAIN.get(name, change)) * gain


def _ammo(rounds: float) -> float:
    return min(max(0.0, rounds) / 15, 5.0)
