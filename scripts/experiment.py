"""The ancestor's command line: `python -m experiment --level_name=atari_breakout --num_actors=4`.

Accepts the flags of the TensorFlow program `scalable_agent` (in its fork with Atari and ViZDoom)
with that fork's defaults, network and optimiser, and trains or tests with asyncagent; with --task=I
it is one process of a distributed run.  Whichever Python starts it, it goes on in the project's
`.venv`, which it makes first where there is none; until then it imports only the standard library
and runs on any Python from 3.7 on.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from asyncagent.config import Config
    from asyncagent.host import HostFlags

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# Set across the exec: a .venv that does not take hold ends in a message, not in a loop.
RESTARTED = "ASYNCAGENT_EXPERIMENT_RESTARTED"


class Refused(Exception):
    """The command line cannot be done; the message is one line."""


class Flag(NamedTuple):
    """One flag of the ancestor: its default gives its type."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()


FLAGS = {
    "logdir": Flag(os.path.join(tempfile.gettempdir(), "agent"), "folder of checkpoints and logs"),
    "mode": Flag("train", "train, or play test episodes", ("train", "test")),
    "test_num_episodes": Flag(10, "episodes per level in test mode"),
    "task": Flag(-1, "number of this process of a distributed run; -1: one machine"),
    "job_name": Flag("learner", "part of a distributed run, with --task", ("learner", "actor")),
    "total_environment_frames": Flag(10**9, "train for this many frames"),
    "num_actors": Flag(4, "number of environments"),
    "batch_size": Flag(64, "unrolls per update"),
    "unroll_length": Flag(32, "agent steps per unroll"),
    "num_action_repeats": Flag(4, "frames each action is held for"),
    "seed": Flag(1, "random seed"),
    "entropy_cost": Flag(0.00025, "weight of the entropy bonus"),
    "baseline_cost": Flag(0.5, "weight of the value loss"),
    "discounting": Flag(0.99, "discount factor per agent step"),
    "reward_clipping": Flag("abs_one", "how rewards are clipped", ("abs_one", "soft_asymmetric")),
    "dataset_path": Flag("", "DMLab: folder of the psychlab data set"),
    "level_name": Flag("explore_goal_locations_small", "what to learn, or dmlab30"),
    "width": Flag(96, "DMLab: width of an observation in pixels"),
    "height": Flag(72, "DMLab: height of an observation in pixels"),
    "learning_rate": Flag(0.00048, "initial learning rate; falls linearly to 0"),
    "decay": Flag(0.99, "RMSProp: decay of the mean square"),
    "momentum": Flag(0.0, "RMSProp: momentum"),
    "epsilon": Flag(0.1, "RMSProp: added to the mean square"),
    "renderer": Flag("software", "DMLab: renderer", ("software", "hardware")),
    "benchmark_mode": Flag(0, "1: act at random, measure throughput only", ("0", "1")),
    "port": Flag(8000, "of a distributed run's learner on this machine (not the ancestor's)"),
    "inference": Flag(
        "host", "an actor's: in its own process, or the learner's (not the ancestor's)",
        ("host", "learner"),
    ),
    "override": Flag(
        "", "flags changed on purpose when resuming, with commas (not the ancestor's)"
    ),
}  # fmt: skip

DISTRIBUTED = """
A distributed run: a learner, which acts nowhere itself, and --num_actors actors with one
environment each, all on this machine, started in any order:

  python experiment.py --job_name=learner --task=0 --num_actors=150 --level_name=dmlab30 ...
  python experiment.py --job_name=actor --task=I --num_actors=150 ...       for I = 0 ... 149

An actor goes by its own task, num_actors, port, inference, dataset_path and renderer.  It takes
every other flag, too, but level, seed, network and all that concerns learning come from the
learner, which also deals out DMLab-30's levels evenly.  With --inference=learner an actor is a
small process without PyTorch.
For actors on other machines see asyncagent actors --help."""

CONFIG_FLAGS = (
    "logdir",
    "total_environment_frames",
    "num_actors",
    "batch_size",
    "unroll_length",
    "num_action_repeats",
    "seed",
    "entropy_cost",
    "baseline_cost",
    "discounting",
    "reward_clipping",
    "learning_rate",
    "decay",
    "momentum",
    "epsilon",
    "dataset_path",
    "width",
    "height",
    "renderer",
    "override",
)
"""Flags that are fields of ``Config`` under the same name."""

# What the fork's code fixes: for all of its levels one network with LSTM 512, no gradient clipping.
FORK_VALUES: dict[str, Any] = {
    "net": "ancestor",
    "use_lstm": True,
    "optimizer": "rmsprop",
    "max_grad_norm": 0.0,
}


def parse(argv: list[str]) -> dict[str, Any]:
    """Flag values, given and default, of ``--name=value`` or ``--name value`` words.

    Raises Refused, with the nearest valid names or values, for what the ancestor has not.
    """
    values = {name: flag.default for name, flag in FLAGS.items()}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            raise Refused(f"unexpected argument {word!r}: flags are written --name=value")
        given, equals, text = word.lstrip("-").partition("=")
        name = given.replace("-", "_")
        if name not in FLAGS:
            near = difflib.get_close_matches(name, FLAGS, 3, 0.5)
            meant = " or ".join(f"--{match}" for match in near)
            hint = f"did you mean {meant}?" if near else "--help lists the flags"
            raise Refused(f"unknown flag --{given}; {hint}")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise Refused(f"--{name} needs a value: --{name}={FLAGS[name].default}")
        values[name] = _read(name, text)
    return values


