"""scripts/experiment.py: the ancestor's command lines, word for word."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import experiment
from asyncagent.commands import actors as actors_command
from asyncagent.commands import test as test_command
from asyncagent.commands import train as train_command
from asyncagent.config import Config
from asyncagent.errors import CheckpointError, ConfigError
from asyncagent.host import HostFlags

SCRIPT = Path(experiment.__file__)

ATARI = "--level_name=atari_breakout --num_actors=4 --logdir=logdir/atari_4_1"
DOOM = "--level_name=doom_benchmark --num_actors=4 --logdir=logdir/doom_4_1"
DMLAB = "--level_name=rooms_collect_good_objects_train --num_actors=4 --logdir=logdir/dmlab_4_1"
LEARNER = (
    "--job_name=learner --task=0 --num_actors=150 --level_name=dmlab30 --batch_size=32 "
    "--entropy_cost=0.0033391318945337044 --learning_rate=0.00031866995608948655 "
    "--total_environment_frames=10000000000 --reward_clipping=soft_asymmetric"
)
ACTOR = "--job_name=actor --task=149 --num_actors=150 --level_name=dmlab30 --dataset_path=[...]"
TEST = "--mode=test --level_name=dmlab30 --dataset_path=[...] --test_num_episodes=10"


def values_of(line: str) -> dict[str, Any]:
    """What ``parse`` makes of a command line."""
    return experiment.parse(shlex.split(line))


def changed(line: str) -> dict[str, Any]:
    """The values of a command line that are not the ancestor's defaults."""
    defaults = experiment.parse([])
    return {name: value for name, value in values_of(line).items() if value != defaults[name]}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Records what would be run; nothing restarts, trains or plays."""
    tape: list[tuple[Any, ...]] = []

    def train(config: Config) -> int:
        tape.append(("train", config))
        return 0

    def test(logdir: str, test_num_episodes: int, dataset_path: str | None) -> int:
        tape.append(("test", logdir, test_num_episodes, dataset_path))
        return 0

    def act(flags: HostFlags) -> int:
        tape.append(("act", flags))
        return 0

    monkeypatch.setattr(experiment, "restart_in_venv", lambda argv: None)
    monkeypatch.setattr(actors_command, "run", act)
    monkeypatch.setattr(train_command, "run", train)
    monkeypatch.setattr(test_command, "run", test)
    return tape


def test_defaults_are_the_forks() -> None:
    """Every flag of the ancestor exists, with the fork's default, and three of ours."""
    assert experiment.parse([]) == {
        "logdir": experiment.FLAGS["logdir"].default,
        "mode": "train",
        "test_num_episodes": 10,
        "task": -1,
        "job_name": "learner",
        "total_environment_frames": 1_000_000_000,
        "num_actors": 4,
        "batch_size": 64,
        "unroll_length": 32,
        "num_action_repeats": 4,
        "seed": 1,
        "entropy_cost": 0.00025,
        "baseline_cost": 0.5,
        "discounting": 0.99,
        "reward_clipping": "abs_one",
        "dataset_path": "",
        "level_name": "explore_goal_locations_small",
        "width": 96,
        "height": 72,
        "learning_rate": 0.00048,
        "decay": 0.99,
        "momentum": 0.0,
        "epsilon": 0.1,
        "renderer": "software",
        "benchmark_mode": 0,
        "port": 8000,
        "inference": "host",
        "override": "",
    }
    assert Path(experiment.FLAGS["logdir"].default).name == "agent"


