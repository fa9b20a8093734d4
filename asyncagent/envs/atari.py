"""Atari games as environments: names, protocols, episodes.

A level is ``atari_<game>``, the game as its ROM is called (``atari_space_invaders``); three
spellings of the ancestor work too.

Both backends follow one protocol, because what they disagree on is decided here:

- *Opening*: after an end row the action sent is replaced by the protocol's opening action, held
  for one agent step as any other; the row it leads to opens the next episode.  impala2018 opens
  with FIRE (the game may wait for it), or with NOOP where the game does not know FIRE;
  machado2018 opens with NOOP.
- *Games*: a finished game is restarted before the opening: up to 30 no-op frames in impala2018,
  none in machado2018 (``emulators.py`` says what each backend makes of that).  A game goes on
  through life losses.
- *Life loss* (impala2018): the episode terminates when the number of lives falls but not to 0.
  Only the opening follows, no no-ops.  A life lost during the opening goes unnoticed.
- *Time limit*: after ``MAX_FRAMES`` frames of a game, openings counted and no-ops not, the episode
  is truncated (unless it ended by itself at that step) and the game is over.
- *Points* scored during an opening count in the game's return and reach no row.
- An opening row is at once an end row if the game ends during the opening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncagent.envs.base import env_seeds
from asyncagent.envs.emulators import SIZE, STACK, AleEmulators, Emulators, EnvpoolEmulators
from asyncagent.envs.pool import Rows
from asyncagent.errors import UsageError
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, IntArray

PREFIX = "atari_"
MAX_FRAMES = 108_000
"""Half an hour at 60 frames per second: 27,000 agent steps of 4 frames."""
OBSERVATION = ArraySpec((STACK, SIZE, SIZE), "uint8")

ALIASES = {
    "montezuma": "montezuma_revenge",
    "mspacman": "ms_pacman",
    "spaceinvaders": "space_invaders",
}
"""The ancestor's spellings."""

_GAMES = {
    3: "backgammon freeway skiing",
    4: "atlantis atlantis2 blackjack breakout casino kaboom",
    5: "frogger pacman surround tetris video_checkers",
    6: """air_raid basic_math bowling carnival demon_attack galaxian king_kong name_this_game pong
        pooyan qbert sir_lancelot space_invaders up_n_down""",
    7: "assault",
    8: "gopher phoenix tutankham",
    9: """asterix beam_rider crazy_climber enduro koolaid lost_luggage ms_pacman
        video_pinball""",
    10: """amidar mr_do othello tic_tac_toe_3d time_pilot video_chess wizard_of_wor""",
    12: "turmoil",
    14: "asteroids keystone_kapers kung_fu_master",
    16: "journey_escape",
    18: """adventure alien bank_heist battle_zone berzerk boxing centipede chopper_command crossbow
        darkchambers defender donkey_kong double_dunk earthworld elevator_action entombed et
        fishing_derby flag_capture frostbite gravitar hangman haunted_house hero human_cannonball
        ice_hockey jamesbond kangaroo klax krull laser_gates mario_bros miniature_golf
        montezuma_revenge pitfall pitfall2 private_eye riverraid road_runner robotank seaquest
        solaris space_war star_gunner superman tennis trondead venture video_cube word_zapper
        yars_revenge zaxxon""",
}
MINIMAL_ACTIONS = {game: count for count, games in _GAMES.items() for game in games.split()}
"""Every game, with the number of actions that it reacts to."""

_FULL_ACTIONS = 18
_FULL_ACTIONS_WITHOUT_FIRE = {"lost_luggage": 9, "skiing": 9}

# A minimal action set begins NOOP, FIRE, ... except where the game has no FIRE,
_WITHOUT_FIRE = frozenset(
    game
    for games in (
        "asterix crazy_climber freeway frogger journey_escape koolaid kung_fu_master",
        "lost_luggage ms_pacman pacman skiing surround tutankham",
    )
    for game in games.split()
)
# and in these two, which have no NOOP.
_WITHOUT_NOOP = frozenset({"backgammon", "video_checkers"})


@dataclass(frozen=True)
class Protocol:
    """The rules by which games are turned into episodes."""

    sticky: float
    """Probability, per frame, that the emulator repeats the action before."""
    max_noops: int
    """Most no-op frames at the start of a game."""
    opens_with_fire: bool
    life_loss_ends_episode: bool
    full_action_space: bool


PROTOCOLS = {
    "impala2018": Protocol(0.0, 30, True, True, False),
    "machado2018": Protocol(0.25, 0, False, False, True),
}
"""impala2018: Espeholt et al. 2018 (arXiv 1802.01561), appendix. machado2018: Machado et al. 2018
(arXiv 1709.06009), section 5."""


