"""The command line: ``asyncagent <command> [flags]``."""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from asyncagent.errors import (
    AsyncAgentError,
    CheckpointError,
    GraceOver,
    NotFinite,
    Stalled,
    UsageError,
)
from asyncagent.placement import keep_freed_memory
from asyncagent.watchdog import STALLED

COMMANDS = {
    "train": "train an agent, or resume the run found in --logdir",
    "actors": "run environments for a learner elsewhere",
    "keys": "make a key pair for encrypted actor hosts",
    "test": "play fresh episodes with a checkpoint of a run",
    "plot": "draw the learning curves of runs",
    "compare": "compare runs in a table",
    "bench": "measure how fast this machine trains, and how fast it could",
    "tune": "find this machine's fastest flags for a level",
    "doctor": "say what limits a run, and what to change",
    "replay-batch": "explain why an update was skipped, from the batch that was kept",
    "selftest": "check that everything computes here what it should",
    "check-env": "make an environment, step it, and say what is wrong with it",
    "dmlab-cache": "compile DeepMind Lab's levels ahead of a run",
}

GROUPS = {
    "train and test": ("train", "test", "play", "export"),
    "look at runs": ("doctor", "plot", "compare", "replay-batch"),
    "several machines": ("actors", "keys"),
    "this machine": ("selftest", "bench", "tune"),
    "environments": ("check-env", "dmlab-cache"),
}
"""How --help lists the commands."""

_USAGE_ERROR = 2
_FAILURE = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0, 2 for what the user can put right, 3 for a program that has stalled, else 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else _USAGE_ERROR
    if arguments[0] in ("-V", "--version"):
        from asyncagent import __version__

        print(f"asyncagent {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.0)[0]
        print(f"asyncagent: no command {name!r}; did you mean {near!r}?", file=sys.stderr)
        return _USAGE_ERROR
    keep_freed_memory()  # before the imports, some of which start threads
    try:
        status: int = importlib.import_module(f"asyncagent.commands.{name.replace('-', '_')}").main(
            rest
        )
        return status
    except BrokenPipeError:
        return _FAILURE  # whoever read our output has left, as head(1) does
    except (UsageError, CheckpointError) as error:
        print(f"asyncagent {name}: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except (GraceOver, NotFinite) as error:
        print(f"asyncagent {name}: {error}", file=sys.stderr)
        return _FAILURE
    except (Exception, BaseExceptionGroup) as error:
        _report_failure(name, error)
        return status_of(error)


def run_and_exit() -> None:
    """``main``, then leave at once, even where a thread is stuck in a call that never returns."""
    faulthandler.enable()
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else _FAILURE
    except KeyboardInterrupt:
        status = 130
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _report_failure(name: str, error: BaseException) -> None:
    traceback.print_exception(error)
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if not isinstance(first, AsyncAgentError):
        notes = "; ".join(getattr(first, "__notes__", []))
        where = f" ({notes})" if notes else ""
        print(f"asyncagent {name}: {type(first).__name__}: {first}{where}", file=sys.stderr)


def status_of(error: BaseException) -> int:
    """The exit status of a program that failed in such a way."""
    failures = error if isinstance(error, BaseExceptionGroup) else BaseExceptionGroup("", [error])
    return _FAILURE if failures.subgroup(Stalled) is None else STALLED


def _help() -> str:
    lines = ["usage: asyncagent <command> [--flag=value ...]"]
    for title, names in GROUPS.items():
        lines += ["", title]
        lines += [f"  {name:<12}  {COMMANDS[name]}" for name in names if name in COMMANDS]
    lines += ["", "asyncagent <command> --help lists a command's flags; asyncagent --version."]
    return "\n".join(lines)


if __name__ == "__main__":
    run_and_exit()
