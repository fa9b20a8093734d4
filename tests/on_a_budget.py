"""A program of the documentation on a small budget: what stands for it in a test's ``.venv``.

``python on_a_budget.py PROGRAM ARGUMENTS...`` becomes that program with the flags of ``BUDGETS``
behind its own, where the last one counts.  A server is asked for its first page, and ended.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.request

_BENCH = ["--seconds=1", "--rounds=1"]
BUDGETS: dict[str, list[str]] = {
    "asyncagent train": ["--total_environment_frames=2000"],
    "asyncagent test": ["--test_num_episodes=2"],
    "asyncagent bench": ["--seconds=3", "--warmup_s=1", "--net=shallow", "--no_use_lstm"],
    "asyncagent plot": ["--y=updates"],  # no game has ended yet
    "asyncagent tune": ["--seconds=3", "--warmup_s=1", "--minutes=0.1"],
    "-m experiment": ["--total_environment_frames=2000"],
    "scripts/bench_train.py": ["--seconds=3", "--warmup_s=1"],
    "scripts/bench_reference.py": [*_BENCH, "--components", "inference"],
    "scripts/bench_loop.py": _BENCH,
    "scripts/bench_batcher.py": _BENCH,
    "scripts/bench_envs.py": _BENCH,
    "scripts/bench_doom_hosts.py": [*_BENCH, "--groups=1", "--games=2"],
    "scripts/bench_actors.py": [
        *("--num_actors", "8", "--batch_size", "8", "--seconds=3", "--warmup_s=1"),
    ],
    # Its training is too short to be measured within seconds.
    "scripts/bench_remote.py": [*_BENCH, "--parts=codec,transport"],
    "scripts/bench_checkpoint.py": ["--saves=1"],
    "scripts/bench_pixel_init.py": ["--updates=20"],
    "scripts/show_faults.py": ["--after=20"],
    "tensorboard": ["--port=0"],
    "-m mkdocs serve": ["--dev-addr=127.0.0.1:PORT"],
}
"""By how a command begins."""
SERVERS = ("tensorboard", "-m mkdocs serve")
MODULES = {"asyncagent": "asyncagent", "tensorboard": "tensorboard.main"}
"""Programs other than Python itself, and what Python runs for them."""


def main(program: str, *arguments: str) -> None:
    """Be the program, or talk to it; ends this one with its exit status."""
    line = " ".join([*([] if program == "python" else [program]), *arguments])
    key = next((start for start in BUDGETS if f"{line} ".startswith(f"{start} ")), "")
    # -P: as a program that is installed, without the folder that it is started in.
    what = ["-P", "-m", MODULES[program]] if program in MODULES else []
    budget = [flag.replace("PORT", str(free_port())) for flag in BUDGETS.get(key, [])]
    command = [sys.executable, *what, *arguments, *budget]
    if key in SERVERS:
        ask(command)
    else:
        os.execv(command[0], command)


def ask(command: list[str]) -> None:
    """Start a server, read the page that it says it is at, end it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            assert server.stdout is not None
            for raw in server.stdout:
                print(raw.decode(), end="", flush=True)
                found = re.search(r"http://[\w.:]+/?", raw.decode())
                if found:
                    with urllib.request.urlopen(found[0], timeout=60) as page:
                        print("its page:", len(page.read()), "bytes")
                    return
        finally:
            server.kill()
    sys.exit("it ended without a word about where it is")


def free_port() -> int:
    """A port of this machine that nobody listens at just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


if __name__ == "__main__":
    main(*sys.argv[1:])
