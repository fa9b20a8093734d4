#!/usr/bin/env python3
"""What a machine with a GPU makes of this program, as JSON; see bench_gpu.sh, which starts it.

    scripts/bench_gpu.sh [--wheels=FOLDER] [--out=FILE] [--total_s=470] [--actors=256,512] ...

Sections, each a process with a time limit of its own: the environments' own rate (acting at random,
nothing learned), the tests that need a GPU, training with several networks and numbers of actors
(bench_train.py), and ``asyncagent bench``.  The file is rewritten after every section.  Where there
is no GPU, everything runs on the CPU and says so.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEEDED = ("numpy", "torch", "optree", "uvloop", "rich", "tyro", "tensorboard")
NEEDED_FOR_ALE = ("ale_py", "gymnasium")
NETS = {
    "deep_lstm": ["--net=deep", "--use_lstm"],
    "shallow": ["--net=shallow"],
    "deep": ["--net=deep"],
}


class Section(NamedTuple):
    """One process to run."""

    name: str
    limit_s: float
    command: list[str]


def sections(arguments: argparse.Namespace) -> list[Section]:
    """What is to be measured, the most important first."""
    python = sys.executable
    level = [f"--level_name={arguments.level_name}", f"--atari_backend={arguments.atari_backend}"]
    times = [f"--seconds={arguments.seconds}", f"--warmup_s={arguments.warmup_s}"]
    one_run_s = arguments.seconds + arguments.warmup_s + 30
    own = [python, str(Path(__file__).resolve()), "--section=environments", *level]
    own += [f"--seconds={arguments.seconds}", f"--actors={max(arguments.actors)}"]
    tests = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    tests += [str(ROOT / "tests" / f"test_{name}.py") for name in ("cuda", "policy")]
    found = [Section("environments", one_run_s, own), Section("tests", 90, tests)]
    for net, flags in NETS.items():
        for actors in arguments.actors:
            command = [python, str(ROOT / "scripts/bench_train.py"), *times, *level, *flags]
            found.append(
                Section(f"train_{net}_{actors}", one_run_s, [*command, f"--num_actors={actors}"])
            )
    bench = [python, "-m", "asyncagent", "bench", *level, *NETS["deep_lstm"], *times, "--json"]
    found.append(Section("efficiency", 150, bench))
    return [one for one in found if one.name.startswith(tuple(arguments.only))]


def run_section(section: Section, limit_s: float) -> dict[str, Any]:
    """Run one section's process; what it printed, or what went wrong, and how long it took."""
    start_s = time.monotonic()
    process = subprocess.Popen(
        section.command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # workers of its own end with it
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        outcome = parse(output, process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = {"error": f"not done within {limit_s:.0f} s", "output": output[-2000:]}
    return {"wall_s": round(time.monotonic() - start_s, 1), **outcome}


def parse(output: str, status: int) -> dict[str, Any]:
    """The JSON object that a process printed last, else its last line, or what it said failing."""
    lines = [line for line in output.splitlines() if line.strip()]
    if status not in (0, 5):  # 5: pytest found no test to run
        return {"error": f"exit status {status}", "output": output[-2000:]}
    for line in reversed(lines):
        if line.startswith("{"):
            return {"result": json.loads(line)}
    return {"result": lines[-1] if lines else ""}


def environments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps and frames per second of the environments alone, stepped as training steps them."""
    from asyncagent.config import resolve
    from asyncagent.envs import make_group
    from asyncagent.envs.base import EnvGroup

    config = resolve(
        arguments.level_name,
        atari_backend=arguments.atari_backend,
        num_actors=max(arguments.actors),
    )
    groups = [
        make_group(
            config,
            level_name=config.level_name,
            num_envs=config.group_size,
            first_env_index=index * config.group_size,
            seed=1,
        )
        for index in range(config.num_groups)
    ]
    steps = 0

    async def play(group: EnvGroup) -> None:
        nonlocal steps
        import numpy as np

        rng = np.random.default_rng(0)
        await group.reset()
        num_actions = getattr(group.spec.actions, "num_actions", 1)
        while True:
            await group.step(rng.integers(0, num_actions, group.num_envs))
            steps += group.num_envs

    async def measure() -> float:
        tasks = [asyncio.create_task(play(group)) for group in groups]
        await asyncio.sleep(min(3.0, arguments.seconds))
        before, start_s = steps, time.monotonic()
        await asyncio.sleep(arguments.seconds)
        rate = (steps - before) / (time.monotonic() - start_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(group.close() for group in groups))
        return rate

    rate = asyncio.run(measure())
    return {
        "num_actors": config.num_actors,
        "num_groups": config.num_groups,
        "steps_per_s": round(rate),
        "frames_per_s": round(rate * config.num_action_repeats),
    }


def machine() -> dict[str, Any]:
    """What is measured on."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "gpus": gpus,
        "device": "cuda" if gpus else "cpu",
        "cores": len(os.sched_getaffinity(0)),
    }


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Frames/s of every training run ÷ those of the environments alone."""
    own = found.get("environments", {}).get("result", {})
    return {
        name: round(one["result"]["frames_per_s"] / own["frames_per_s"], 3)
        for name, one in found.items()
        if name.startswith("train_") and "result" in one and own
    }


def main() -> int:
    """Measure section by section; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument("--total_s", type=float, default=470.0, help="limit of all together")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of a run")
    parser.add_argument("--warmup_s", type=float, default=8.0, help="left out before it")
    parser.add_argument("--actors", default="256,512", help="numbers of actors, with commas")
    parser.add_argument("--level_name", default="atari_breakout")
    parser.add_argument("--atari_backend", default="ale")
    parser.add_argument("--only", default="", help="sections' beginnings, with commas")
    parser.add_argument("--section", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.actors = [int(number) for number in arguments.actors.split(",")]
    arguments.only = arguments.only.split(",")
    needed = NEEDED + (NEEDED_FOR_ALE if arguments.atari_backend == "ale" else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"bench_gpu: missing packages: {', '.join(missing)}; see --wheels", file=sys.stderr)
        return 2
    if arguments.section == "environments":
        print(json.dumps(environments(arguments)))
        return 0
    end_s = time.monotonic() + arguments.total_s
    report: dict[str, Any] = {"machine": machine(), "sections": {}}
    print(f"bench_gpu: {report['machine']}", file=sys.stderr)
    found = report["sections"]
    for section in sections(arguments):
        limit_s = min(section.limit_s, end_s - time.monotonic())
        if limit_s < 5:
            found[section.name] = {"error": "no time was left"}
        else:
            found[section.name] = run_section(section, limit_s)
        report["share_of_environments"] = shares(found)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        brief = {key: value for key, value in found[section.name].items() if key != "output"}
        print(f"bench_gpu: {section.name}: {json.dumps(brief)}", file=sys.stderr)
    print(json.dumps({"shares": report["share_of_environments"], "file": str(arguments.out)}))
    return int(any("error" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
