"""Decisions about shares, and the command that reads them out of a run's folder."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asyncagent import building, saving
from asyncagent import config as config_module
from asyncagent.__main__ import main
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.commands.tune import TuneFlags
from asyncagent.config import LEARNING_FLAGS, PRESETS, Config, resolve
from asyncagent.doctor import WINDOW_S, Doctor, diagnose, mean_lag_ms, mean_stages
from asyncagent.errors import CheckpointError
from asyncagent.host import HostFlags
from asyncagent.limits import limit_of
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
    ("decoding", FAR._replace(cores_busy=0.95, env_cpu=math.nan, learner_cpu=0.2), 1.0),
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


# What is advised.

LEVELS = (
    *("atari_breakout", "atari_pong,atari_boxing,atari_qbert,atari_seaquest", "doom_basic"),
    *("dmlab30", "rooms_watermaze", "catch", "gym:CartPole-v1", "dmlab30,rooms_watermaze"),
)
HOSTS_ONLY: dict[str, Any] = {"listen": "tcp://0.0.0.0:5555", "num_actors": 0, "num_groups": 0}
FLAGS: list[dict[str, Any]] = [
    {},
    HOSTS_ONLY | {"compression": "lz4", "secret_key": "keys/a"},
    {"listen": "tcp://127.0.0.1:5555", "compression": "zstd", "weights_precision": "bfloat16"},
    {"precision": "float32", "net": "deep", "epochs_per_batch": 2, "max_policy_lag": 20},
    {"precision": "bfloat16", "device": "cuda", "max_policy_lag": 40, "learner_threads": 4096},
    {"learner_device": "cuda:0", "inference_device": "cpu", "batch_size": 512},
    {
        "deterministic": True,
        "batch_size": 32,
        "num_actors": 32,
        "num_groups": 1,
        "epochs_per_batch": 2,
    },
    {"deterministic": True, "num_actors": 64, "num_groups": 1, "batch_size": 16},
]


def configs(level_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Config]]:
    """Of many kinds, with the cores of the machine they are for."""
    for preset in PRESETS:
        for num_cores in (1, 2, 6, 64):
            monkeypatch.setattr(config_module, "cores", lambda num_cores=num_cores: num_cores)
            for flags in FLAGS:
                yield num_cores, resolve(level_name, preset, **flags)
            config = resolve(level_name, preset)
            size = config.group_size
            for groups in (1, 2, config.num_groups, 3 * config.num_groups):
                for threads in {1, size, 2 * size}:
                    yield (
                        num_cores,
                        dataclasses.replace(
                            config, num_groups=groups, num_actors=groups * size, env_threads=threads
                        ),
                    )
    wide: dict[str, Any] = {"num_actors": 4096, "num_groups": 4, "batch_size": 256}
    yield 8, dataclasses.replace(config, **wide)


def flags_in(what: str, config: Config) -> dict[str, Any]:
    """Those that are typed there, of the types that Config wants; "..." stands for some text."""
    said = re.findall(r"--(\w+)=(\S+)", what)
    return {name: type(getattr(config, name))(value) for name, value in said}


def warnings_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What training so would warn of, without figures."""
    said: set[str] = set()
    log = SimpleNamespace(warning=lambda text, *args: said.add(text))
    monkeypatch.setattr(building, "_log", log)
    building._warn(config)
    return said


