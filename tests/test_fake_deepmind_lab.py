"""The stand-in behaves as the module it stands for: one list of facts, tried on both.

The real module's turn comes where it is installed (tests marked ``dmlab``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = ROOT / "tests" / "stand_ins"
INSTALLED = importlib.util.find_spec("deepmind_lab") is not None

SUITE = "contributed/dmlab30/"
EMPTY = "tests/empty_room_test"
COMPILED = SUITE + "explore_goal_locations_small"
NOTHING = np.zeros(7, np.intc)


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param(
            "real",
            marks=[
                pytest.mark.dmlab,
                pytest.mark.skipif(not INSTALLED, reason="deepmind_lab is not installed"),
            ],
        ),
    ]
)
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, imported."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if which == "stand-in":
        return importlib.import_module("tests.fake_deepmind_lab")
    monkeypatch.setenv("LP_NUM_THREADS", "0")
    return importlib.import_module("deepmind_lab")


@pytest.fixture
def make(module: Any) -> Iterator[Any]:
    """Makes environments and closes them after the test."""
    labs: list[Any] = []

    def make(level: str = EMPTY, config: dict[str, str] | None = None, **options: Any) -> Any:
        config = {"width": "96", "height": "72"} | (config or {})
        labs.append(module.Lab(level, ["RGB_INTERLEAVED", "INSTR"], config, **options))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


def in_new_process(which: str, program: str) -> subprocess.CompletedProcess[bytes]:
    """``program``, after ``lab`` and ``action`` have been made for it."""
    begin = (
        "import numpy as np, deepmind_lab\n"
        "action = np.zeros(7, np.intc)\n"
        "def make(level, **options):\n"
        "    return deepmind_lab.Lab(level, ['RGB_INTERLEAVED'], {}, **options)\n"
    )
    path = f"{STAND_INS}:{ROOT}" if which == "stand-in" else str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", begin + program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        timeout=120,
    )


def test_observations(make: Any) -> None:
    """Frames are uint8 [height, width, 3], contiguous and fresh; INSTR is a string."""
    lab = make()
    lab.reset(seed=1)
    first, second = lab.observations(), lab.observations()
    frame = first["RGB_INTERLEAVED"]
    assert first.keys() == {"RGB_INTERLEAVED", "INSTR"}
    assert frame.shape == (72, 96, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
    assert not np.shares_memory(frame, second["RGB_INTERLEAVED"])
    assert first["INSTR"] == ""


def test_language_levels_have_instructions(make: Any) -> None:
    """INSTR is several words there."""
    lab = make(SUITE + "language_select_located_object")
    lab.reset(seed=1)
    assert isinstance(lab.observations()["INSTR"], str)
    assert len(lab.observations()["INSTR"].split()) >= 4


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (np.zeros(7, np.int64), ValueError),
        (np.zeros(7, np.float32), ValueError),
        (np.zeros(6, np.intc), ValueError),
        (np.zeros((1, 7), np.intc), ValueError),
        ([0] * 7, TypeError),
    ],
)
def test_refused_actions(make: Any, action: Any, error: type[Exception]) -> None:
    """Anything but seven np.intc in one dimension."""
    lab = make()
    lab.reset(seed=1)
    with pytest.raises(error):
        lab.step(action)
    assert isinstance(lab.step(NOTHING, num_steps=4), float)


def test_strides_are_ignored(which: str, make: Any) -> None:
    """A view with gaps is accepted, and what lies in the gaps is taken for the action."""
    lab = make()
    lab.reset(seed=1)
    numbers = np.zeros(14, np.intc)
    numbers[1] = 1  # the second number of what is read, the first gap of what was meant
    reward = lab.step(numbers[::2], num_steps=1)
    if which == "stand-in":
        assert reward == 10.0


def test_refused_constructions(module: Any) -> None:
    """Levels, observations, configurations and renderers that are none."""
    with pytest.raises(RuntimeError):
        module.Lab("tests/no_such_level", [], {})
    with pytest.raises(ValueError, match="NO_SUCH_OBSERVATION"):
        module.Lab(EMPTY, ["NO_SUCH_OBSERVATION"], {})
    for observations, config in (((), {}), ([], []), ([], {"width": 96})):
        with pytest.raises(TypeError):
            module.Lab(EMPTY, observations, config)
    with pytest.raises(RuntimeError):
        module.Lab(EMPTY, [], {}, renderer="no_such_renderer")
    module.Lab(EMPTY, [], {"noSuchKey": "x"}).close()


def test_seeds(make: Any) -> None:
    """A Python int or None."""
    lab = make()
    with pytest.raises(ValueError, match="seed"):
        lab.reset(seed=np.int64(3))
    lab.reset(seed=3)
    lab.reset(seed=2**31 - 1)
    lab.reset()


def test_held_out_levels(make: Any) -> None:
    """Need allowHoldOutLevels='true'."""
    level = SUITE + "rooms_collect_good_objects_test"
    with pytest.raises(RuntimeError):
        make(level)
    make(level, {"allowHoldOutLevels": "true", "mixerSeed": str(0x600D5EED)})


def test_images_are_missed_at_reset(make: Any) -> None:
    """Not by the constructor."""
    lab = make(SUITE + "psychlab_continuous_recognition")
    with pytest.raises(RuntimeError):
        lab.reset(seed=1)


def test_end_of_an_episode(make: Any) -> None:
    """No frame and no further step; the next reset begins another."""
    lab = make(SUITE + "rooms_collect_good_objects_train")
    assert not lab.is_running()
    for _ in range(2):
        lab.reset(seed=1)
        while lab.is_running():
            lab.step(NOTHING, num_steps=100)
        with pytest.raises(RuntimeError):
            lab.observations()
        with pytest.raises(RuntimeError):
            lab.step(NOTHING)
        assert lab.num_steps() % 100 == 0


def test_before_the_first_reset(make: Any) -> None:
    """Nothing to see and nowhere to go."""
    lab = make()
    with pytest.raises(RuntimeError):
        lab.observations()
    with pytest.raises(RuntimeError):
        lab.step(NOTHING)


def test_close(make: Any) -> None:
    """True, then False; what does not kill raises."""
    lab = make()
    lab.reset(seed=1)
    assert (lab.close(), lab.close(), lab.is_running()) == (True, False, False)
    with pytest.raises(RuntimeError):
        lab.step(NOTHING)
    with pytest.raises(RuntimeError):
        lab.observations()


def test_many_in_one_process(make: Any) -> None:
    """They do not disturb each other, and first episodes of the same seed agree."""
    labs = [make() for _ in range(3)]
    frames = []
    for lab in labs:
        lab.reset(seed=5)
        frames.append(lab.observations()["RGB_INTERLEAVED"])
    assert (frames[0] == frames[1]).all() and (frames[0] == frames[2]).all()


@pytest.mark.parametrize("method", ["reset", "observation_spec", "action_spec"])
def test_a_closed_environment_kills(which: str, method: str) -> None:
    """The process, not with an exception."""
    died = in_new_process(
        which,
        f"lab = make({EMPTY!r}); lab.reset(seed=1); lab.close()\n"
        f"try:\n    lab.{method}()\nexcept BaseException:\n    pass\n",
    )
    assert died.returncode not in (0, 1)


CACHE = """
class Cache:
    def fetch(self, key, pk3_path):
        print("fetch", key, flush=True)
        return {answer}
    def write(self, key, pk3_path):
        import os
        print("write", key, os.path.getsize(pk3_path) > 0, flush=True)
