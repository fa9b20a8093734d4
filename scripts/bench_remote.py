#!/usr/bin/env python3
"""What actor hosts cost: transport, codec, training, and the bytes that travel.

transport  Atari unrolls, encoded beforehand, from a second process over loopback TCP.  ``bare``: a
           PUSH and a PULL socket and nothing else, the same parts in the same sizes.  ``bridge``:
           a real actor host's conversation and a real RemoteBridge (handshake, credits,
           acknowledgements), whose learner takes every unroll at once; ``bridge_undecoded`` leaves
           out what a bare socket does not do either: checking the unrolls and writing them,
           unstacked, to the learner's buffers.  Plain beside plain, CURVE beside CURVE.
codec      Unrolls to wire and back, one thread, with each compression.
training   ``asyncagent train`` with the actors in its own process, and with the same actors in a
           second process (``asyncagent actors``, inference there or at the learner).
bytes      Of a frame of Breakout, with and without stacks told once, with each compression; the
           frames are played at random.

All kinds of a part take turns, round by round; medians and ranges are printed.

    python scripts/bench_remote.py [--parts=transport,codec,training,bytes] [--json] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import remote_traffic as traffic
from asyncagent import wire
from asyncagent.bench import training
from asyncagent.bench.measure import resolved
from asyncagent.config import Config, resolve
from asyncagent.envs import env_spec
from asyncagent.formats import RowFormat, UnrollFormat
from asyncagent.placement import keep_freed_memory
from asyncagent.structs import EnvStep
from asyncagent.unroll import empty_unroll

LEVEL = "atari_breakout"
UNROLLS = 6
"""Different ones, in turn: together they are larger than any cache."""
NUM_ACTORS, NUM_GROUPS = 256, 4
COMPRESSIONS: tuple[wire.Compression, ...] = get_args(wire.Compression)

Figures: TypeAlias = dict[str, dict[str, Any]]
"""By kind: ``median``, ``min``, ``max`` and the unit's name."""


class Flags(NamedTuple):
    """How long, how often."""

    rounds: int
    seconds: float
    training_rounds: int
    training_seconds: float
    warmup_s: float


def in_turn(
    kinds: dict[str, Callable[[], float]], rounds: int, unit: str, digits: int = 2
) -> Figures:
    """Call each kind once a round."""
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for index in range(rounds):
        for kind, measure in kinds.items():
            samples[kind].append(measure())
            print(f"# {index + 1}/{rounds} {kind}: {samples[kind][-1]:,.4g} {unit}",
                  file=sys.stderr, flush=True)  # fmt: skip
    return {
        kind: {
            "median": round(statistics.median(found), digits),
            "min": round(min(found), digits),
            "max": round(max(found), digits),
            "unit": unit,
        }
        for kind, found in samples.items()
    }


def add_ratios(figures: Figures, name: str, base: str) -> None:
    """To every kind, ``name``: its median over that of ``base``."""
    if not figures[base]["median"]:
        sys.exit(f"bench_remote: nothing came through ({base}): --seconds must be more")
    for figure in figures.values():
        figure[name] = round(figure["median"] / figures[base]["median"], 3)


def config_of() -> Config:
    """Of training Breakout as the paper does, with shallow net and 4 groups of 64."""
    return resolve(LEVEL, "paper", num_actors=NUM_ACTORS, num_groups=NUM_GROUPS)


