"""Environments as a user writes them, and some that are broken; levels ``tests.my_envs:<name>``."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from asyncagent.envs.base import Outcome
from asyncagent.structs import ArraySpec, Discrete, EnvSpec

Array = npt.NDArray[Any]
Info = dict[str, Any]


class Switches(gymnasium.Env[Array, Array]):
    """Three switches, each shown where it belongs; a third of a point for each that is set right.

    Ten steps per episode: 10 points are the most, a third or so of them is chance.
    """

    SIZES: ClassVar[list[int]] = [3, 2, 4]
    START: ClassVar[list[int]] = [0, 5, -1]

    def __init__(self) -> None:
        self.observation_space: spaces.Space[Any] = spaces.MultiDiscrete(self.SIZES)
        self.action_space = spaces.MultiDiscrete(self.SIZES, start=self.START)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Array, Info]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, Info]:
        assert self.action_space.contains(action)
        reward = float((action - self.START == self.shown).mean())
        self.steps += 1
        return self._show(), reward, False, self.steps == 10, {}

    def _show(self) -> Array:
        self.shown = self.np_random.integers(0, self.SIZES)
        return self.shown


class TwoSenses(gymnasium.Env[dict[str, Array], np.int64]):
    """A picture shows a side, a vector says go or stay: 0 and 1 go to a side, 2 stays.

    One point for what is right, ten steps per episode.  Without the picture 7.5 points are the
    most on average, without the vector 5.
    """

    def __init__(self) -> None:
        self.action_space = spaces.Discrete(3)
        self.observation_space: spaces.Space[Any] = spaces.Dict(
            {
                "picture": spaces.Box(0, 255, (16, 16, 1), np.uint8),
                "order": spaces.Box(-1.0, 1.0, (2,)),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: Info | None = None
    ) -> tuple[dict[str, Array], Info]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action: np.int64) -> tuple[dict[str, Array], float, bool, bool, Info]:
        reward = float(action == self.right)
        self.steps += 1
        return self._show(), reward, self.steps == 10, False, {}

    def _show(self) -> dict[str, Array]:
        side, stay = self.np_random.integers(2, size=2)
        self.right = 2 if stay else side
        picture = np.zeros((16, 16, 1), np.uint8)
        row, column = self.np_random.integers(6, size=2)
        picture[2 + row : 5 + row, 8 * side + column : 8 * side + column + 3] = 255
        return {"picture": picture, "order": np.eye(2, dtype=np.float32)[stay]}


class Mirror(TwoSenses):
    """The vector says whether to go to the side that the picture shows, or to the other one.

    Nets that add up what each sense says reach 7.5 points at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(2)

    def _show(self) -> dict[str, Array]:
        shown = super()._show()
        right_half = shown["picture"][:, 8:].any()
        self.right = int(right_half != bool(shown["order"][1]))
        return shown


class Seeded(Switches):
    """Takes its seed when it is made, and remembers it."""

    def __init__(self, seed: int = -1) -> None:
        super().__init__()
        self.made_with = seed


class Own:
    """An ``Env`` of asyncagent's, without gymnasium: counts its steps, ends at the fifth."""

    spec = EnvSpec(ArraySpec((1,), "float32"), Discrete(2), action_repeats=2)

    def __init__(self) -> None:
        self.count = np.zeros(1, np.float32)

    def reset(self) -> Array:
        self.count = np.zeros(1, np.float32)
        return self.count

    def step(self, action: Array) -> Outcome:
        self.count = self.count + 1
        return Outcome(self.count, float(action), terminated=self.count[0] == 5, truncated=False)

    def close(self) -> None:
        pass


class Raises(Switches):
    """Cannot be made."""

    def __init__(self) -> None:
        raise KeyError("no such\nfile")


class Endless(Switches):
    """Shows what cannot be shown as an array."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict(
            {"log": spaces.Sequence(spaces.Discrete(3)), "time": spaces.Discrete(3)}
        )


def leaves() -> None:
    """Ends the process, or tries to."""
    raise SystemExit(3)


def other() -> dict[str, int]:
    """Gives no environment."""
    return {}


def nothing(size: int) -> None:
    """Takes an argument that nobody gives."""


NUMBER = 3
