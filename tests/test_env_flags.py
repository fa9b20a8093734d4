"""Commands with train's flags: each flag means there what it means to train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from asyncagent.__main__ import main
from asyncagent.commands import train
from asyncagent.commands.bench import BenchFlags
from asyncagent.commands.check_env import CheckFlags
from asyncagent.commands.dmlab_cache import CacheFlags
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.commands.tune import TuneFlags
from asyncagent.config import Config, resolve
from asyncagent.errors import ConfigError

KINDS = (Config, BenchFlags, TuneFlags, CheckFlags, CacheFlags)
TUNED: dict[str, Any] = {"num_actors": 48, "num_groups": 6, "env_threads": 3, "learner_threads": 1}


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tuned.json").write_text(json.dumps({"flags": TUNED}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--level_name=catch", "--tuned=tuned.json"],
        ["--level_name=catch", "--tuned", "tuned.json", "--num_actors=24"],
        ["--level_name=catch", "--deterministic"],
        ["--level_name=catch", "--deterministic", "--tuned=tuned.json", "--batch_size=12"],
        ["--level_name=doom_basic", "--preset=paper", "--num_groups=2", "--num_actors=32"],
        ["--level_name=doom_basic", "--num_groups=8", "--num_actors=32"],
        ["--level_name=doom_basic", "--num_actors=32", "--min_inference_rows=3"],
        ["--level_name=doom_basic,doom_deadly_corridor", "--num_actors=18"],
        ["--level_name=rooms_watermaze", "--num_actors=5"],
        ["--level_name=atari_pong", "--preset=workstation", "--use_lstm"],
    ],
)
def test_flags_mean_what_they_mean_to_train(kind: Any, arguments: list[str]) -> None:
    """The same file, determinism and shape, and what follows from them."""
    flags = parse_env_flags(kind, arguments, level_name="catch", prog="x", description="")
    found = {field.name: getattr(flags, field.name) for field in dataclasses.fields(Config)}
    assert Config(**found) == train.configure(arguments)


def test_shapes_and_files_count() -> None:
    """The values themselves, for what was once left as the preset has it."""

    def parsed(*arguments: str) -> Config:
        return parse_env_flags(
            Config, arguments, level_name="catch", prog="x", description=""
        )  # fmt: skip

    assert parsed("--tuned=tuned.json") == resolve("catch", tuned="tuned.json", **TUNED)
    assert parsed("--deterministic") == resolve("catch", deterministic=True)
    shape = parsed("--level_name=doom_basic", "--num_groups=2", "--num_actors=32")
    assert shape.min_inference_rows == 1


@pytest.mark.parametrize("command", ["bench", "tune", "check-env", "dmlab-cache"])
def test_a_file_that_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--tuned is read by all of them."""
    level = "rooms_watermaze" if command == "dmlab-cache" else "catch"
    assert main([command, f"--level_name={level}", "--tuned=nowhere.json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"asyncagent {command}: tuned='nowhere.json': No such file or directory"


def test_a_command_needs_environments_of_its_own() -> None:
    """Only train's learner can do with those of hosts."""
    flags = ["--num_actors=0", "--listen=tcp://127.0.0.1:5555"]
    with pytest.raises(ConfigError, match="num_actors=0 must be >= 1: x needs"):
        parse_env_flags(Config, flags, level_name="catch", prog="x", description="")