def bench_transport(flags: Flags) -> Figures:
    """Unrolls of 64 and of 16 environments, plain and CURVE."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="bench_remote_") as name:
        keys = traffic.make_key_folder(Path(name) / "keys")
        for num_envs in (64, 16):
            recorded = traffic.narrow(traffic.record(config_of(), 64, UNROLLS), num_envs)
            folder = Path(name) / str(num_envs)
            folder.mkdir()
            size = traffic.write_parts(recorded, folder)
            for security, key_folder in (("plain", None), ("curve", keys)):
                figures |= _transport(flags, recorded, folder, size, security, key_folder)
    return figures


def _transport(
    flags: Flags, recorded: traffic.Recorded, folder: Path, size: float, security: str,
    keys: Path | None,
) -> Figures:  # fmt: skip
    cpu: dict[str, list[float]] = {}

    def kind(name: str, receive: Callable[[], traffic.Received]) -> Callable[[], float]:
        def measure() -> float:
            received = receive()
            cpu.setdefault(name, []).append(received.cpu_s / size * 1e9)
            return received.unrolls_per_s * size / 1e9

        return measure

    prefix = f"E={folder.name} {security} "
    seconds = flags.seconds
    kinds = {
        "bare": lambda: traffic.receive_bare(folder, keys, seconds),
        "bridge": lambda: traffic.receive_as_learner(recorded, folder, keys, seconds),
        "bridge_undecoded": lambda: traffic.receive_as_learner(
            recorded, folder, keys, seconds, decoding=False
        ),
    }
    named = {prefix + name: kind(prefix + name, receive) for name, receive in kinds.items()}
    figures = in_turn(named, flags.rounds, "GB/s", 3)
    add_ratios(figures, "of_bare", prefix + "bare")
    for name, figure in figures.items():
        figure["unroll_mb"] = round(size / 1e6, 2)
        figure["cpu_s_per_gb"] = round(statistics.median(cpu[name]), 2)
    return figures


def bench_codec(flags: Flags) -> Figures:
    """GB/s of wire bytes (those there would be uncompressed), of unrolls of 64 environments."""
    recorded = traffic.record(config_of(), 64, UNROLLS)
    spec, length = env_spec(recorded.config), recorded.config.unroll_length
    targets = [empty_unroll(length, 64, spec, ()) for _ in range(2)]
    kinds: dict[str, Callable[[], float]] = {}
    sizes: list[int] = []
    for compression in COMPRESSIONS:
        encoded = [
            [bytes(part) for part in recorded.format.encode(unroll, compression)]
            for unroll in recorded.unrolls
        ]
        if compression == "none":
            sizes = [traffic.num_bytes(parts) for parts in encoded]

        def decode(
            index: int, encoded: list[list[bytes]] = encoded,
            compression: wire.Compression = compression,
        ) -> None:  # fmt: skip
            parts, target = encoded[index % UNROLLS], targets[index % 2]
            recorded.format.decode(parts, target, 0, compression)

        def encode(index: int, compression: wire.Compression = compression) -> None:
            recorded.format.encode(recorded.unrolls[index % UNROLLS], compression)

        for name, work in (("decode", decode), ("encode", encode)):
            kinds[f"{name} {compression}"] = _rate(work, sizes, flags.seconds / 2)
    figures = in_turn(kinds, flags.rounds, "GB/s", 3)
    figures["decode none"]["wanted"] = 1.5
    return figures


def _rate(work: Callable[[int], None], sizes: list[int], seconds: float) -> Callable[[], float]:
    """Measures GB/s of ``work(0)``, ``work(1)``, ... on unrolls of these sizes, in turn."""

    def measure() -> float:
        for index in range(2):
            work(index)
        started_s = time.perf_counter()
        index = total = 0
        while (elapsed_s := time.perf_counter() - started_s) < seconds:
            work(index)
            total += sizes[index % len(sizes)]
            index += 1
        return total / elapsed_s / 1e9

    return measure


def bench_training(flags: Flags) -> Figures:
    """Frames/s with the actors in the learner's process and in a second one."""
    config = resolved(config_of())

    def here() -> float:
        return _train(config, flags)

    def afar(inference: str) -> Callable[[], float]:
        def measure() -> float:
            endpoint = f"tcp://127.0.0.1:{_free_port()}"
            learner = dataclasses.replace(config, num_actors=0, num_groups=0, listen=endpoint)
            with _actors(endpoint, inference):
                return _train(learner, flags)

        return measure

    kinds = {
        "in the learner's process": here,
        "second process, inference=host": afar("host"),
        "second process, inference=learner": afar("learner"),
    }
    figures = in_turn(kinds, flags.training_rounds, "frames/s", 0)
    add_ratios(figures, "of_local", "in the learner's process")
    return figures


