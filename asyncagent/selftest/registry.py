"""Every check: what it is called, what it runs, and what to do when it fails."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from asyncagent.errors import UsageError
from asyncagent.selftest.environments import SUBJECTS, Subject


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    group: str
    function: str
    """``module:function``, called in the checks' own process; its docstring says what it does."""
    advice: str
    """What a failure means, and what to do."""
    arguments: tuple[Any, ...] = ()
    limit_s: float = 60.0
    """It has failed once it takes longer; many times what it takes on an idle machine."""


def _check(name: str, group: str, function: str, advice: str, **more: Any) -> Check:
    return Check(name, group, f"asyncagent.selftest.{function}", advice, **more)


_OURS = "this release computes something wrong with your version of torch: do not train with it"
_NETWORK = (
    "actor hosts would not reach a learner here: look for a firewall or proxy on 127.0.0.1, and "
    "for a pyzmq that is not its own wheel"
)


def _environment(name: str, subject: Subject) -> Check:
    again = f"your {subject.package}"
    if subject.extra:
        again = f"{subject.package} in the version of scripts/constraints.txt"
    return _check(
        name,
        "environments",
        "environments:check",
        f"{subject.level_name} does not play here, or not as elsewhere, and its scores would not "
        f"compare: reinstall {again}; asyncagent check-env {subject.level_name} says more",
        arguments=(name,),
        # DeepMind Lab compiles a level that it has not seen.
        limit_s=120.0 if name == "dmlab" else 60.0,
    )


CHECKS = (
    _check(
        "packages", "machine", "machine:check_packages",
        "a package that everything needs cannot be imported: install asyncagent anew, in an "
        "environment of its own",
        limit_s=120.0,  # a cold disk's first import of torch
    ),
    _check(
        "limits", "machine", "machine:check_machine",
        "runs with many environments would fail later: raise the limit, or make room (TMPDIR, "
        "docker run --shm-size, ulimit -n)",
    ),
    _check(
        "workers", "machine", "machine:check_workers",
        "ViZDoom, DeepMind Lab, Gymnasium and own environments live in worker processes, and these "
        "do not start or answer: look at the limits on processes and memory",
    ),
    _check("vtrace", "mathematics", "goldens:check_vtrace", _OURS),
    _check("rmsprop", "mathematics", "goldens:check_rmsprop", _OURS),
    _check("adam", "mathematics", "goldens:check_adam", _OURS),
    _check("alignment", "loop", "alignment:check", _OURS),
    _check(
        "bfloat16", "arithmetic", "precision:check_bfloat16",
        "bfloat16 is wrong or too coarse on this machine: train with --precision=float32",
    ),
    _check(
        "gpu", "arithmetic", "precision:check_gpu",
        "the GPU computes something else than the CPU: train with --device=cpu, and look at the "
        "driver and the build of torch",
        limit_s=90.0,
    ),
    _check("loopback", "network", "loopback:check", _NETWORK, arguments=(False,)),
    _check("curve", "network", "loopback:check", _NETWORK, arguments=(True,)),
    *(_environment(name, subject) for name, subject in SUBJECTS.items()),
)  # fmt: skip
"""In the order in which they run."""


def chosen(names: str) -> tuple[Check, ...]:
    """The checks that ``names``, names of checks or groups with commas, stands for; all if empty.

    UsageError, with the nearest names, for one that there is not.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [word for check in CHECKS for word in (check.name, check.group)]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 2, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose {_listed()}"
            raise UsageError(f"only: there is no check {name!r}: {hint}")
    return tuple(c for c in CHECKS if not wanted or c.name in wanted or c.group in wanted)


def _listed() -> str:
    groups = dict.fromkeys(check.group for check in CHECKS)
    return f"{', '.join(check.name for check in CHECKS)}, or a group: {', '.join(groups)}"
