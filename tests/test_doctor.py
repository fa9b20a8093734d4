"""Decisions about shares, and the command that reads them out of a run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from asyncagent.__main__ import COMMANDS, main
from asyncagent.config import Config, resolve
from asyncagent.doctor import WINDOW_S, Doctor, diagnose, limit_of, mean_lag_ms, mean_stages
from asyncagent.host import HostFlags
from asyncagent.stages import Stages, Verdict

CONFIG = resolve("atari_breakout")
WAITS = Stages(
    env_steps=0.3, env_waits_actions=0.3, env_waits_learner=0.3,
    inference_computes=0.3, inference_copies=0.05, inference_waits=0.65,
    learner_computes=0.3, learner_copies=0.05, learner_waits=0.65,
    loop_busy=0.2, cores_busy=0.3, cores_taken=0.0,
    env_cpu=0.15, inference_cpu=0.05, learner_cpu=0.05,
)  # fmt: skip
"""Nobody is at work for long."""
FULL = WAITS._replace(cores_busy=0.98, env_cpu=0.3, inference_cpu=0.3, learner_cpu=0.28)
FAR = WAITS._replace(env_steps=math.nan, hosts_step=0.1, hosts_wait=0.85, learner_waits=0.9)
CASES: list[tuple[str, Stages, float]] = [
    ("", Stages(), 1.0),
    ("", WAITS, 1.0),
    ("environments", WAITS._replace(env_steps=0.8), 1.0),
    ("inference", WAITS._replace(inference_computes=0.7, inference_copies=0.2, env_steps=0.8), 1.0),
    ("learner", WAITS._replace(learner_computes=0.9, env_steps=0.8), 1.0),
    ("event loop", WAITS._replace(loop_busy=0.95, env_steps=0.97), 1.0),
    ("event loop", WAITS._replace(env_steps=0.97), 500.0),
    ("environments", WAITS._replace(env_steps=0.97, cores_taken=0.7), 500.0),
    ("environments", FULL._replace(env_cpu=0.6, learner_computes=0.99), 1.0),
    ("inference", FULL._replace(inference_cpu=0.5, env_steps=0.9), 1.0),
    ("learner", FULL._replace(learner_cpu=0.5, env_steps=0.9), 1.0),
    ("event loop", FULL._replace(env_cpu=0.1, inference_cpu=0.2, learner_cpu=0.1), 1.0),
    ("network", FAR, 1.0),
    ("environments", FAR._replace(hosts_step=0.9, hosts_wait=0.05), 1.0),
    ("learner", FAR._replace(learner_computes=0.95, learner_waits=0.05), 1.0),
]


@pytest.mark.parametrize(("limit", "stages", "lag_ms"), CASES)
def test_who_is_hardly_ever_idle_limits(limit: str, stages: Stages, lag_ms: float) -> None:
    """The busiest stage limits; where all cores are full, whoever uses most of them."""
    assert limit_of(stages, lag_ms) == limit
    advice = diagnose(stages, CONFIG, lag_ms).verdict.advice
    assert limit.removeprefix("the ") in advice
    assert "\n" not in advice and "nan" not in advice


def test_full_cores_in_one_sentence() -> None:
    """The sentence has the limit, the figure, what helps and what does not."""
    stages = FULL._replace(env_cpu=0.6)
    assert diagnose(stages, CONFIG).verdict == Verdict(
        "environments",
        "environments limit: cores 98% busy; more cores or remote actor hosts help, a faster GPU "
        "does not",
    )


def test_other_programs_are_named() -> None:
    """A machine that others keep busy: that is said first, and no core is called free."""
    account = diagnose(WAITS._replace(env_steps=0.9, cores_taken=0.68), CONFIG)
    assert account.tries[0].what == "leave the machine to this run"
    assert "other programs take 68% of the cores" in account.verdict.advice
    assert "free" not in account.verdict.advice


@pytest.mark.parametrize(("limit", "stages", "lag_ms"), CASES)
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"listen": "tcp://127.0.0.1:5555", "num_actors": 0, "num_groups": 0},
        {"precision": "float32", "net": "deep", "epochs_per_batch": 2, "compression": "lz4"},
        {"deterministic": True, "precision": "float32"},
    ],
)
def test_only_flags_that_there_are_and_can_be(
    limit: str, stages: Stages, lag_ms: float, flags: dict[str, Any]
) -> None:
    """Every flag that is advised exists, every value that is advised is allowed."""
    if flags.get("deterministic"):
        flags = flags | {"num_actors": 32, "num_groups": 1}
    config = resolve("atari_breakout", **flags)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    hosts = {field.name for field in dataclasses.fields(HostFlags)}
    account = diagnose(stages, config, lag_ms)
    for one in account.tries:
        command = re.search(r"asyncagent ([\w-]+)", one.what)
        assert command is None or command[1] in COMMANDS
        advised: dict[str, Any] = {}
        for name, value in re.findall(r"--(\w+)(?:=(\S+))?", one.what):
            assert name in fields or (command and name in hosts)
            if value.isdigit():
                advised[name] = int(value)
                assert value != str(getattr(config, name)), f"{name} is that already"
        if not config.deterministic:
            dataclasses.replace(config, **advised)
        assert one.why


def test_means_go_by_time_and_by_what_is_known() -> None:
    """A report of nine seconds weighs nine times one of a second; who does not know has no say."""
    short, long = Stages(env_steps=1.0, loop_busy=0.5), Stages(env_steps=0.0)
    mean = mean_stages([(1.0, short), (9.0, long), (0.0, Stages(env_steps=0.7))])
    assert mean.env_steps == pytest.approx(0.1)
    assert mean.loop_busy == 0.5
    assert math.isnan(mean.hosts_wait)
    assert mean_stages([]) == pytest.approx(Stages(), nan_ok=True)
    assert mean_lag_ms([(1.0, 10.0), (3.0, 2.0), (5.0, math.nan)]) == pytest.approx(4.0)
    assert math.isnan(mean_lag_ms([]))


def test_a_verdict_while_training() -> None:
    """Nothing is judged before the first report that has learned is over; what is long past is
    forgotten."""
    doctor = Doctor(CONFIG)
    busy = {"environments": WAITS._replace(env_steps=0.9), "learner": WAITS._replace(
        learner_computes=0.9)}  # fmt: skip
    for at_s, frames_per_s in ((1.0, 0.0), (2.0, 0.0), (5.0, 9.0)):
        assert doctor.see(at_s, frames_per_s, busy["learner"], 1.0) == Verdict()
    assert doctor.see(10.0, 9.0, busy["environments"], 1.0).limit == "environments"
    time_s, limits = 10.0, []
    while time_s < 10.0 + 2 * WINDOW_S:
        time_s += 5.0
        limits.append(doctor.see(time_s, 9.0, busy["learner"], 1.0).limit)
    assert limits[-1] == "learner"
    assert doctor._parts[0][1] is busy["learner"]
    assert sum(seconds for seconds, _, _ in doctor._parts) == WINDOW_S


# The command.


def report(time_s: float, **stages: float | None) -> dict[str, Any]:
    shares = {name: None if share != share else share for name, share in WAITS._asdict().items()}
    return {"time_s": time_s, "frames_per_s": 100.0, "loop_lag_ms": 2.0, "stages": shares | stages}


def run_folder(folder: Path, *lines: dict[str, Any] | str) -> Path:
    """As a run leaves it."""
    (folder / "config.json").write_text(CONFIG.to_json())
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return folder


def test_the_command_tells_the_verdict_with_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares, the sentence, flags to try and what will not help; the beginning is left out."""
    run_folder(
        tmp_path,
        report(5.0, env_steps=0.0),
        '{"time_s": 7.0, "stages": {"env_st',
        "[1, 2]",
        report(10.0, env_steps=0.8) | {"hosts": {"far": {"env_steps": 0.25, "waits": 0.5}}},
        report(15.0, env_steps=0.9) | {"hosts": {"far": {"env_steps": 0.25, "waits": 0.5}}},
    )
    assert main(["doctor", f"--logdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "10 s of training, 100 frames/s" in said
    assert re.search(r"environments +stepping +85%", said)
    assert "environments limit: they step 85% of the time" in said
    assert "--env_threads=" in said
    assert "will not help: a faster GPU" in said
    assert re.search(r"far +steps 25%, waits 50%", said)


def test_the_command_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints one object; --last_s leaves what is older out."""
    run_folder(tmp_path, *(report(float(t), learner_computes=t / 50) for t in range(0, 50, 5)))
    assert main(["doctor", f"--logdir={tmp_path}", "--json", "--last_s=10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limit"] == "learner"
    assert found["advice"].startswith("the learner limits")
    assert (found["reports"], found["seconds"], found["loop_lag_ms"]) == (2, 10.0, 2.0)
    assert found["stages"]["learner_computes"] == pytest.approx(0.85)
    assert found["stages"]["hosts_wait"] is None
    assert {"what", "why"} == set(found["try"][0])
    assert main(["doctor", f"--logdir={tmp_path}", "--json", "--last_s=0"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 45.0


def test_a_run_that_has_told_too_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shares that nobody knows yet give no verdict, and no failure."""
    run_folder(tmp_path, report(5.0) | {"stages": {}})
    assert main(["doctor", f"--logdir={tmp_path}"]) == 0
    assert "too little is known yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "metrics.jsonl is not there"),
        ([], "metrics.jsonl is empty"),
        (["rubbish", "{}"], "none of its 2 lines is one"),
        (['{"time_s": 5.0, "frames": 1}'], "made by an older asyncagent"),
    ],
)
def test_what_is_no_run_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str] | None, said: str
) -> None:
    """Files that are missing, empty, damaged or old: exit status 2, one line that says which."""
    if lines is not None:
        run_folder(tmp_path, *lines)
    assert main(["doctor", f"--logdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_no_folder_and_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there, and one without the run's flags, are told in one line, too."""
    assert main(["doctor", f"--logdir={tmp_path / 'none'}"]) == 2
    assert "is no folder" in capsys.readouterr().err
    (run_folder(tmp_path, report(5.0)) / "config.json").unlink()
    assert main(["doctor", f"--logdir={tmp_path}"]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
    assert main(["doctor", f"--logdir={tmp_path}", "--last_s=-1"]) == 2
    assert "last_s" in capsys.readouterr().err


def test_it_is_told_which_run(capsys: pytest.CaptureFixture[str]) -> None:
    """No folder is taken for granted: training writes to none that the doctor could guess."""
    assert main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert "--logdir is missing" in error and error.count("\n") == 1
