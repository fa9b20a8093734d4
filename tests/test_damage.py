"""Files of a run, damaged at random: never a traceback of ours, never loaded silently wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from asyncagent.__main__ import main
from asyncagent.checkpoint import load_checkpoint, save_checkpoint
from asyncagent.commands.env_flags import read_tuned
from asyncagent.commands.train import configure
from asyncagent.config import Config, resolve
from asyncagent.errors import CheckpointError, ConfigError, UsageError
from asyncagent.metrics import Counters
from asyncagent.records import MetricsFile
from tests.test_metrics import report

MANY = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with flipped bits, cut off, overwritten in part, or something else altogether."""
    kind = draw(st.sampled_from(["flips", "cut", "hole", "tail", "rubbish"]))
    if kind == "rubbish":
        return draw(st.binary(max_size=300))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        return content[:place]
    if kind == "tail":
        return content + draw(st.binary(min_size=1, max_size=40))
    changed = bytearray(content)
    if kind == "flips":
        for bit in draw(st.sets(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
            changed[bit // 8] ^= 1 << bit % 8
    else:
        length = draw(st.integers(1, 600))
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    return bytes(changed)


def state(frames: int) -> dict[str, Any]:
    return {
        "frames": frames,
        "net": {"w": torch.arange(200.0) + frames},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "config": Config().to_json(),
        "counters": Counters(4, 0, 0, 0.0).state(),
        "time_s": 1.5,
    }


def in_pieces(folder: Path) -> tuple[Path, bytes]:
    save_checkpoint(folder, state(1))
    newest = save_checkpoint(folder, state(2))
    return newest, newest.read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The newest of two checkpoints, and what is in it."""
    return in_pieces(tmp_path_factory.mktemp("run"))


@MANY
@given(data=st.data())
def test_a_damaged_checkpoint_falls_back_with_a_warning(
    run: tuple[Path, bytes], caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    """Whatever happened to the newest, what is loaded is the one before it, or exactly it."""
    newest, content = run
    damaged = data.draw(damage(content))
    newest.write_bytes(damaged)
    caplog.clear()
    found = load_checkpoint(newest.parent)
    assert found is not None
    path, loaded = found
    if damaged == content:
        assert path == newest
        return
    assert path != newest, "loaded although it is damaged"
    assert torch.equal(loaded["net"]["w"], torch.arange(200.0) + 1)
    (warning,) = caplog.records
    assert newest.name in warning.getMessage() and "\n" not in warning.getMessage()


@MANY
@given(data=st.data())
def test_nothing_but_damaged_checkpoints_is_one_line(
    run: tuple[Path, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    """A CheckpointError of one line, and no other exception."""
    _, content = run
    damaged = data.draw(damage(content).filter(lambda found: found != content))
    (tmp_path / "checkpoint_000000000000002.pt").write_bytes(damaged)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


LINES = "".join(
    report(frames).to_json() + "\n" for frames in (1000, 2000, 3000, 4000)
).encode()  # fmt: skip


@MANY
@given(content=damage(LINES))
@example(b'{"frames": 1e400}\n{"frames": NaN}\n{"frames": [1]}\n{"frames": true}\n')
@example(b"[" * 50_000 + b"\n")
@example(b"1" * 10_000 + b"\n")
def test_damaged_metrics_are_trimmed(tmp_path: Path, content: bytes) -> None:
    """Every line that stays is a report of what was learned, and ours follows on its own line."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    file = MetricsFile(path, 3000, 60.0)
    file.write(report(3500))
    file.close()
    *kept, last = path.read_bytes().split(b"\n")[:-1]
    assert json.loads(last)["frames"] == 3500
    assert set(kept) <= set(content.split(b"\n"))
    assert all(0 <= json.loads(line)["frames"] <= 3000 for line in kept)
    whole = [line for line in LINES.split(b"\n")[:3] if line in content.split(b"\n")[:-1]]
    assert [line for line in kept if line in whole] == whole


RECORDED = resolve("catch", seed=3)


@MANY
@given(content=damage(RECORDED.to_json().encode()))
@example(b'{"learning_rate": 1%s}' % (b"0" * 400))
@example(b'{"batch_size": 1%s}' % (b"0" * 5000))
@example(b"[" * 50_000)
@example(b'{"no\\nflag": 1}')
@example(b'{"logdir": "\\u0000", "level_name": "\\ud800"}')
def test_a_damaged_config_is_one_line(tmp_path: Path, content: bytes) -> None:
    """It is read as a configuration that holds, or refused in one line that names the file."""
    (tmp_path / "config.json").write_bytes(content)
    try:
        found = configure([f"--logdir={tmp_path}"])
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert found.logdir == str(tmp_path)
    assert found == dataclasses.replace(found)


@contextlib.contextmanager
def silent() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        yield said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 3', '"seed": 7'),
        ('"learning_rate": 0.001', '"learning_rate": 0.009'),
        ('"use_lstm": false', '"use_lstm": true'),
    ],
)
def test_a_digit_changed_in_config_json_is_seen(tmp_path: Path, old: str, new: str) -> None:
    """The checkpoint knows better: a run does not go on with a number that rotted."""
    flags = ["train", f"--logdir={tmp_path}", "--level_name=catch", "--seed=3"]
    with silent():
        assert main([*flags, "--total_environment_frames=500", "--num_actors=4"]) == 0
    path = tmp_path / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with silent() as said:
        assert main(["train", f"--logdir={tmp_path}"]) == 2
    lines = [line for line in said.getvalue().splitlines() if line.startswith("asyncagent train")]
    assert len(lines) == 1 and old.split('"')[1] in lines[0]
    assert "Traceback" not in said.getvalue()


TUNED = json.dumps(
    {
        "level_name": "catch",
        "use_lstm": False,
        "flags": {"num_actors": 64, "env_threads": 2, "pin_workers": False},
    }
).encode()


@MANY
@given(content=damage(TUNED))
@example(b'{"flags": {"num_actors": 1e400}}')
@example(b'{"flags": {"num_actors": null}}')
@example(b'{"flags": {}, "net": [["a\\nnet"]], "level_name": null}')
@example(b'{"flags": {"num_actors": 1%s}}' % (b"0" * 5000))
@example(b"[" * 50_000)
def test_damaged_tuned_flags_are_one_line(tmp_path: Path, content: bytes) -> None:
    """Flags that hold, and no others than tune writes, or a ConfigError of one line."""
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    base = resolve("catch")
    try:
        found, made_for = read_tuned(path, base)
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    changed = {
        field.name
        for field in dataclasses.fields(Config)
        if getattr(found, field.name) != getattr(base, field.name)
    }
    assert changed <= {"num_actors", "num_groups", "env_threads", "env_niceness", "pin_workers",
                       "inference_threads", "learner_threads", "min_inference_rows"}  # fmt: skip
    assert all(isinstance(value, str | int) for value in made_for.values())


def test_damage_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning says which file and why."""
    newest, content = in_pieces(tmp_path)
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        load_checkpoint(tmp_path)
    assert f"{newest.name} cannot be read (its checksum is wrong)" in caplog.text
