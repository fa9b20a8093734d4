"""The battles' measurements and reward shaping, against figures worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from asyncagent.envs.doom_rewards import NUM_MEASUREMENTS, measurements, selected_weapon, shaping

EVERYTHING = {
    "SELECTED_WEAPON": 5.0,
    "SELECTED_WEAPON_AMMO": 30.0,
    "HEALTH": 45.0,
    "ARMOR": 60.0,
    "USER2": 12.0,
    "ATTACK_READY": 1.0,
    "PLAYER_COUNT": 4.0,
    **{f"WEAPON{k}": float(k % 3) for k in range(8)},
    **{f"AMMO{k}": 10.0 * k for k in range(8)},
}


def test_measurements_in_their_order() -> None:
    """Each of the 23 numbers stands where it belongs, scaled as it should be."""
    found = measurements(EVERYTHING)
    assert found.dtype == np.float32 and found.shape == (NUM_MEASUREMENTS,)
    expected: list[float] = [5, 2, 1.5, 2, 1.2, 1, 0.8, 0, 1, 2, 0, 1, 2, 0, 1]
    expected += [0, 10 / 15, 20 / 15, 2, 40 / 15, 50 / 15, 4, 70 / 15]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)


def test_measurements_of_what_a_battle_offers() -> None:
    """What the scenario does not offer is 0; there is one player unless it says otherwise."""
    found = measurements(
        {
            **{"POSITION_X": 700.0, "POSITION_Y": -3.0, "ANGLE": 90.0},
            **{"SELECTED_WEAPON": 2.0, "SELECTED_WEAPON_AMMO": 18.0, "HEALTH": 81.0, "USER2": 3.0},
        }
    )
    expected = [2, 1.2, 2.7, 0, 0.3, 0, 0.2] + [0] * 16
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)


def test_measurements_stay_small() -> None:
    """Ammo counts up to 75 rounds; no weapon in hand and a dead player's health count as 0."""
    found = measurements(
        {"SELECTED_WEAPON": -1.0, "SELECTED_WEAPON_AMMO": 400.0, "AMMO4": 76.0, "HEALTH": -8.0}
    )
    assert found[0] == 0 and found[1] == 5 and found[2] == 0 and found[15 + 4] == 5
    assert measurements({"SELECTED_WEAPON_AMMO": -1.0, "AMMO4": -1.0}).sum() == np.float32(0.2)


@pytest.mark.parametrize(
    ("said", "slot"), [(-1.0, 0), (0.0, 0), (2.0, 2), (2.9999, 3), (6.0001, 6)]
)
def test_selected_weapon(said: float, slot: int) -> None:
    """The weapon's slot is a whole number, 0 without a weapon."""
    assert selected_weapon({"SELECTED_WEAPON": said}) == slot


@pytest.mark.parametrize(
    ("name", "change", "reward"),
    [
        ("HEALTH", 10, 0.05),
        ("HEALTH", -10, -0.03),
        ("ARMOR", 4, 0.02),
        ("ARMOR", -4, -0.004),
        ("HITCOUNT", 3, 0.03),
        ("HITCOUNT", 9, 0.05),
        ("HITCOUNT", -9, -0.09),
        ("DAMAGECOUNT", 100, 0.3),
        ("DAMAGECOUNT", 1000, 0.6),
        ("DAMAGECOUNT", -300, -0.9),
        ("FRAGCOUNT", 2, 2.0),
        ("FRAGCOUNT", -1, -1.5),
        ("DEATHCOUNT", 1, -0.75),
        ("DEATHCOUNT", -1, 0.75),
        ("WEAPON1", 1, 0.02),
        ("WEAPON2", -1, -0.01),
        ("WEAPON3", 1, 0.1),
        ("WEAPON5", -1, -0.05),
        ("WEAPON6", 1, 0.2),
        ("WEAPON7", -1, -0.1),
        ("AMMO0", 10, 0.002),
        ("AMMO2", -10, -0.001),
        ("AMMO4", 10, 0.01),
        ("AMMO5", -10, -0.005),
        ("AMMO6", 10, 0.02),
        ("AMMO7", -10, -0.01),
        ("USER2", 1, 0.0),
        ("POSITION_X", 500, 0.0),
        ("SELECTED_WEAPON_AMMO", 20, 0.0),
        ("HEALTH", 0, 0.0),
    ],
)
def test_reward_of_a_change(name: str, change: float, reward: float) -> None:
    """A variable's gain and loss each have their price per unit, some gains a limit."""
    assert shaping({name: 50.0}, {name: 50.0 + change}, 1) == pytest.approx(reward)


def test_changes_add_up() -> None:
    """Several changes in one step are each paid; what only one of the two knows is not."""
    before = {"HEALTH": 100.0, "AMMO2": 20.0, "ARMOR": 7.0}
    after = {"HEALTH": 90.0, "AMMO2": 18.0, "HITCOUNT": 2.0}
    assert shaping(before, after, 1) == pytest.approx(-0.03 - 0.0002)


@pytest.mark.parametrize(
    ("slot", "ammo", "steps", "reward"),
    [
        (2, 1, 4, 0.0),
        (2, 1, 5, 0.0002),
        (2, 1, 500, 0.0002),
        (2, 0, 5, 0.0),
        (2, -1, 5, 0.0),
        (3, 8, 5, 0.001),
        (5, 8, 5, 0.001),
        (6, 8, 5, 0.002),
        (7, 8, 5, 0.002),
        (9, 8, 5, 0.0002),
    ],
)
def test_reward_of_keeping_a_weapon(slot: int, ammo: int, steps: int, reward: float) -> None:
    """From the fifth step on a loaded weapon in hand pays, the better the more."""
    hand = {"SELECTED_WEAPON": float(slot), "SELECTED_WEAPON_AMMO": float(ammo)}
    assert shaping(hand, hand, steps) == pytest.approx(reward)
