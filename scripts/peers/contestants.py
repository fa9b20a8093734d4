"""Who takes part in ``bench_peers.py``: how each is run, measured, and swept for its best.

A *cell* is one setting of what a contestant leaves to its user, by name.  Every measurement is a
fresh process that prints (or writes) one JSON object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncagent.config import Config
from asyncagent.distributions import num_inputs
from asyncagent.envs import doom, env_spec
from asyncagent.envs.doom_scenarios import Scenario as Rules
from asyncagent.envs.doom_scenarios import buttons_of
from asyncagent.errors import UsageError
from asyncagent.placement import cores

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "scripts" / "peers"
CACHE = ROOT / ".peers"
"""The other programs' environments and the sweeps' results; ignored by git."""
SAMPLE_FACTORY = CACHE / "sample-factory"
CONSTRAINTS = HERE / "constraints-sample-factory.txt"
START_S = 120.0
"""Longest a contestant may take to start and to end, beside the time measured."""

Cell = dict[str, int]
Result = dict[str, Any]
"""At least ``frames_per_s``, of frames learned from; ``parameters`` where the net is its own."""


@dataclass(frozen=True)
class Scenario:
    """What is played, by whom, and what is expected of the ratios of asyncagent's rate."""

    config: Config
    contestants: tuple[str, ...]
    bounds: dict[str, float]
    precision: str
    """What asyncagent's own choice comes to here; told to ``plain``, lest it choose otherwise."""
    environ: dict[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables of the runs; asyncagent's current folder is that of this file."""


@dataclass(frozen=True)
class Times:
    """Of one measurement."""

    seconds: float
    warmup_s: float


def _run(command: list[str], scenario: Scenario, times: Times, cwd: Path = HERE) -> str:
    """Standard output of a process; RuntimeError, one line, where it fails or takes too long."""
    log = CACHE / "last.log"
    with log.open("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | scenario.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that its own processes can be ended with it
        )
        try:
            output, _ = process.communicate(timeout=times.seconds + times.warmup_s + START_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"took too long; its last words are in {log}") from None
        finally:
            # What it leaves behind would compete with the next measurement.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "")
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {last.strip()} (see {log})")
    return output


def run_ours(scenario: Scenario, cell: Cell, times: Times) -> Result:
    """``asyncagent.loop.train`` with the preset, through ``bench_train.py``."""
    del cell
    config = scenario.config
    command = [
        *(sys.executable, str(ROOT / "scripts" / "bench_train.py")),
        *(f"--level_name={config.level_name}", f"--preset={config.preset}"),
        *(f"--seconds={times.seconds}", f"--warmup_s={times.warmup_s}"),
    ]
    if config.use_lstm:
        command.append("--use_lstm")
    return _last_json(_run(command, scenario, times))


def run_plain(scenario: Scenario, cell: Cell, times: Times) -> Result:
    """The synchronous loop of ``plain_vtrace.py``."""
    command = [
        *(sys.executable, str(HERE / "plain_vtrace.py")),
        f"--level_name={scenario.config.level_name}",
        f"--precision={scenario.precision}",
        *(f"--{name}={value}" for name, value in cell.items()),
        *(f"--seconds={times.seconds}", f"--warmup_s={times.warmup_s}"),
    ]
    return _last_json(_run(command, scenario, times))


def _last_json(output: str) -> Result:
    lines = output.splitlines()
    result: Result = json.loads(lines[-1]) if lines else {}
    if "frames_per_s" not in result:
        raise RuntimeError("it printed no figures")
    return result


def run_sample_factory(scenario: Scenario, cell: Cell, times: Times) -> Result:
    """Sample Factory's asynchronous PPO of one epoch, in its own environment."""
    config = scenario.config
    spec = env_spec(config)
    with tempfile.TemporaryDirectory(prefix="sample_factory_") as folder:
        out = Path(folder) / "result.json"
        command = [
            *(str(SAMPLE_FACTORY / "bin" / "python"), str(HERE / "sample_factory_side.py")),
            *(f"--out={out}", f"--folder={folder}/train", f"--level={config.level_name}"),
            *(f"--net={config.net}", f"--workers={cell['workers']}", f"--envs={cell['envs']}"),
            f"--batch_rows={cell['batches'] * config.batch_size * config.unroll_length}",
            *(f"--unroll_length={config.unroll_length}", f"--seconds={times.seconds}"),
            f"--warmup_s={times.warmup_s}",
        ]
        if config.use_lstm:
            command += ["--use_lstm", f"--extras={1 + num_inputs(spec.actions)}"]
        if config.level_name in doom.LEVELS:
            rules = doom.LEVELS[config.level_name]
            cfg = Path(folder) / "scenario.cfg"
            cfg.write_text(_doom_cfg(rules))
            (Path(folder) / rules.wad).symlink_to(doom.map_path(rules))
            command += [
                *(f"--doom_cfg={cfg}", f"--doom_actions={len(rules.parts[0])}"),
                f"--doom_timeout={rules.timeout}",
            ]
        _run(command, scenario, times, Path(folder))  # ViZDoom leaves files where it stands
        if not out.exists():
            raise RuntimeError(f"it wrote no figures (see {CACHE / 'last.log'})")
        result: Result = json.loads(out.read_text())
    return result


def _doom_cfg(rules: Rules) -> str:
    """The scenario as ViZDoom's own settings, the picture in Sample Factory's layout."""
    lines = {
        "doom_scenario_path": rules.wad,  # beside this file, where alone ViZDoom looks
        "doom_map": "map01",
        "doom_skill": rules.skill or 3,
        "episode_timeout": rules.timeout,
        "episode_start_time": rules.start,
        "living_reward": rules.living_reward,
        "death_penalty": rules.death_penalty,
        "screen_format": "CRCGCB",
        "render_hud": rules.hud,
        "render_crosshair": rules.crosshair,
        "render_weapon": rules.weapon,
        "render_decals": False,
        "render_particles": False,
        "window_visible": False,
        "available_buttons": "{ " + " ".join(buttons_of(rules.parts)) + " }",
        "available_game_variables": "{ " + " ".join(rules.variables) + " }",
        "mode": "PLAYER",
    }
    return "".join(f"{name} = {value}\n" for name, value in lines.items())


RUN: dict[str, Callable[[Scenario, Cell, Times], Result]] = {
    "sample_factory": run_sample_factory,
    "plain": run_plain,
    "ours": run_ours,
}


def cells_of(name: str, scenario: Scenario, full: bool) -> list[Cell]:
    """The settings that a sweep tries; few of them unless ``full``."""
    batch_size = scenario.config.batch_size
    if name == "ours":
        return [{}]
    if name == "sample_factory":
        grid = [(w, e, b) for w in (1, 2, 3, 4) for e in (8, 16, 32, 64) for b in (1, 2, 4)]
        few = [(1, 32, 1), (2, 16, 1), (2, 32, 1), (2, 64, 1)]
        return [{"workers": w, "envs": e, "batches": b} for w, e, b in (grid if full else few)]
    sizes = (16, 32, 64, 128, 256) if full else (32, 64)
    counts = [size for size in sizes if size % batch_size == 0]
    threads = (1, cores()) if full else (cores(),)
    if scenario.config.level_name.startswith("atari_"):
        return [{"num_envs": n, "threads": t} for n in counts for t in threads]
    return [
        {"num_envs": n, "threads": t, "env_workers": w}
        for n in counts
        for t in threads
        # As many processes as cores, or (up to 64) as environments.
        for w in (sorted({cores(), 4 * cores(), min(n, 64)}) if full else (cores(),))
        if n % w == 0
    ]


def check_parameters(name: str, result: Result, expected: int) -> None:
    """UsageError unless the contestant's net has as many parameters as asyncagent's."""
    found = result.get("parameters", expected)
    if found != expected:
        raise UsageError(f"{name}'s net has {found:,} parameters, asyncagent's has {expected:,}")


def check_precisions(results: dict[str, Result]) -> None:
    """UsageError unless plain and ours computed alike, as far as they say."""
    said = {who: results[who].get("precision") for who in ("plain", "ours") if who in results}
    if len(set(said.values()) - {None}) > 1:
        raise UsageError(f"plain computed in {said['plain']}, ours in {said['ours']}")


def make_sample_factory(say: Callable[[str], None]) -> None:
    """Make or renew Sample Factory's environment; UsageError where that fails."""
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()
    stamp = SAMPLE_FACTORY / "stamp"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say(f"making {SAMPLE_FACTORY}, some 2 GB from PyPI")
    venv.create(SAMPLE_FACTORY, clear=True, with_pip=True)
    packages = ("sample-factory", "ale-py", "vizdoom", "torch", "setuptools")
    install = ["-m", "pip", "install", "--no-input", "-c", str(CONSTRAINTS), *packages]
    done = subprocess.run(
        [str(SAMPLE_FACTORY / "bin" / "python"), *install],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[0] if errors else f"pip's exit status was {done.returncode}"
        raise UsageError(f"Sample Factory cannot be installed from PyPI: {why}")
    stamp.write_text(wanted)