@pytest.mark.parametrize(
    ("line", "given"),
    [
        (
            ATARI,
            {"level_name": "atari_breakout", "logdir": "logdir/atari_4_1"},
        ),
        (DOOM, {"level_name": "doom_benchmark", "logdir": "logdir/doom_4_1"}),
        (
            DMLAB,
            {"level_name": "rooms_collect_good_objects_train", "logdir": "logdir/dmlab_4_1"},
        ),
        (
            LEARNER,
            {
                "task": 0,
                "num_actors": 150,
                "level_name": "dmlab30",
                "batch_size": 32,
                "entropy_cost": 0.0033391318945337044,
                "learning_rate": 0.00031866995608948655,
                "total_environment_frames": 10**10,
                "reward_clipping": "soft_asymmetric",
            },
        ),
        (
            ACTOR,
            {
                "job_name": "actor",
                "task": 149,
                "num_actors": 150,
                "level_name": "dmlab30",
                "dataset_path": "[...]",
            },
        ),
        (TEST, {"mode": "test", "level_name": "dmlab30", "dataset_path": "[...]"}),
    ],
)
def test_ancestors_lines_are_understood(line: str, given: dict[str, Any]) -> None:
    """Each command line of the ancestor's users changes exactly the flags it names."""
    assert changed(line) == given
    assert changed(line.replace("=", " ")) == given, "--name value means the same"
    assert changed(line.replace("--", "-")) == given, "one dash means the same"


def test_atari_line_trains(calls: list[tuple[Any, ...]]) -> None:
    """The Atari line trains with the fork's values, network and optimiser."""
    assert experiment.main(shlex.split(ATARI)) == 0
    [(what, config)] = calls
    assert what == "train"
    wanted = {
        "level_name": "atari_breakout",
        "preset": "paper",
        "logdir": "logdir/atari_4_1",
        "seed": 1,
        "total_environment_frames": 10**9,
        "num_actors": 4,
        "num_action_repeats": 4,
        "unroll_length": 32,
        "batch_size": 64,
        "discounting": 0.99,
        "reward_clipping": "abs_one",
        "bootstrap_truncated": False,
        "entropy_cost": 0.00025,
        "baseline_cost": 0.5,
        "clip_rho_threshold": 1.0,
        "clip_pg_rho_threshold": 1.0,
        "optimizer": "rmsprop",
        "learning_rate": 0.00048,
        "decay": 0.99,
        "momentum": 0.0,
        "epsilon": 0.1,
        "max_grad_norm": 0.0,
        "net": "ancestor",
        "use_lstm": True,
        "checkpoint_interval_s": 600.0,
        "summary_interval_s": 30.0,
    }
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("line", "level_name", "groups"),
    [
        (DOOM, "doom_benchmark", 4),
        (DMLAB, "rooms_collect_good_objects_train", 4),
        ("", "explore_goal_locations_small", 4),
        ("--level_name=dmlab30 --num_actors=150", "dmlab30", 150),
    ],
)
def test_other_families_train_with_the_forks_network(
    line: str, level_name: str, groups: int, calls: list[tuple[Any, ...]]
) -> None:
    """ViZDoom and DMLab take the same defaults; every DMLab environment has its own process."""
    assert experiment.main(shlex.split(line)) == 0
    [(what, config)] = calls
    assert what == "train"
    assert (config.level_name, config.num_groups) == (level_name, groups)
    assert (config.net, config.use_lstm, config.batch_size) == ("ancestor", True, 64)
    assert (config.width, config.height, config.discounting) == (96, 72, 0.99)


