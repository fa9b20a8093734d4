#!/usr/bin/env python3
"""Seconds from a fault to the program's end: one run per place where something can die.

    python scripts/show_faults.py [--level_name=atari_breakout] [--after=200]

Starts a training run in a process of its own, lets the ``--after``-th call of the chosen part
raise, and prints the exit status, the seconds from the exception to the end of the process, and
the line that names the task.  A run that ends with status 0, or later than 10 s after the fault,
is a failure.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from asyncagent.envs import check_level
from asyncagent.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent

FAULTS = {
    "actor": ("asyncagent.envs.pool", "PoolGroup", "_next_row"),
    "inference": ("asyncagent.policy", "Policy", "infer"),
    "learner": ("asyncagent.learner", "Learner", "_loss"),
}

# Runs in the child: break one method, then be the ordinary program.
_CHILD = """
import importlib, sys, time
module, owner, method, after, stamp = sys.argv[1:6]
target = getattr(importlib.import_module(module), owner)
original = getattr(target, method)
calls = 0
def broken(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(after):
        open(stamp, "w").write(repr(time.time()))
        raise ValueError("injected fault in " + owner + "." + method)
    return original(*args, **kwargs)
setattr(target, method, broken)
sys.argv = ["asyncagent", *sys.argv[6:]]
from asyncagent.__main__ import run_and_exit
run_and_exit()
"""


def inject(name: str, level_name: str, after: int, folder: Path) -> bool:
    """One run with one fault; prints a line, returns whether it ended as it should."""
    stamp = folder / f"{name}.time"
    command = [sys.executable, "-c", _CHILD, *FAULTS[name], str(after), str(stamp)]
    command += ["train", f"--level_name={level_name}", f"--logdir={folder / name}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        _, errors = child.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        child.kill()
        print(f"{name:<10} STALLED")
        return False
    ended_s = time.time()
    if not stamp.exists():
        print(f"{name:<10} ended before the fault:\n{errors}")
        return False
    seconds = ended_s - float(stamp.read_text())
    last = errors.strip().splitlines()[-1] if errors.strip() else ""
    good = child.returncode not in (0, 2) and "Traceback" in errors and f"'{name}" in errors
    good = good and seconds < 10
    print(
        f"{name:<10} {'ok' if good else 'FAILED'}  status {child.returncode}  "
        f"{seconds:.2f} s  {last}"
    )
    return good


def main() -> None:
    """Inject every fault once; exit status 1 if any run did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level_name", default="atari_breakout")
    parser.add_argument("--after", type=int, default=200, help="which call raises")
    arguments = parser.parse_args()
    try:
        check_level(arguments.level_name)
    except UsageError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="show_faults_") as folder:
        results = [
            inject(name, arguments.level_name, arguments.after, Path(folder)) for name in FAULTS
        ]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