def _train(config: Config, flags: Flags) -> float:
    trained = training.run(config, flags.training_seconds, flags.warmup_s, lambda time_s: None)
    lag = trained.policy_lag_mean
    idle = "unknown" if trained.cores_idle is None else f"{trained.cores_idle:.1%}"
    print(
        f"# idle {idle}, lag mean {lag and round(lag, 1)} max "
        f"{trained.policy_lag_max}, per second {trained.frames_per_s_min:,.0f} to "
        f"{trained.frames_per_s_max:,.0f}",
        file=sys.stderr,
    )
    return trained.frames_per_s


@contextlib.contextmanager
def _actors(endpoint: str, inference: str) -> Iterator[None]:
    """``asyncagent actors``, who wait for their learner."""
    arguments = [
        "actors",
        f"--connect={endpoint}",
        f"--num_actors={NUM_ACTORS}",
        f"--num_groups={NUM_GROUPS}",
        f"--inference={inference}",
    ]
    with tempfile.TemporaryFile() as log, traffic.running(
        traffic.LEASH, "asyncagent", *arguments, stdout=log, stderr=log
    ) as process:  # fmt: skip
        yield
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"the actors ended: {log.read().decode()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bench_bytes(flags: Flags) -> Figures:
    """Wire bytes per frame, of whole unrolls and of single rows."""
    recorded = traffic.record(config_of(), 64, UNROLLS)
    spec, repeats = env_spec(recorded.config), recorded.config.num_action_repeats
    frames = UNROLLS * recorded.config.unroll_length * 64 * repeats
    figures: Figures = {}
    for stacks in ("stacks whole", "stacks told once"):
        with contextlib.ExitStack() as patches:
            if stacks == "stacks whole":
                patches.enter_context(mock.patch.object(wire, "is_stack", lambda leaf: False))
            unrolls = UnrollFormat(spec, recorded.config.unroll_length, 64, ())
            rows = RowFormat(spec, 64)
            for compression in COMPRESSIONS:
                total = sum(
                    traffic.num_bytes(unrolls.encode(unroll, compression))
                    for unroll in recorded.unrolls
                )
                figures[f"unrolls, {stacks}, {compression}"] = _exact(total / frames)
                total = sum(
                    traffic.num_bytes(rows.encode(_row(unroll, t), _row(unroll, t - 1)[0],
                                                  compression))
                    for unroll in recorded.unrolls
                    for t in range(1, recorded.config.unroll_length + 1)
                )  # fmt: skip
                figures[f"rows, {stacks}, {compression}"] = _exact(total / frames)
    return figures


def _row(unroll: Any, t: int) -> EnvStep:
    lost = np.zeros_like(unroll.first[t])
    return EnvStep(
        unroll.observation[t],
        unroll.reward[t],
        unroll.terminated[t],
        unroll.truncated[t],
        unroll.first[t],
        lost,
    )


def _exact(value: float) -> dict[str, Any]:
    value = round(value, 1)
    return {"median": value, "min": value, "max": value, "unit": "bytes per frame"}


PARTS: dict[str, Callable[[Flags], Figures]] = {
    "bytes": bench_bytes,
    "codec": bench_codec,
    "transport": bench_transport,
    "training": bench_training,
}


def show(part: str, figures: Figures) -> None:
    """Print a table."""
    print(part)
    for kind, figure in figures.items():
        rest = {key: value for key, value in figure.items() if value is not None}
        median, low, high, unit = (rest.pop(key) for key in ("median", "min", "max", "unit"))
        more = "  ".join(f"{key} {value}" for key, value in rest.items())
        spread = f"({low:,} to {high:,})" if low != high else ""
        print(f"  {kind:36s} {median:12,} {unit} {spread}  {more}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a kind in a round")
    parser.add_argument("--training_rounds", type=int, default=3)
    parser.add_argument("--training_seconds", type=float, default=30.0)
    parser.add_argument("--warmup_s", type=float, default=15.0, help="of training")
    given = vars(parser.parse_args())
    parts, as_json = given.pop("parts").split(","), given.pop("json")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    keep_freed_memory()  # as the learner does
    results = {}
    for part in parts:
        results[part] = PARTS[part](Flags(**given))
        if not as_json:
            show(part, results[part])
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
