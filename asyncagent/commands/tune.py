"""``asyncagent tune``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncagent.bench.tune import Trial, Tuner, best_of
from asyncagent.commands.bench import Meter
from asyncagent.commands.env_flags import parse_env_flags
from asyncagent.config import Config
from asyncagent.errors import AsyncAgentError, UsageError
from asyncagent.files import replace_text
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
    if not out.absolute().parent.is_dir():
        raise UsageError(f"out={flags.out!r}: there is no folder {str(out.absolute().parent)!r}")
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: getattr(flags, name) for name in names})
    with tidy_end(), Meter(config.level_name) as meter:

        def tell(trial: Trial, share: float) -> None:
            meter.tell(describe(trial), share)

        trials = Tuner(config, flags.seconds, flags.warmup_s, flags.minutes, tell).tune()
    best = best_of(trials)
    if best.training is None:
        raise AsyncAgentError(f"the defaults did not train: {best.failure}")
    replace_text(out, json.dumps(to_json(config, trials), indent=2) + "\n")
    for trial in sorted(trials, key=lambda trial: -trial.steps_per_s):
        print(describe(trial))
    print(f"\nfastest: {as_flags(best.flags) or 'the defaults'}")
    print(f"--tuned={out} gives them to asyncagent train")
    return 0


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
    """What the file says; ``flags`` is what train takes."""
    best, first = best_of(trials), trials[0]
    assert best.training is not None
    return {
        "level_name": config.level_name,
        "net": config.net,
        "use_lstm": config.use_lstm,
        "flags": best.flags,
        "frames_per_s": round(best.training.frames_per_s),
        "frames_per_s_of_defaults": round(first.training.frames_per_s) if first.training else 0,
    }