lab = make({level!r}, level_cache=Cache())
lab.reset(seed=1)
print("alive", flush=True)
"""


def test_level_cache_is_asked_then_told(which: str) -> None:
    """fetch, and where that says no, write with the same key and a file."""
    said = in_new_process(which, CACHE.format(answer=False, level=COMPILED)).stdout.decode()
    told = [line.split() for line in said.splitlines() if line.startswith(("fetch", "write"))]
    assert told[0][0] == "fetch" and told[1] == ["write", told[0][1], "True"]
    assert "_noaas_" in told[0][1] and len(told[0][1].rpartition("_")[2]) == 32
    assert said.rstrip().endswith("alive")


def test_a_lying_cache_kills(which: str) -> None:
    """fetch says True without the file: the process exits with 1."""
    died = in_new_process(which, CACHE.format(answer=True, level=COMPILED))
    assert died.returncode == 1 and b"alive" not in died.stdout


def test_what_fetch_raises_comes_out_of_reset(make: Any) -> None:
    """Unchanged."""

    class Cache:
        def fetch(self, key: str, pk3_path: str) -> bool:
            raise LookupError("mine")

        def write(self, key: str, pk3_path: str) -> None:
            """Never called."""

    with pytest.raises(LookupError, match="mine"):
        make(COMPILED, level_cache=Cache()).reset(seed=1)
