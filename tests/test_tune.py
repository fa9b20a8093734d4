"""The search for the fastest flags, on a machine that is a formula, and what train makes of it."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncagent.__main__ import main
from asyncagent.bench.training import Training, TrainingFailed
from asyncagent.bench.tune import Trial, Tuner, best_of
from asyncagent.commands import train, tune
from asyncagent.config import Config, resolve
from asyncagent.errors import AsyncAgentError, ConfigError, UsageError


def rate(steps_per_s: float) -> Training:
    return Training(10.0, 4 * steps_per_s, steps_per_s, 0.0, 0.0, 0.0, 2.0, 3, 0.1, 100)


def search(
    config: Config, speed: Callable[[Config], float], minutes: float = 1e6
) -> tuple[list[Trial], list[float]]:
    """Trials on a machine of ``speed``, whose runs take a minute each; and the shares told."""
    now_s, shares = 0.0, []

    def run(tried: Config) -> Training:
        nonlocal now_s
        now_s += 60
        return rate(speed(tried))

    tuner = Tuner(
        config, 1, 1, minutes, lambda _, share: shares.append(share), run, clock=lambda: now_s
    )
    return tuner.tune(), shares


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("asyncagent.placement", "asyncagent.config", "asyncagent.bench.tune"):
        monkeypatch.setattr(f"{module}.cores", lambda: 4)


def test_each_flag_is_found_with_the_best_of_the_others() -> None:
    """A machine that likes groups of 16, four learning threads and 32 rows at once."""

    def speed(config: Config) -> float:
        return (
            1000
            - 10 * abs(config.group_size - 16)
            - 20 * abs(config.num_groups - 8)
            + 30 * min(config.learner_threads, 3)
            + (50 if config.min_inference_rows == 32 else 0)
        )

    trials, _ = search(resolve("atari_pong", learner_threads=1), speed)
    best = best_of(trials).flags
    assert (best["num_groups"], best["num_actors"]) == (8, 128)
    assert best["min_inference_rows"] == 32
    assert best["learner_threads"] == 4
    assert trials[0].flags == {}
    flags = [json.dumps(trial.flags, sort_keys=True) for trial in trials]
    assert len(set(flags)) == len(flags), "nothing is tried twice"


def test_actors_stay_in_proportion_to_the_batch() -> None:
    """Though this machine is the faster the more actors there are."""
    trials, _ = search(resolve("atari_pong", "workstation"), lambda config: config.num_actors)
    tried = [trial.flags["num_actors"] for trial in trials if "num_actors" in trial.flags]
    assert max(tried) <= 16 * 8


def test_nothing_is_tried_twice() -> None:
    """Not under other names either: a value that the run has anyway is no change."""
    tried: list[Config] = []

    def speed(config: Config) -> float:
        tried.append(config)
        return 1000.0

    search(resolve("catch", num_actors=64, num_groups=4, learner_threads=2), speed)
    assert len(tried) > 5
    assert not [config for config in tried if tried.count(config) > 1]


def test_noise_changes_nothing() -> None:
    """What is faster by one percent is left as it is."""
    trials, _ = search(resolve("atari_pong"), lambda config: 1000 + config.num_groups)
    assert best_of(trials).flags == {}


def test_the_time_is_kept() -> None:
    """No run begins after the limit; the shares told rise to 1."""
    trials, shares = search(resolve("atari_pong"), lambda _: 1.0, minutes=3)
    assert len(trials) == 3
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_run_that_fails_is_no_winner() -> None:
    """A failure is kept with its reason, and the search goes on."""

    def speed(config: Config) -> float:
        if config.group_size == 64:
            raise TrainingFailed("out of memory")
        return config.group_size

    trials, _ = search(resolve("atari_pong", batch_size=64), speed)
    assert any(trial.failure == "out of memory" for trial in trials)
    assert best_of(trials).training is not None


def test_a_trial_that_is_refused_is_no_winner() -> None:
    """Groups of 64 rows, and 16 at most allowed: that flag cannot be had, others can."""
    trials, _ = search(resolve("atari_pong", max_inference_rows=16), lambda _: 1.0)
    assert any("max_inference_rows=16 must be >=" in trial.failure for trial in trials)
    assert trials[-1].training is not None


def test_what_is_refused_from_the_beginning_is_told() -> None:
    """No trial with other flags is made of a run that cannot be had."""

    def refuse(_: Config) -> float:
        raise UsageError("no such net")

    with pytest.raises(UsageError, match="no such net"):
        search(resolve("atari_pong"), refuse)


def test_levels_have_as_many_groups_each() -> None:
    """Every shape tried is a configuration that can be had."""
    trials, _ = search(resolve("atari_pong,atari_breakout,atari_qbert"), lambda _: 1.0)
    assert all(trial.flags.get("num_groups", 3) % 3 == 0 for trial in trials)


def test_the_command_writes_what_train_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's flags become train's defaults; a flag given by hand goes before them."""
    monkeypatch.setattr("asyncagent.bench.training.run", lambda c, *_: rate(c.num_actors))
    out = tmp_path / "tuned.json"
    assert tune.main([f"--out={out}", "--level_name=catch"]) == 0
    written = json.loads(out.read_text())
    assert written["frames_per_s"] > written["frames_per_s_of_defaults"]
    assert f"--num_actors={written['flags']['num_actors']}" in capsys.readouterr().out
    arguments = [f"--tuned={out}", "--level_name=catch", f"--logdir={tmp_path / 'run'}"]
    assert train.configure(arguments).num_actors == written["flags"]["num_actors"]
    by_hand = train.configure([*arguments, "--num_actors=8", "--num_groups=2"])
    assert by_hand.num_actors == 8


