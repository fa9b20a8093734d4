"""The search for the fastest flags, on a machine that is a formula, and what train makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    """A folder that is not there is told before anything runs; a level that cannot train, after."""
    with pytest.raises(UsageError, match="there is no folder"):
        tune.main([f"--out={tmp_path / 'nowhere' / 'tuned.json'}", "--level_name=catch"])

    def fail(*_: Any) -> Training:
        raise TrainingFailed("no such thing")

    monkeypatch.setattr("asyncagent.bench.training.run", fail)
    with pytest.raises(AsyncAgentError, match="the defaults did not train: no such thing"):
        tune.main([f"--out={tmp_path / 'tuned.json'}", "--level_name=catch", "--minutes=1"])
    assert not (tmp_path / "tuned.json").exists()
