"""The README's examples run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncagent.commands import check_env
from asyncagent.config import resolve
from asyncagent.envs import env_spec
from asyncagent.loop import train
from asyncagent.structs import ArraySpec, Discrete

README = Path(__file__).resolve().parent.parent / "README.md"


def test_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of an own environment is about 30 lines, has nothing wrong, and trains."""
    (code,) = re.findall(r"```python\n(# my_env\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 35
    (tmp_path / "my_env.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert check_env.main(["my_env:Boat"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    config = resolve("my_env:Boat", logdir="run", total_environment_frames=2000)
    vector = ArraySpec((2,), "float32")
    assert env_spec(config).observation == {"boat": vector, "buoy": vector}
    assert env_spec(config).actions == Discrete(4)
    assert train(config).frames >= 2000