def test_learner_has_no_actors_of_its_own(
    calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The ancestor's learner listens on port 8000 of this machine alone, says so, and acts not."""
    assert experiment.main(shlex.split(LEARNER)) == 0
    [(what, config)] = calls
    assert what == "train"
    wanted = {
        "level_name": "dmlab30",
        "listen": "tcp://127.0.0.1:8000",
        "num_actors": 0,
        "num_groups": 0,
        "batch_size": 32,
        "unroll_length": 32,
        "entropy_cost": 0.0033391318945337044,
        "learning_rate": 0.00031866995608948655,
        "total_environment_frames": 10**10,
        "reward_clipping": "soft_asymmetric",
        "net": "ancestor",
        "use_lstm": True,
        "secret_key": "",
    }
    assert {name: getattr(config, name) for name in wanted} == wanted
    said = capsys.readouterr().out
    assert said == "tcp://127.0.0.1:8000: for actors with --job_name=actor --task=0 ... 149\n"


def test_actor_is_a_host_of_one_environment(calls: list[tuple[Any, ...]]) -> None:
    """The ancestor's actor connects to port 8000 of this machine and infers in its own process."""
    assert experiment.main(shlex.split(ACTOR)) == 0
    [(what, flags)] = calls
    assert what == "act"
    assert (flags.connect, flags.num_actors) == ("tcp://127.0.0.1:8000", 1)
    assert (flags.inference, flags.name) == ("host", "actor-149")
    assert (flags.dataset_path, flags.renderer) == ("[...]", "software")
    assert flags.give_up_s == 0, "it waits for the learner as long as that takes"


def test_actors_may_leave_inference_to_the_learner(calls: list[tuple[Any, ...]]) -> None:
    """--inference and --port are taken on either side."""
    for line in (LEARNER, ACTOR):
        assert experiment.main([*shlex.split(line), "--inference=learner", "--port=9001"]) == 0
    (_, config), (_, flags) = calls
    assert config.listen == flags.connect == "tcp://127.0.0.1:9001"
    assert flags.inference == "learner"


def test_actor_takes_every_flag(calls: list[tuple[Any, ...]]) -> None:
    """An actor may be given whatever the learner is given."""
    line = LEARNER.replace("--job_name=learner --task=0", "--job_name=actor --task=7")
    assert experiment.main(shlex.split(line)) == 0
    assert [(what, flags.name) for what, flags in calls] == [("act", "actor-7")]


def test_without_a_task_the_job_is_ignored(calls: list[tuple[Any, ...]]) -> None:
    """On one machine --job_name means nothing, as in the ancestor."""
    assert experiment.main([*shlex.split(ATARI), "--job_name=actor"]) == 0
    [(what, config)] = calls
    assert (what, config.num_actors, config.listen) == ("train", 4, "")


@pytest.mark.parametrize("level_name", ["catch", "memory", "cartpole"])
def test_levels_without_images(level_name: str, calls: list[tuple[Any, ...]]) -> None:
    """Levels that the fork has not, and its network cannot see, take a network that can."""
    assert experiment.main([f"--level_name={level_name}", "--num_action_repeats=1"]) == 0
    assert (calls[0][1].net, calls[0][1].use_lstm) == ("auto", True)


@pytest.mark.parametrize(("text", "random"), [("0", False), ("1", True)])
def test_benchmark_mode(text: str, random: bool, calls: list[tuple[Any, ...]]) -> None:
    """--benchmark_mode=1 acts at random."""
    assert experiment.main([*shlex.split(DOOM), f"--benchmark_mode={text}"]) == 0
    assert calls[0][1].benchmark_mode is random


def test_test_mode_of_dmlab30(tmp_path: Path, calls: list[tuple[Any, ...]]) -> None:
    """The ancestor's line for testing hands on where the data set is."""
    assert experiment.main([*shlex.split(TEST), f"--logdir={tmp_path}"]) == 0
    assert calls == [("test", str(tmp_path), 10, "[...]")]


def test_every_learning_flag_reaches_the_run(calls: list[tuple[Any, ...]]) -> None:
    """What the command line says of environments and learning is what is trained with."""
    given: dict[str, Any] = {
        "logdir": "/tmp/elsewhere",
        "total_environment_frames": 12_000,
        "num_actors": 150,
        "batch_size": 7,
        "unroll_length": 11,
        "num_action_repeats": 3,
        "seed": 99,
        "entropy_cost": 0.125,
        "baseline_cost": 0.25,
        "discounting": 0.75,
        "reward_clipping": "soft_asymmetric",
        "learning_rate": 0.0625,
        "decay": 0.875,
        "momentum": 0.5,
        "epsilon": 2.0,
        "dataset_path": "/data/psychlab",
        "width": 64,
        "height": 48,
        "renderer": "hardware",
        "override": "batch_size,decay",
    }
    assert set(given) == set(experiment.CONFIG_FLAGS)
    line = ["--level_name=atari_pong", *(f"--{name}={value}" for name, value in given.items())]
    assert experiment.main(line) == 0
    [(_, config)] = calls
    assert {name: getattr(config, name) for name in given} == given


def test_test_mode_plays(calls: list[tuple[Any, ...]]) -> None:
    """--mode=test plays episodes from the run's folder."""
    line = "--mode=test --level_name=atari_pong --logdir=runs/1 --test_num_episodes=3"
    assert experiment.main(shlex.split(line)) == 0
    assert calls == [("test", "runs/1", 3, None)]


def test_test_mode_plays_what_was_learned(
    tmp_path: Path, calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """--mode=test refuses a run that learned another level than --level_name."""
    config = Config(level_name="atari_pong", logdir=str(tmp_path))
    (tmp_path / "config.json").write_text(config.to_json())
    line = ["--mode=test", f"--logdir={tmp_path}"]
    assert experiment.main([*line, "--level_name=atari_qbert"]) == 2
    assert "learned atari_pong, not atari_qbert" in capsys.readouterr().err
    assert experiment.main([*line, "--level_name=atari_pong"]) == 0
    assert calls == [("test", str(tmp_path), 10, None)]


@pytest.mark.parametrize(
    ("text", "value"), [("1e9", 10**9), ("10000000000", 10**10), ("2.5e3", 2500), ("-1", -1)]
)
def test_whole_numbers(text: str, value: int) -> None:
    """Whole numbers may be written with an exponent."""
    assert values_of(f"--total_environment_frames={text}")["total_environment_frames"] == value
    assert values_of(f"--total_environment_frames {text}")["total_environment_frames"] == value


@pytest.mark.parametrize(
    ("line", "say"),
    [
        (f"{LEARNER} --task=1", ["task=1 must be 0: there is one learner"]),
        (f"{LEARNER} --num_actors=0", ["num_actors=0 must be >= 1"]),
        (f"{ACTOR} --task=150", ["task=150 must be < num_actors=150"]),
        (f"{ACTOR} --num_actors=0", ["num_actors=0 must be >= 1"]),
        (f"{ACTOR} --port=0", ["port=0 must be in [1, 65535]"]),
        (f"{ACTOR} --port=65536", ["port=65536 must be in [1, 65535]"]),
        (f"{ACTOR} --inference=hosts", ["inference='hosts'", "did you mean host?"]),
        (f"{ACTOR} --job_name=actors", ["job_name='actors'", "did you mean actor?"]),
        (f"{ATARI} --num_actor=4", ["unknown flag --num_actor;", "--num_actors"]),
        (f"{ATARI} --xyzzy=4", ["unknown flag --xyzzy", "--help"]),
        (f"{ATARI} extra", ["unexpected argument 'extra'"]),
        (f"{ATARI} --seed", ["--seed needs a value"]),
        (f"{ATARI} --seed --task=-1", ["--seed needs a value"]),
        (f"{ATARI} --seed=1.5", ["seed='1.5' must be a whole number"]),
        (f"{ATARI} --seed=inf", ["seed='inf' must be a whole number"]),
        (f"{ATARI} --epsilon=tiny", ["epsilon='tiny' must be a number"]),
        (f"{ATARI} --mode=tset", ["mode='tset'", "train, test", "did you mean test?"]),
        (f"{ATARI} --reward_clipping=none", ["reward_clipping='none'", "soft_asymmetric"]),
        (f"{ATARI} --task=-2", ["task=-2 must be >= -1"]),
    ],
)
def test_refused_before_anything_starts(
    line: str, say: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be done ends with status 2 and one line, before a .venv is even looked for."""

    def restart(argv: list[str]) -> None:
        pytest.fail("restarted")

    monkeypatch.setattr(experiment, "restart_in_venv", restart)
    assert experiment.main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("experiment: ") and err.count("\n") == 1
    assert [part for part in say if part not in err] == []


@pytest.mark.parametrize(
    ("line", "say"),
    [
        ("--level_name=doom_bencmark", ["doom_benchmark"]),
        ("--level_name=atari_brekout", ["atari_breakout"]),
        (f"{ATARI} --num_actors=0", ["num_actors=0 must be >= 1"]),
        (f"{ATARI} --discounting=1.5", ["discounting=1.5 must be in [0, 1]"]),
        (f"{ATARI} --learning_rate=nan", ["learning_rate=nan must be > 0"]),
        (f"{LEARNER} --learning_rate=nan", ["learning_rate=nan must be > 0"]),
        (f"{ACTOR} --level_name=dmlab3", ["level_name='dmlab3'", "dmlab30"]),
    ],
)
def test_impossible_values(
    line: str, say: list[str], calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A value out of range, or a level not to be had, ends with status 2 and one line on why."""
    assert experiment.main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert calls == [] and out == "" and err.count("\n") == 1
    assert [part for part in say if part not in err] == []


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError, 2), (CheckpointError, 2), (OSError, 1)]
)
def test_failures_of_the_run(
    error: type[Exception],
    status: int,
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the user can put right ends in one line and 2, a defect in a traceback and 1."""

    def fail(config: Config) -> int:
        raise error("the reason")

    monkeypatch.setattr(train_command, "run", fail)
    assert experiment.main(shlex.split(ATARI)) == status
    err = capsys.readouterr().err
    assert "the reason" in err
    assert ("Traceback" in err) == (status == 1) and (err.count("\n") == 1) == (status == 2)


class Project:
    """A stand-in for the project: the real script, a set-up and a Python that only say so."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scripts = root / "scripts"
        self.python = root / ".venv" / "bin" / "python"
        self.scripts.mkdir(parents=True)
        shutil.copy(SCRIPT, self.scripts)
        self.write(self.scripts / "setup", "echo set up >&2")

    def write(self, path: Path, script: str) -> None:
        """An executable shell script."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self, *words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Start `python experiment.py` in scripts/ with the Python that runs the tests."""
        command = [sys.executable, *flags, *words]
        return subprocess.run(command, cwd=self.scripts, capture_output=True, text=True, timeout=60)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project in a folder whose name has spaces."""
    return Project(tmp_path / "a project")


def test_help_needs_no_packages(project: Project) -> None:
    """--help lists every flag with its default on a Python that has only its standard library."""
    result = project.run("experiment.py", "--help", flags=("-I", "-S"))
    assert result.returncode == 0 and result.stderr == ""
    words = result.stdout.split()
    for name, flag in experiment.FLAGS.items():
        assert any(word == f"--{name}={flag.default}" for word in words), name


@pytest.mark.parametrize("start", [("experiment.py",), ("-m", "experiment")])
def test_goes_on_in_the_venv(project: Project, start: tuple[str, ...]) -> None:
    """Without a .venv it sets one up, saying so, and starts again in it with the same words."""
    says = "printf '%s\\n' \"$@\""
    (project.scripts / "setup").unlink()
    project.write(
        project.scripts / "setup",
        f"mkdir -p '{project.python.parent}'; cp '{project.scripts}/fake' '{project.python}'",
    )
    project.write(project.scripts / "fake", f"{says}; exit 7")
    result = project.run(*start, *shlex.split(ATARI), "--dataset_path=a b")
    assert result.stdout.splitlines() == [
        str(project.scripts / "experiment.py"),
        *shlex.split(ATARI),
        "--dataset_path=a b",
    ]
    assert result.returncode == 7
    assert "running scripts/setup" in result.stderr


def test_failed_setup_ends_it(project: Project) -> None:
    """Where set-up fails, its exit status is experiment's."""
    project.write(project.scripts / "setup", "echo no python >&2; exit 3")
    result = project.run("experiment.py", *shlex.split(ATARI))
    assert result.returncode == 3 and "no python" in result.stderr


def test_broken_venv_is_no_loop(project: Project) -> None:
    """A .venv whose Python is not its own is reported; the restart is not repeated."""
    project.write(project.python, f'exec "{sys.executable}" "$@"')
    result = project.run("experiment.py", *shlex.split(ATARI))
    assert result.returncode == 2
    assert result.stderr.count("set up") == 1 and ".venv is broken" in result.stderr
