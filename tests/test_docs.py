"""What README and documentation say is so: flags, links, examples, pages made from the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import asyncagent
import flags_page
from asyncagent.__main__ import COMMANDS, main
from asyncagent.commands import check_env
from asyncagent.config import resolve
from asyncagent.envs import env_spec
from asyncagent.loop import train
from asyncagent.structs import ArraySpec, Discrete
from tests.documents import (
    KINDS,
    NOT_RUN,
    PAGES,
    ROOT,
    TOGETHER,
    anchors_of,
    blocks_of,
    commands_of,
    links_of,
)

ELSEWHERE = {"bind_all": "TensorBoard", "shm-size": "Docker", "force-reinstall": "pip"}
"""Flags of other programs that the text mentions: whose they are."""

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@by_page
def test_blocks(page: Path) -> None:
    """Every block of code says what it is, and every mark above one is known and has a reason."""
    for block in blocks_of(page):
        assert block.kind in KINDS, f"{block.place}: kind {block.kind!r}"
        reason = block.mark.removeprefix(NOT_RUN)
        known = block.mark in ("", TOGETHER) or (block.mark != reason and len(reason) > 10)
        assert known, f"{block.place}: {block.mark}"
    fences = page.read_text("utf-8").count("```")
    assert fences == 2 * len(blocks_of(page)), "a block is not closed, or not at the margin"


@by_page
def test_flags(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag that a page names exists, and where a command line has it, that command has it."""
    for line in commands_of(page):
        flags = re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", line)
        found = re.search(r"(?:\basyncagent (?=[a-z])|\./scripts/(?=train\b))([a-z-]+)", line)
        script = re.search(r"scripts/(\w+\.(?:py|sh))|-m (experiment)", line)
        words = line.split()
        if words and words[0].startswith("--"):
            known = every_flag(capsys) | ELSEWHERE.keys()
        elif found:
            assert found[1] in COMMANDS, f"no command {found[1]!r}: {line}"
            known = flags_of_command(found[1], capsys)
        elif script:
            known = flags_of_script(script[1] or f"{script[2]}.py", capsys)
        else:
            continue  # another program's
        for flag in flags:
            name = flag.replace("-", "_")
            good = {name, name.removeprefix("no_"), flag} & {*known, "help"}
            assert good, f"--{flag} is no flag there: {line}"


_known: dict[str, set[str]] = {}


def flags_of_command(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags that a command's --help lists."""
    if command not in _known:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        _known[command] = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", said)}
    return _known[command]


def flags_of_script(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags that a script's source names, and train's where it passes them on."""
    source = (ROOT / "scripts" / name).read_text("utf-8")
    own = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", source)}
    own |= set(re.findall(r'^    "(\w+)": Flag\(', source, re.M))  # experiment.py's
    return own | flags_of_command("train", capsys) | flags_of_command("actors", capsys)


def every_flag(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags of all commands and scripts."""
    scripts = [path.name for path in (ROOT / "scripts").iterdir() if path.is_file()]
    sets = [flags_of_command(command, capsys) for command in COMMANDS]
    return set().union(*sets, *(flags_of_script(name, capsys) for name in scripts))


@by_page
def test_links(page: Path) -> None:
    """Every link within the project leads to a file that is there, and to a heading of it."""
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link} leads out of the project"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: no such heading"


def test_scripts_are_there() -> None:
    """Every script that a page names is there, and can be started where it is started as such."""
    for page in PAGES:
        for command in commands_of(page):
            for dot, name in re.findall(r"(\./)?\bscripts/([\w.*]+)", command):
                found = list((ROOT / "scripts").glob(name))
                assert found, f"{page.name}: {command}"
                assert not dot or found[0].stat().st_mode & 0o100, f"{name} cannot be executed"


def test_flags_page() -> None:
    """The table of flags is what Config says today."""
    said = flags_page.PAGE.read_text("utf-8")
    assert said == flags_page.text(), "run python scripts/flags_page.py"


def test_readme() -> None:
    """The README is short, and its two commands are those that continuous integration runs."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    assert "./scripts/train" in readme and "./scripts/test" in readme
    assert "/scripts/test" in shlex.split((ROOT / ".ci" / "run").read_text(), comments=True)[-2]


def test_version() -> None:
    """Changelog and citation are of this version, and the citation names the paper."""
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {asyncagent.__version__}\n" in citation
    assert "1802.01561" in citation and "family-names: Espeholt" in citation
    assert f"\n## {asyncagent.__version__} - " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def example(page: str, name: str) -> str:
    """The module of that name which a page shows."""
    (found,) = [block for block in blocks_of(ROOT / "docs" / page) if block.module == name]
    return found.text


def test_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of an own environment and an own net have nothing wrong, and train."""
    environment = example("own-environment.md", "my_env.py")
    assert len(environment.splitlines()) <= 35
    (tmp_path / "my_env.py").write_text(environment)
    (tmp_path / "my_net.py").write_text(example("networks.md", "my_net.py"))
    monkeypatch.chdir(tmp_path)
    assert check_env.main(["my_env:Boat"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    config = resolve("my_env:Boat", logdir="run", total_environment_frames=2000)
    vector = ArraySpec((2,), "float32")
    assert env_spec(config).observation == {"boat": vector, "buoy": vector}
    assert env_spec(config).actions == Discrete(4)
    assert train(config).frames >= 2000
    for memory in (False, True):
        own = resolve(
            "my_env:Boat", logdir=f"net{memory}", total_environment_frames=500,
            net="my_net:Pilot", use_lstm=memory,
        )  # fmt: skip
        assert train(own).frames >= 500