def test_the_file_is_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flags given to tune are a part of it, in a new run and in one that had others of its own."""
    monkeypatch.setattr("asyncagent.bench.training.run", lambda *_: rate(1.0))
    out, logdir = tmp_path / "tuned.json", tmp_path / "run"
    given: dict[str, Any] = {"num_actors": 64, "num_groups": 4, "learner_threads": 2}
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert tune.main([f"--out={out}", "--level_name=catch", *flags]) == 0
    assert f"fastest: {' '.join(flags)}\n" in capsys.readouterr().out
    arguments = [f"--tuned={out}", "--level_name=catch", f"--logdir={logdir}"]
    expected = resolve("catch", tuned=str(out), logdir=str(logdir), **given)
    assert train.configure(arguments) == expected
    logdir.mkdir()
    others = resolve("catch", num_actors=8, env_threads=3, env_niceness=5)
    (logdir / "config.json").write_text(others.to_json())
    assert train.configure(arguments) == expected


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_groups": 8, "num_actors": 64},
        {"num_groups": 8},
        {"num_actors": 32, "min_inference_rows": 7},
        {"pin_workers": False, "env_niceness": 10},
    ],
)
def test_flags_that_are_printed_give_what_was_measured(tmp_path: Path, flags: Any) -> None:
    """As typed: min_inference_rows follows from the shape unless it is told."""
    preset = resolve("doom_basic", logdir=str(tmp_path))
    tried = dataclasses.replace(preset, **flags)
    typed = tune.as_flags(tune.from_defaults(tried)).split()
    assert bool(typed) == bool(flags)
    assert train.configure(["--level_name=doom_basic", f"--logdir={tmp_path}", *typed]) == tried


def test_what_was_found_for_another_level_or_net_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and taken all the same; nothing is said where it fits."""
    path = tmp_path / "tuned.json"
    found = {"level_name": "catch", "net": "mlp", "use_lstm": False, "flags": {"env_threads": 3}}
    path.write_text(json.dumps(found))
    common = [f"--tuned={path}", f"--logdir={tmp_path / 'run'}"]
    assert train.configure(["--level_name=catch", *common]).env_threads == 3
    assert capsys.readouterr().err == ""
    assert train.configure(["--level_name=cartpole", "--use_lstm", *common]).env_threads == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "was made for level_name='catch', use_lstm=False, this is level_name='cartpole'" in line
    path.write_text(json.dumps(found | {"preset": "paper", "batch_size": 16}))
    train.configure(["--level_name=catch", "--batch_size=8", *common])
    (line,) = capsys.readouterr().err.splitlines()
    assert "was made for batch_size=16, this is batch_size=8" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "must have an object 'flags'"),
        ('{"flags": {"learning_rate": 1}}', "must have an object 'flags'"),
        ('{"flags": {"num_actors": "many"}}', "num_actors='many' must be of type int"),
        ('{"flags": {"num_actors": 5, "num_groups": 4}}', "num_groups=4 must be a divisor"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    """What is wrong with the file, and nothing is trained."""
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        train.configure(["--level_name=catch", f"--tuned={path}", f"--logdir={tmp_path / 'run'}"])


def test_bad_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level that cannot train is told, and no file is written."""

    def fail(*_: Any) -> Training:
        raise TrainingFailed("no such thing")

    monkeypatch.setattr("asyncagent.bench.training.run", fail)
    with pytest.raises(AsyncAgentError, match="the defaults did not train: no such thing"):
        tune.main([f"--out={tmp_path / 'tuned.json'}", "--level_name=catch", "--minutes=1"])
    assert not (tmp_path / "tuned.json").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/tuned.json", "there is no folder"),
        (".", "must be a file"),
        ("..", "must be a file"),
        ("/dev/null", "must be a file"),
        ("/proc/tuned.json", "cannot be written: "),
        ("n" * 300, "cannot be written: File name too long"),
        ("n" * 253, "cannot be written: File name too long"),  # with .tmp
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    out: str, message: str,
) -> None:  # fmt: skip
    """One line, status 2, and nothing left lying about."""
    monkeypatch.setattr("asyncagent.bench.training.run", pytest.fail)
    monkeypatch.chdir(tmp_path)
    assert main(["tune", f"--out={out}", "--level_name=catch"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line and not captured.out
    assert not [*tmp_path.iterdir()]


def test_a_file_that_cannot_be_written_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found is on the screen, the reason is one line."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("asyncagent.bench.training.run", lambda c, *_: rate(c.num_actors))
    monkeypatch.setattr(tune, "replace_text", full)
    assert main(["tune", f"--out={tmp_path / 'tuned.json'}", "--level_name=catch"]) == 1
    captured = capsys.readouterr()
    assert "fastest: --num_actors=" in captured.out
    line = captured.err.splitlines()[-1]
    assert line.startswith("asyncagent tune: ") and line.endswith("No space left on device")
    assert "Traceback" not in captured.err
