"""``asyncagent tune``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncagent.bench.tune import Trial, Tuner, best_of
from asyncagent.commands.bench import Meter
from asyncagent.commands.env_flags import TUNED_FOR, parse_env_flags
from asyncagent.config import TUNED_FLAGS, Config, resolve
from asyncagent.errors import AsyncAgentError, UsageError
from asyncagent.files import check_writable, replace_text
from asyncagent.signals import tidy_end

DESCRIPTION = """Find the flags with which this machine trains a level fastest.

Trains for some seconds with each of several group sizes, numbers of actors, thread splits and
sizes of inference batches, prints the winner as flags and writes it to --out, which
asyncagent train --tuned takes. Never more than 16 actors per column of the batch: actions would
be learned from too late. The other flags are train's."""


@dataclass(frozen=True)
class TuneFlags(Config):
    """Train's flags, and four more."""

    out: str = "tuned.json"
    """File to write."""
    minutes: float = 5.0
    """Begin no further run after so many minutes."""
    seconds: float = 10.0
    """Seconds of each run that are measured."""
    warmup_s: float = 6.0
    """Seconds of each run before them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("minutes", "warmup_s"):
            self._check(name, 0 < getattr(self, name) < 1000, "in (0, 1000)")
        self._check("seconds", 3 <= self.seconds < 1000, "in [3, 1000)")
        self._check("out", bool(self.out), "the name of a file")


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, try, print and write the winner; returns the exit status."""
    flags = parse_env_flags(
        TuneFlags, arguments, level_name=Config.level_name,
        prog="asyncagent tune", description=DESCRIPTION,
    )  # fmt: skip
    out = Path(flags.out)
    _check_writable(out)
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: getattr(flags, name) for name in names})
    with tidy_end(), Meter(config.level_name) as meter:

        def tell(trial: Trial, share: float) -> None:
            meter.tell(describe(trial), share)

        trials = Tuner(config, flags.seconds, flags.warmup_s, flags.minutes, tell).tune()
    best = best_of(trials)
    if best.training is None:
        raise AsyncAgentError(f"the defaults did not train: {best.failure}")
    for trial in sorted(trials, key=lambda trial: -trial.steps_per_s):
        print(describe(trial))
    winner = dataclasses.replace(config, **best.flags)
    print(f"\nfastest: {as_flags(from_defaults(winner)) or 'the defaults'}", flush=True)
    try:
        replace_text(out, json.dumps(to_json(config, trials), indent=2) + "\n")
    except OSError as error:
        print(f"asyncagent tune: {out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"--tuned={out} gives them to asyncagent train")
    return 0


def _check_writable(out: Path) -> None:
    """Before minutes are spent on what is to be written there."""
    folder = out.absolute().parent
    if not os.path.isdir(folder):
        raise UsageError(f"out={str(out)!r}: there is no folder {str(folder)!r}")
    if os.path.exists(out) and not os.path.isfile(out):
        raise UsageError(f"out={str(out)!r} must be a file, and is a folder or a device")
    try:
        check_writable(out)
    except OSError as error:
        raise UsageError(
            f"out={str(out)!r} cannot be written: {error.strerror}; give another --out"
        ) from None


def from_defaults(tried: Config) -> dict[str, Any]:
    """What train has to be told, beside level and preset, to train as fast as ``tried`` did."""
    shape = {name: getattr(tried, name) for name in ("num_actors", "num_groups")}
    preset = resolve(tried.level_name, tried.preset)
    shaped = resolve(tried.level_name, tried.preset, **shape)  # min_inference_rows follows
    return {
        name: getattr(tried, name)
        for name in TUNED_FLAGS
        if getattr(tried, name) != getattr(preset if name in shape else shaped, name)
    }


def as_flags(flags: dict[str, Any]) -> str:
    """As one would type them."""
    return " ".join(f"--{name}={value}" for name, value in flags.items())


def describe(trial: Trial) -> str:
    """One line."""
    what = as_flags(trial.flags) or "the defaults"
    if trial.training is None:
        return f"{'failed':>10} {'':9}  {what}: {trial.failure}"
    lag = trial.training.policy_lag_mean
    said = "?" if lag is None else f"{lag:.1f}"
    return f"{trial.training.frames_per_s:10,.0f} frames/s, lag {said:>4}  {what}"


def to_json(config: Config, trials: list[Trial]) -> dict[str, Any]:
    """What the file says; ``flags`` is what train takes.

    All of them, those that are the defaults too: a run that is resumed has others of its own.
    """
    best, first = best_of(trials), trials[0]
    assert best.training is not None
    tried = dataclasses.replace(config, **best.flags)
    return {
        **{name: getattr(config, name) for name in TUNED_FOR},
        "flags": {name: getattr(tried, name) for name in TUNED_FLAGS},
        "frames_per_s": round(best.training.frames_per_s),
        "frames_per_s_of_defaults": round(first.training.frames_per_s) if first.training else 0,
    }
