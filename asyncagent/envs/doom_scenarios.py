"""The ten ViZDoom scenarios: actions, rewards, time limits and rendering, as the ancestor's.

Of all this an installed package contributes the map alone, since the packages' own ``.cfg`` files
differ.  One map differs too: ``doom_health_gathering_supreme`` is not the ancestor's (md5 1310b...
against 6605...), so that its scores do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

Alternative: TypeAlias = tuple[str, float] | None
"""A button and its value while it is held; None presses nothing."""

Part: TypeAlias = tuple[Alternative, ...]
"""The alternatives of one choice."""


@dataclass(frozen=True)
class Scenario:
    """The rules of a scenario. Times are in tics, of which the game's second has 35."""

    wad: str
    """File of the map, ``MAP01`` of it."""
    parts: tuple[Part, ...]
    """Choices made at the same time; an action is one alternative of each."""
    variables: tuple[str, ...]
    """Of the engine's game variables, those it tells of."""
    skill: int | None
    """1 (easy) to 5; None: the engine's own, as the package's cfg leaves it."""
    timeout: int
    """Tics after which an episode is cut off; 0: never."""
    start: int = 1
    """Tic with which an episode begins: by then the weapon is in hand."""
    living_reward: float = 0.0
    """Per tic."""
    death_penalty: float = 0.0
    reward_scale: float = 1.0
    """Times which the engine's rewards are taken, the two above included."""
    health_bonus: float = 0.0
    """Reward of a step after which HEALTH is higher than before, the episode's last excepted."""
    hud: bool = False
    crosshair: bool = False
    weapon: bool = True
    battle: bool = False
    """Measurements are observed too, and rewards are shaped (see ``doom_rewards``)."""
    md5: str | None = None
    """Of the map, where nothing but this one will do."""


def buttons_of(parts: Iterable[Part]) -> list[str]:
    """Every button that is pressed in ``parts``, once, in the order in which they appear."""
    return list(dict.fromkeys(press[0] for part in parts for press in part if press is not None))


def _one_of(*buttons: str) -> Part:
    return (None, *((button, 1.0) for button in buttons))


_ANGLES: Part = tuple(("TURN_LEFT_RIGHT_DELTA", float(turn)) for turn in range(-10, 11, 2))
"""Degrees per tic, to the right."""

_BATTLE: dict[str, Any] = {
    "variables": (
        *("POSITION_X", "POSITION_Y", "ANGLE"),
        *("SELECTED_WEAPON", "SELECTED_WEAPON_AMMO", "HEALTH", "USER2"),
    ),
    "skill": 2,
    "timeout": 2100,
    "hud": True,
    "crosshair": True,
}
_D3_BATTLE: dict[str, Any] = {"wad": "D3_battle.wad", "md5": "4755d4bb4317488205a7a7af09c8e9a1"}
_BATTLE_PARTS = (
    _one_of("MOVE_FORWARD", "MOVE_BACKWARD"),
    _one_of("MOVE_RIGHT", "MOVE_LEFT"),
    _one_of("ATTACK"),
    _one_of("SPEED"),
    _ANGLES,
)
_GATHERING: dict[str, Any] = {
    "parts": (_one_of("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_BACKWARD"),),
    "variables": ("HEALTH",),
    "skill": None,
    "timeout": 2100,
    "living_reward": 0.01,
    "health_bonus": 1.0,
    "weapon": False,
}
_DEFENCE: dict[str, Any] = {
    "parts": (_one_of("TURN_LEFT", "TURN_RIGHT", "ATTACK"),),
    "variables": ("AMMO2", "HEALTH"),
    "skill": 3,
    "start": 10,
    "death_penalty": 1.0,
    "hud": True,
}

LEVELS: dict[str, Scenario] = {
    "doom_basic": Scenario(
        wad="basic.wad",
        parts=(_one_of("MOVE_LEFT", "MOVE_RIGHT", "ATTACK"),),
        variables=("AMMO2", "POSITION_X", "POSITION_Y", "ANGLE"),
        skill=5,
        timeout=300,
        start=14,
        living_reward=-1.0,
        reward_scale=0.01,
        hud=True,
    ),
    "doom_battle": Scenario(**_D3_BATTLE, parts=_BATTLE_PARTS, battle=True, **_BATTLE),
    "doom_battle2": Scenario(wad="D4_battle2.wad", parts=_BATTLE_PARTS, battle=True, **_BATTLE),
    "doom_benchmark": Scenario(
        **_D3_BATTLE,
        parts=(
            _one_of(
                *("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_RIGHT", "MOVE_LEFT"),
                *("TURN_RIGHT", "TURN_LEFT", "ATTACK", "SPEED"),
            ),
        ),
        **_BATTLE,
    ),
    "doom_deadly_corridor": Scenario(
        wad="deadly_corridor.wad",
        parts=(
            _one_of(
                *("MOVE_LEFT", "MOVE_RIGHT", "ATTACK", "MOVE_FORWARD", "MOVE_BACKWARD"),
                *("TURN_LEFT", "TURN_RIGHT"),
            ),
        ),
        variables=("HEALTH",),
        skill=5,
        timeout=2100,
        death_penalty=100.0,
        reward_scale=0.01,
        hud=True,
    ),
    "doom_defend_the_center": Scenario(wad="defend_the_center.wad", timeout=2100, **_DEFENCE),
    "doom_defend_the_line": Scenario(wad="defend_the_line.wad", timeout=0, **_DEFENCE),
    "doom_health_gathering": Scenario(wad="health_gathering.wad", **_GATHERING),
    "doom_health_gathering_supreme": Scenario(wad="health_gathering_supreme.wad", **_GATHERING),
    "doom_my_way_home": Scenario(
        wad="my_way_home.wad",
        parts=(_one_of("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_BACKWARD"),),
        variables=("AMMO0",),
        skill=5,
        timeout=2100,
        start=10,
        living_reward=-0.0001,
    ),
}