@pytest.mark.parametrize("level_name", LEVELS)
def test_all_that_is_advised_can_be_done(level_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are accepted, each changes something, the run can go on with them, plays as many
    levels as before, and is warned of nothing new."""
    seen = set()
    for num_cores, config in configs(level_name, monkeypatch):
        before = warnings_of(config, monkeypatch)
        for _, stages, lag_ms in CASES:
            for one in diagnose(stages, config, lag_ms, num_cores).tries:
                assert one.why
                key = (config, one.what)
                if key in seen or not one.what.startswith("--"):
                    continue
                seen.add(key)
                advised = flags_in(one.what, config)
                assert advised
                for name, value in advised.items():
                    assert value != getattr(config, name), f"{one.what}: {name} is that already"
                changed = dataclasses.replace(config, **advised)
                assert warnings_of(changed, monkeypatch) <= before, one.what
                assert changed.inference_threads <= max(num_cores, config.inference_threads)
                assert changed.learner_threads <= max(num_cores, config.learner_threads)
                assert changed.env_threads <= max(config.group_size, config.env_threads)
                if not one.what.endswith(" in a new --logdir"):
                    saving._check_fits(config, changed, Path("checkpoint"))
                elif changed != config:
                    with pytest.raises(CheckpointError):
                        saving._check_fits(config, changed, Path("checkpoint"))
    assert len(seen) > 50


@pytest.mark.parametrize("flags", FLAGS)
def test_commands_that_are_advised_can_be_typed(flags: dict[str, Any]) -> None:
    """They exist, and take the flags; tune tries with the network and the work of the run."""
    config = resolve("doom_basic", "workstation", **flags)
    for _, stages, lag_ms in CASES:
        for one in diagnose(stages, config, lag_ms, 16).tries:
            if not one.what.startswith("asyncagent "):
                continue
            _, command, *arguments = shlex.split(one.what)
            if command == "actors":
                given: dict[str, Any] = dict(flag[2:].split("=") for flag in arguments)
                HostFlags(**given)
                continue
            assert command == "tune"
            tuned = parse_env_flags(TuneFlags, arguments, level_name="", prog="", description="")
            for name in ("level_name", "preset", "net", "use_lstm", *LEARNING_FLAGS):
                assert getattr(tuned, name) == getattr(config, name), name
            for name in ("device", "learner_device", "inference_device", "precision"):
                assert getattr(tuned, name) == getattr(config, name), name


def test_tune_is_advised_for_the_same_network() -> None:
    """What the run has of its own is typed, and nothing else."""
    config = resolve("doom_basic", "workstation", net="deep", use_lstm=True, device="cpu")
    tries = [one.what for one in diagnose(FULL._replace(env_cpu=0.6), config).tries]
    assert (
        "asyncagent tune --level_name=doom_basic --preset=workstation --net=deep --use_lstm "
        "--device=cpu"
    ) in tries


def tries_of(stages: Stages, config: Config, num_cores: int = 16) -> str:
    return "\n".join(one.what for one in diagnose(stages, config, 1.0, num_cores).tries)


@pytest.mark.parametrize(
    ("level_name", "groups", "half"),
    [
        ("atari_breakout", 4, True),
        ("atari_pong,atari_boxing,atari_qbert,atari_seaquest", 4, False),
        ("atari_pong,atari_boxing,atari_qbert,atari_seaquest", 8, True),
        ("atari_pong,atari_boxing,atari_qbert,atari_seaquest", 12, False),
        ("dmlab30", 30, False),
        ("dmlab30", 60, False),
        ("rooms_watermaze", 8, False),
    ],
)
def test_fewer_groups_keep_every_level_as_often(level_name: str, groups: int, half: bool) -> None:
    """Half of the groups is advised where each level has as many; DMLab's have one each."""
    flags: dict[str, Any] = {"num_groups": groups, "num_actors": 4 * groups}
    if not level_name.startswith("atari"):
        flags["num_actors"] = groups
    account = diagnose(WAITS._replace(loop_busy=0.95), resolve(level_name, **flags))
    tries = [one.what for one in account.tries]
    assert (f"--num_groups={groups // 2}" in tries) == half
    assert ("fewer, larger groups" in account.verdict.advice) == half


def test_more_environments_are_limited() -> None:
    """As many as a batch bears, in groups as they were; not one more."""
    slow = WAITS._replace(env_steps=0.9)
    of = functools.partial(resolve, "atari_breakout", batch_size=32, num_groups=8)
    assert "--num_actors=512 --num_groups=16" in tries_of(slow, of(num_actors=256))
    assert "--num_actors=510 --num_groups=10" in tries_of(slow, of(num_actors=408))
    three = "atari_pong,atari_boxing,atari_qbert"
    uneven = resolve(three, batch_size=8, num_actors=96, num_groups=12)
    assert "--num_actors=120 --num_groups=15" in tries_of(slow, uneven)
    full = diagnose(slow, of(num_actors=512, env_threads=1), 1.0, 16)
    assert not any("num_actors" in one.what for one in full.tries)
    assert "; more threads help, a faster GPU does not" in full.verdict.advice


@pytest.mark.parametrize(
    ("has", "num_cores", "advised"), [(1, 16, 2), (8, 16, 16), (12, 16, 16), (12, 14, 14)]
)
def test_threads_of_a_group(has: int, num_cores: int, advised: int) -> None:
    """Up to twice as many: no more than its environments, nor than cores."""
    config = resolve("atari_breakout", num_actors=64, num_groups=4, env_threads=has)
    assert f"--env_threads={advised}" in tries_of(
        WAITS._replace(env_steps=0.9), config, num_cores
    ).split("\n")


@pytest.mark.parametrize("has", [16, 20])
def test_threads_of_a_group_that_has_enough(has: int) -> None:
    """A thread per environment, or more: nothing is said of them."""
    config = resolve("atari_breakout", num_actors=64, num_groups=4, env_threads=has)
    assert "env_threads" not in tries_of(WAITS._replace(env_steps=0.9), config)


def test_what_changes_learning_says_how() -> None:
    """A batch is another with --override, a net in a new folder alone."""
    config = resolve("rooms_watermaze", epochs_per_batch=2)
    tries = tries_of(WAITS._replace(learner_computes=0.95), config).split("\n")
    assert "--epochs_per_batch=1 --override=epochs_per_batch" in tries
    assert "--batch_size=64 --override=batch_size" in tries
    assert "--net=shallow in a new --logdir" in tries


@pytest.mark.parametrize(("limit", "stages", "lag_ms"), CASES)
def test_a_deterministic_run_is_told_so(limit: str, stages: Stages, lag_ms: float) -> None:
    """First that it is one; what it would refuse is neither to try nor in the sentence."""
    config = resolve("memory", deterministic=True, num_actors=32, batch_size=32)
    account = diagnose(stages, config, lag_ms)
    if not account.verdict.advice:
        assert not account.tries
        return
    tries = [one for one in account.tries if "leave the machine" not in one.what]
    assert tries[0].what == "no --deterministic, in a new --logdir"
    helps = account.verdict.advice.partition("; ")[2]
    assert helps.startswith("leaving --deterministic out")
    helps = helps.partition(" help")[0]
    for refused in ("groups", "environments", "GPU", "hosts", "batches"):
        assert refused not in helps
    for one in tries[1:]:
        if one.what.startswith("--"):
            dataclasses.replace(config, **flags_in(one.what, config))


@pytest.mark.parametrize(("limit", "stages", "lag_ms"), CASES)
def test_who_listens_is_not_told_to(limit: str, stages: Stages, lag_ms: float) -> None:
    """A run that accepts hosts is advised of hosts, not of accepting them."""
    config = resolve("atari_breakout", listen="tcp://127.0.0.1:5555")
    assert not any("--listen" in one.what for one in diagnose(stages, config, lag_ms).tries)


def test_the_sentence_names_what_is_left() -> None:
    """Compression that is the strongest, a GPU that is there: they are not recommended."""
    strong = HOSTS_ONLY | {"compression": "zstd", "weights_precision": "bfloat16"}
    said = diagnose(FAR, resolve("atari_breakout", **strong)).verdict.advice
    assert said.endswith("; a faster link helps, more cores or a faster GPU do not")
    slow = WAITS._replace(inference_computes=0.95)
    said = diagnose(slow, resolve("atari_breakout", device="cuda"), 1.0, 2).verdict.advice
    assert "a faster GPU" in said and "or a GPU" not in said and "; a GPU" not in said


# Learners with hosts alone.

ALONE = Stages(
    inference_computes=0.0, inference_copies=0.0, inference_waits=1.0,
    learner_computes=0.0, learner_copies=0.0, learner_waits=1.0, loop_busy=0.01, cores_busy=0.02,
    cores_taken=0.0, inference_cpu=0.0, learner_cpu=0.0,
)  # fmt: skip
"""Nobody is there who would act."""


@pytest.mark.parametrize(
    ("listen", "connect"),
    [
        ("tcp://0.0.0.0:5555", "tcp://learner:5555"),
        ("tcp://*:*", "tcp://learner:PORT"),
        ("tcp://[::1]:7", "tcp://[::1]:7"),
        ("ipc:///tmp/a:b", "ipc:///tmp/a:b"),
    ],
)
def test_hosts_that_are_not_there(listen: str, connect: str) -> None:
    """No host: that is the verdict, from the first report on, with what to type."""
    config = resolve("atari_breakout", **(HOSTS_ONLY | {"listen": listen}))
    account = diagnose(ALONE, config)
    assert account.verdict.limit == "actor hosts"
    assert account.verdict.advice == (
        f"no actor host is here, and nobody else acts: start asyncagent actors --connect={connect}"
    )
    assert [one.what for one in account.tries] == [f"asyncagent actors --connect={connect}"]
    assert Doctor(config).see(5.0, 0.0, ALONE, 1.0) == account.verdict
    assert Doctor(config).see(5.0, 0.0, FAR, 1.0) == Verdict()
    assert diagnose(FAR._replace(hosts_wait=0.3), config).verdict.limit == ""
    # One that has just come has said nothing of itself yet; all that were there may have gone.
    assert Doctor(config).see(5.0, 0.0, ALONE, 1.0, 1) == Verdict()
    doctor = Doctor(config)
    doctor.see(5.0, 9.0, FAR, 1.0, 1)
    assert doctor.see(10.0, 9.0, FAR, 1.0, 1).limit != "actor hosts"
    assert doctor.see(15.0, 0.0, ALONE, 1.0, 0).limit == "actor hosts"
    assert diagnose(ALONE, CONFIG).verdict.limit == ""


def test_hosts_have_keys_where_the_learner_has() -> None:
    """A host without would be refused."""
    config = resolve("atari_breakout", **HOSTS_ONLY, secret_key="a", allowed_keys="b")
    (one,) = diagnose(ALONE, config).tries
    assert one.what.endswith(" --connect=tcp://learner:5555 --secret_key=... --learner_key=...")


@pytest.mark.parametrize(
    ("loop_busy", "num_cores", "limit"),
    [(0.3, 16, "decoding"), (0.3, 1, "learner"), (0.95, 2, "event loop"), (0.95, 4, "learner")],
)
def test_cores_full_of_hosts_messages(loop_busy: float, num_cores: int, limit: str) -> None:
    """The event loop answers for its own thread alone; what decodes has a name of its own."""
    stages = FAR._replace(
        hosts_step=0.4, hosts_wait=0.2, loop_busy=loop_busy, cores_busy=0.95, env_cpu=math.nan,
        inference_cpu=0.0, learner_cpu=0.36,
    )  # fmt: skip
    config = resolve("atari_breakout", **HOSTS_ONLY, compression="zstd")
    account = diagnose(stages, config, 1.0, num_cores)
    assert account.verdict.limit == limit
    decoding = 0.95 - 0.36 - loop_busy / num_cores
    evidence = {figure.doing: figure.share for figure in account.evidence}
    assert evidence["by decoding for hosts"] == pytest.approx(decoding)
    if limit == "decoding":
        assert account.verdict.advice == (
            "decoding limits: cores 95% busy, 57% with what hosts send; lighter compression or "
            "more cores help, a faster GPU or more actor hosts do not"
        )
        assert account.tries[0].what == "--compression=lz4"


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


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "██"), ("latin-1", "##"), ("ascii", "##")])
def test_the_command_keeps_to_the_terminals_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, bar: str
) -> None:
    """Bars, and whatever a path has, are printed with the letters that there are."""
    written = io.BytesIO()
    folder = tmp_path / "läuft…"
    folder.mkdir()
    run_folder(folder, *(report(float(t), env_steps=0.9) for t in range(5, 20, 5)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main(["doctor", f"--logdir={folder}"]) == 0
    sys.stdout.flush()
    said = written.getvalue().decode(encoding)
    assert re.search(rf"environments +stepping +90% +{bar}", said)
    assert "environments limit" in said


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