def _read(name: str, text: str) -> Any:
    flag = FLAGS[name]
    if flag.choices and text not in flag.choices:
        near = difflib.get_close_matches(text, flag.choices, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Refused(f"{name}={text!r} must be one of {', '.join(flag.choices)}{hint}")
    if isinstance(flag.default, str):
        return text
    kind = "a whole number" if isinstance(flag.default, int) else "a number"
    try:
        return _whole(text) if isinstance(flag.default, int) else float(text)
    except (ValueError, OverflowError):
        raise Refused(f"{name}={text!r} must be {kind}, such as {flag.default}") from None


def _whole(text: str) -> int:
    """Integer of ``text``, which may be written as 1e9."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if number != int(number):
            raise ValueError(text) from None
        return int(number)


def check_part(values: dict[str, Any]) -> None:
    """Raise Refused unless a distributed run has the part that this process is to play."""
    task, num_actors = values["task"], values["num_actors"]
    if task < -1:
        raise Refused(f"task={task} must be >= -1: -1 is one machine")
    if not 1 <= values["port"] <= 65535:
        raise Refused(f"port={values['port']} must be in [1, 65535]")
    if task == -1:
        return
    if num_actors < 1:
        raise Refused(f"num_actors={num_actors} must be >= 1")
    if values["job_name"] == "learner" and task > 0:
        raise Refused(f"task={task} must be 0: there is one learner")
    if task >= num_actors:
        raise Refused(f"task={task} must be < num_actors={num_actors}: the first actor is task 0")


def to_config(values: dict[str, Any]) -> Config:
    """The run that the ancestor would do; groups and threads are chosen from the cores.

    The learner of a distributed run has no actors of its own.  Raises ConfigError where a
    value is out of range.
    """
    from asyncagent.config import family_of, resolve

    flags = {name: values[name] for name in CONFIG_FLAGS} | FORK_VALUES
    if family_of(values["level_name"]) not in ("atari", "doom", "dmlab"):
        flags["net"] = "auto"  # the fork's takes images
    flags["benchmark_mode"] = bool(values["benchmark_mode"])
    if values["task"] >= 0:
        flags |= {"num_actors": 0, "listen": _address(values)}
    return resolve(values["level_name"], "paper", **flags)


def to_host(values: dict[str, Any]) -> HostFlags:
    """The actor ``--task`` of a distributed run: a host with one environment."""
    from asyncagent.host import HostFlags

    return HostFlags(
        connect=_address(values),
        num_actors=1,
        inference=values["inference"],
        name=f"actor-{values['task']}",
        dataset_path=values["dataset_path"],
        renderer=values["renderer"],
    )


def _address(values: dict[str, Any]) -> str:
    return f"tcp://127.0.0.1:{values['port']}"


def help_text() -> str:
    """All flags with their defaults."""
    width = max(len(f"--{name}={flag.default}") for name, flag in FLAGS.items())
    lines = ["usage: python -m experiment [--name=value ...]", ""]
    for name, flag in FLAGS.items():
        choices = f" ({' | '.join(flag.choices)})" if flag.choices else ""
        lines.append(f"  {f'--{name}={flag.default}':{width}}  {flag.help}{choices}")
    return "\n".join([*lines, DISTRIBUTED])


def restart_in_venv(argv: list[str]) -> None:
    """Replace this process by the same command in the project's .venv; return if it is in it."""
    restarted = os.environ.pop(RESTARTED, None)
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    if restarted:
        raise Refused(f"{VENV} is broken: delete it and start again")
    if not VENV.exists():
        print(f"experiment: there is no {VENV} yet: running scripts/setup", file=sys.stderr)
    sys.stderr.flush()
    status = subprocess.run([str(ROOT / "scripts" / "setup")]).returncode
    if status:
        sys.exit(status)
    os.environ[RESTARTED] = "1"
    _exec([str(VENV / "bin" / "python"), str(Path(__file__).resolve()), *argv])


def _exec(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(command[0], command)


def run(values: dict[str, Any]) -> int:
    """Train, act or test; the exit status."""
    from asyncagent.envs import check_level

    check_level(values["level_name"])
    if values["mode"] == "test":
        from asyncagent.commands import test

        _check_same_level(values["logdir"], values["level_name"])
        dataset_path = values["dataset_path"] or None
        return test.run(values["logdir"], values["test_num_episodes"], dataset_path=dataset_path)
    if values["task"] >= 0 and values["job_name"] == "actor":
        from asyncagent.commands import actors

        return actors.run(to_host(values))
    from asyncagent.commands import train

    config = to_config(values)
    if config.listen:
        last = values["num_actors"] - 1
        print(f"{config.listen}: for actors with --job_name=actor --task=0 ... {last}", flush=True)
    return train.run(config)


def _check_same_level(logdir: str, level_name: str) -> None:
    from asyncagent.config import Config
    from asyncagent.errors import UsageError

    path = Path(logdir) / "config.json"
    if path.exists():
        learned = Config.from_json(path.read_text("utf-8"), path).level_name
        if learned != level_name:
            raise UsageError(f"the run in {logdir} learned {learned}, not {level_name}")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; the exit status, as ``asyncagent``'s."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "-help", "--help"} & set(argv):
        print(help_text())
        return 0
    try:
        values = parse(argv)
        check_part(values)
        restart_in_venv(argv)
    except Refused as error:
        return _refuse(error)
    from asyncagent.__main__ import status_of
    from asyncagent.errors import CheckpointError, UsageError
    from asyncagent.placement import keep_freed_memory

    keep_freed_memory()  # before the imports, some of which start threads
    try:
        return run(values)
    except (UsageError, CheckpointError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        return status_of(error)


def _refuse(error: Exception) -> int:
    print(f"experiment: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not even a thread stuck in an engine's call keeps a finished run alive
