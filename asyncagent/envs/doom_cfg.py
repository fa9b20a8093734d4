"""Scenarios of the user's own, as ViZDoom's ``.cfg`` files describe them.

An action holds one of the cfg's buttons, or none.  A button that takes a number
(``..._DELTA``) gives two actions, one per direction, as fast as its key would be.
Resolution, format and mode are ours, nothing but the screen is asked for, and everything else is
as the cfg says.
"""

from __future__ import annotations

import os
import re
import struct
import sys
import tempfile
from typing import Any

from asyncagent.envs.doom_scenarios import Part, Scenario
from asyncagent.errors import UsageError

_DELTAS = {"TURN": 3.5, "LOOK": 3.5, "MOVE": 25.0}
"""What a ``..._DELTA`` button is set to: degrees per tic, or the engine's unit of a step."""

_UNSEEN = (
    *("depth_buffer", "labels_buffer", "automap_buffer", "audio_buffer", "notifications_buffer"),
    *("objects_info", "sectors_info", "sound"),
)

_COMPLAINT = re.compile(r'config from: "[^"]*"\. (.*?)\.? Lines? ignored')


def absolute(path: str) -> str:
    """``path`` from the root; ``~`` is the user's home."""
    return os.path.abspath(os.path.expanduser(path))


def check(path: str, level_name: str) -> None:
    """UsageError unless ``path`` is a text file; whether it is a cfg shows when it is loaded."""
    path = absolute(path)
    if not os.path.isfile(path):
        raise UsageError(f"level_name={level_name!r}: there is no file {path}")
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 20)
    except OSError as error:
        raise UsageError(f"level_name={level_name!r}: {path}: {error.strerror}") from error
    if b"\0" in text:
        raise UsageError(f"level_name={level_name!r}: {path} is no text file, let alone a cfg")


def load(vizdoom: Any, game: Any, path: str) -> Scenario:
    """Set ``game`` up as the file says; returns what is not up to the game: the actions.

    Raises:
      UsageError: the file says what ViZDoom does not know, lists no buttons, or names a WAD or a
        map that does not exist.  ViZDoom would ignore it, play another map, or wait for good.
    """
    complaints = _load_config(game, path)
    if complaints:
        raise UsageError(f"{path} is no cfg that ViZDoom understands: {complaints}")
    buttons = [button.name for button in game.get_available_buttons()]
    if not buttons:
        raise UsageError(f"{path} lists no available_buttons")
    _find_map(vizdoom, game, path)
    for what in _UNSEEN:
        getattr(game, f"set_{what}_enabled")(False)
    actions = (None, *(press for button in buttons for press in _presses(button)))
    return Scenario(wad="", parts=(actions,), variables=(), skill=None, timeout=0)


def _presses(button: str) -> Part:
    if not button.endswith("_DELTA"):
        return ((button, 1.0),)
    delta = _DELTAS[button.partition("_")[0]]
    return (button, delta), (button, -delta)


def _load_config(game: Any, path: str) -> str:
    """The first thing that ViZDoom complains of, to file descriptor 2; empty if nothing."""
    with tempfile.TemporaryFile() as log:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            understood = game.load_config(path)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        log.seek(0)
        text = log.read().decode(errors="replace")
    if understood:
        return ""
    found = _COMPLAINT.search(text)
    return found[1] if found else " ".join(text.split())[:200] or "it does not say why"


def _find_map(vizdoom: Any, game: Any, path: str) -> None:
    """Point ``game`` to the WADs that the cfg at ``path`` names; they must hold its map."""
    folder = os.path.dirname(path)
    game_wad = _existing(game.get_doom_game_path(), folder)
    if game_wad:
        game.set_doom_game_path(game_wad)
    wads = [game_wad or os.path.join(vizdoom.root_path, "freedoom2.wad")]
    scenario_wad = _existing(game.get_doom_scenario_path(), folder)
    if scenario_wad:
        game.set_doom_scenario_path(scenario_wad)
        wads.insert(0, scenario_wad)
    name = game.get_doom_map()
    if all(lumps is not None and name.upper() not in lumps for lumps in map(_lumps, wads)):
        raise UsageError(f"{path}: doom_map={name} is not in {' or '.join(wads)}")


def _existing(wad: str, folder: str) -> str:
    # ViZDoom 1.3 takes an absolute path, too, for one below the cfg's folder.
    for candidate in (wad, wad.removeprefix(folder)):
        if not wad or os.path.isfile(candidate):
            return candidate
    raise UsageError(f"there is no file {wad}, which the cfg in {folder} names")


def _lumps(wad: str) -> set[str] | None:
    """What a WAD contains, maps among it; None if it is a ZIP, which keeps them elsewhere."""
    with open(wad, "rb") as file:
        head = file.read(12)
        if head[:2] == b"PK":
            return None
        if len(head) < 12 or head[:4] not in (b"IWAD", b"PWAD"):
            raise UsageError(f"{wad} is no WAD: it begins with {head[:4]!r}, not IWAD or PWAD")
        count, offset = struct.unpack("<II", head[4:])
        file.seek(offset)
        directory = file.read(16 * count)
    return {
        directory[i + 8 : i + 16].rstrip(b"\0").decode("ascii", "replace").upper()
        for i in range(0, len(directory), 16)
    }