def game_of(level_name: str) -> str:
    """The game that ``atari_<game>`` names; UsageError if there is none."""
    name = level_name.removeprefix(PREFIX)
    game = ALIASES.get(name, name)
    if not level_name.startswith(PREFIX) or game not in MINIMAL_ACTIONS:
        raise UsageError(f"{level_name!r} is no Atari level")
    return game


def atari_spec(game: str, protocol: str, action_repeats: int) -> EnvSpec:
    """Observation uint8 [4, 84, 84] and the protocol's action set; asks no engine."""
    num_actions = MINIMAL_ACTIONS[game]
    if PROTOCOLS[protocol].full_action_space:
        num_actions = _FULL_ACTIONS_WITHOUT_FIRE.get(game, _FULL_ACTIONS)
    return EnvSpec(OBSERVATION, Discrete(num_actions), action_repeats)


def opening_action(game: str, protocol: str) -> int:
    """Index, in the protocol's action set, of the action that opens an episode."""
    if not PROTOCOLS[protocol].opens_with_fire or game in _WITHOUT_FIRE | _WITHOUT_NOOP:
        return 0
    return 1


def make_emulators(
    game: str, protocol: str, seeds: list[int], *, backend: Literal["envpool", "ale"],
    action_repeats: int, num_threads: int,
) -> Emulators:  # fmt: skip
    """One emulator per seed; UsageError if the backend's package is missing.

    Takes seconds for many environments, most of them holding the GIL.
    """
    rules = PROTOCOLS[protocol]
    make = EnvpoolEmulators if backend == "envpool" else AleEmulators
    return make(
        game,
        seeds,
        action_repeats=action_repeats,
        sticky=rules.sticky,
        max_noops=rules.max_noops,
        full_action_space=rules.full_action_space,
        num_threads=num_threads,
    )


class AtariEngine:
    """The ``Engine`` that plays one game by one protocol on E emulators."""

    def __init__(
        self, emulators: Emulators, game: str, protocol: str, *, action_repeats: int,
        max_frames: int = MAX_FRAMES,
    ) -> None:  # fmt: skip
        """Take over emulators made for the same game, protocol and repeats.

        Args:
          max_frames: time limit of a game; rounded down to whole agent steps.
        """
        self.spec = atari_spec(game, protocol, action_repeats)
        if emulators.num_actions != self.spec.actions.num_logits:
            raise RuntimeError(
                f"{game}: the emulator has {emulators.num_actions} actions, "
                f"not {self.spec.actions.num_logits}: another release of the game or of its package"
            )
        self.num_envs = emulators.num_envs
        self._emulators = emulators
        self._opening = opening_action(game, protocol)
        self._life_loss_ends_episode = PROTOCOLS[protocol].life_loss_ends_episode
        self._max_steps = max_frames // action_repeats
        self._steps = np.zeros(self.num_envs, np.int64)
        self._lives = np.zeros(self.num_envs, np.int32)
        self._ended = np.ones(self.num_envs, np.bool_)
        self._game_over = np.ones(self.num_envs, np.bool_)

    def reset(self) -> Rows:
        """The first rows: every game is over before it began."""
        return self.step(np.zeros(self.num_envs, np.int64))

    def step(self, action: IntArray) -> Rows:
        """See ``Engine`` and the rules at the top."""
        if self._game_over.any():
            which = np.flatnonzero(self._game_over)
            self._emulators.restart(which)
            self._steps[which] = 0
        opens = self._ended
        frames = self._emulators.step(np.where(opens, self._opening, action))
        self._steps += 1
        time_up = self._steps >= self._max_steps
        terminated = frames.game_over
        if self._life_loss_ends_episode:
            fell = (frames.lives > 0) & (frames.lives < self._lives)
            terminated = terminated | (fell & ~opens)
        self._lives = frames.lives
        self._game_over = frames.game_over | time_up
        self._ended = terminated | time_up
        truncated = time_up & ~terminated
        return Rows(frames.observation, frames.reward, terminated, truncated, self._game_over)

    def close(self) -> None:
        """See ``Engine``."""
        self._emulators.close()


def make_engine(
    game: str, protocol: str, *, backend: Literal["envpool", "ale"], num_envs: int,
    first_env_index: int, seed: int, action_repeats: int, num_threads: int,
    max_frames: int = MAX_FRAMES,
) -> AtariEngine:  # fmt: skip
    """Environments ``first_env_index ...`` of the run ``seed`` (see ``env_seeds``)."""
    emulators = make_emulators(
        game,
        protocol,
        env_seeds(seed, first_env_index, num_envs),
        backend=backend,
        action_repeats=action_repeats,
        num_threads=num_threads,
    )
    return AtariEngine(
        emulators, game, protocol, action_repeats=action_repeats, max_frames=max_frames
    )
