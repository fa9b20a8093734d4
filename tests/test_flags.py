"""--help: every flag with its unit, its default and a line that says what it does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from asyncagent.__main__ import COMMANDS, GROUPS, main
from asyncagent.commands import cli
from asyncagent.commands.flags import Flag, flags_of, help_lines
from asyncagent.commands.train import configure
from asyncagent.config import Config


@dataclass(frozen=True)
class Base:
    """Flags with groups."""

    # Boats: what floats.
    name: str = "a"
    """A name.

    And more about it."""
    lag_s: float = 2.0
    """A time
    on two lines."""
    # Cars.
    colour: Literal["", "red", "blue"] = "red"
    """A colour."""
    many: tuple[str, ...] = ()
    """Things."""


@dataclass(frozen=True)
class Inherits(Base):
    """More flags."""

    logdir: str = dataclasses.field(kw_only=True)
    """A folder."""
    on: bool = True
    """A switch."""
    seed: int | None = None
    """A number."""
    lag_s: float = 3e-4
    """Another time."""


def test_flags_are_read_off_the_source() -> None:
    """Own flags first, groups from comments, units from names, choices from types."""
    assert flags_of(Inherits) == [
        Flag("Options", "logdir", "DIR", "required", "A folder.", ""),
        Flag("Options", "on", "", "on", "A switch.", ""),
        Flag("Options", "seed", "N", "none", "A number.", ""),
        Flag("Options", "lag_s", "S", "0.0003 s", "Another time.", ""),
        Flag("Boats", "name", "NAME", "a", "A name.", "And more about it."),
        Flag("Cars", "colour", "red|blue", "red", "A colour.", ""),
        Flag("Cars", "many", "TEXT ...", "none", "Things.", ""),
    ]
    assert flags_of(Base)[1].description == "A time on two lines."


def test_defaults_are_those_of_an_instance() -> None:
    """A preset's values stand in --help, long numbers with commas and all their digits."""
    default = Config(num_actors=1200, num_groups=1, learning_rate=0.00031866995608948655)
    found = {flag.name: flag.default for flag in flags_of(Config, default)}
    assert found["num_actors"] == "1,200"
    assert found["total_environment_frames"] == "200,000,000"
    assert found["learning_rate"] == "0.000318669956089487"
    assert found["level_cache_gb"] == "10 GB"
    assert found["listen"] == "none"


def test_every_flag_of_a_run_takes_one_line() -> None:
    """Name, description and default fit 100 columns, and each flag is in a group with a title."""
    flags = flags_of(Config)
    assert {flag.name for flag in flags} == {field.name for field in dataclasses.fields(Config)}
    lines = [line.plain for line in help_lines("asyncagent train", "Train.", flags, 100)]
    about = [line for line in lines if line.startswith(" ")]
    assert [line.split()[0] for line in about] == [f"--{flag.name}" for flag in flags]
    assert {"The run", "Environments", "Learning", "Actor hosts"} <= {flag.group for flag in flags}
    assert "Options" not in {flag.group for flag in flags}
    for flag in flags:
        assert flag.description.endswith("."), flag


@pytest.mark.parametrize("columns", [40, 71, 72, 100, 300])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(
    command: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 0; every flag with its default, in no more columns than there are; of 100 columns
    one line suffices, but for a long default."""
    kinds: list[Any] = []

    def watched(kind: Any, default: Any) -> list[Flag]:
        kinds.append((kind, default))
        return flags_of(kind, default)

    monkeypatch.setattr(cli, "flags_of", watched)
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    assert "\x1b" not in text
    [(kind, default)] = kinds
    flags = flags_of(kind, default)
    assert {flag.name for flag in flags} == {field.name for field in dataclasses.fields(kind)}
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert names == [f"--{flag.name}" for flag in flags]
    if columns == 100:
        more = [line.strip() for line in text.splitlines() if line.startswith(" " * 20)]
        assert [line for line in more if not line.startswith("[")] == []
    squeezed = "".join(text.split())
    for flag in flags:
        assert flag.group in text.splitlines()
        assert flag.description, f"--{flag.name} says nothing"
        assert f"[{flag.default}]".replace(" ", "") in squeezed


def test_help_shows_what_leaving_a_flag_out_means(capsys: pytest.CaptureFixture[str]) -> None:
    """Defaults are those of the level that is given, also after other flags."""
    with pytest.raises(SystemExit):
        main(["train", "--level_name=catch", "--help"])
    assert "[500,000]" in capsys.readouterr().out


def test_every_command_is_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    """asyncagent --help lists each command once."""
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(COMMANDS)
    assert all(len(line) <= 80 for line in lines)
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))


def test_quiet_is_not_inherited(tmp_path: Path) -> None:
    """A run that was started with --quiet is resumed as loudly as any."""
    first = configure(["--level_name=catch", f"--logdir={tmp_path}", "--quiet", "--seed=7"])
    assert first.quiet
    (tmp_path / "config.json").write_text(first.to_json())
    again = configure([f"--logdir={tmp_path}"])
    assert again.seed == 7
    assert not again.quiet
