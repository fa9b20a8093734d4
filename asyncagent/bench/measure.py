"""The whole measurement: sweeps, the bound, training, their ratio."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from asyncagent.bench import training
from asyncagent.bench.bound import CPU, bound_steps_per_s, places_of
from asyncagent.bench.children import Children
from asyncagent.bench.job import Kind
from asyncagent.bench.reference import supports
from asyncagent.bench.sweep import Gauge, Point, best, settings
from asyncagent.config import Config
from asyncagent.envs import env_spec
from asyncagent.models import make_net
from asyncagent.placement import cores
from asyncagent.policy import resolve_devices, resolve_precision

Tell: TypeAlias = Callable[[str, float], None]
"""``tell(what, share)``: what was found just now, and how much of all is done, in [0, 1]."""

POINT_S = 1.0
"""Of each point of a sweep."""
POINT_COST_S = 2.2
"""About what a point takes altogether."""
ROUND_S = 2.0
"""Of each component in a round of its own."""
STARTING_S = 10.0
"""About what a run takes to start and to end."""


def resolved(config: Config) -> Config:
    """``config`` with the devices and the precision that training would choose.

    Raises UsageError for a level, net or device that is not to be had.
    """
    torch.set_num_threads(1)  # as training has when it chooses
    learner, inference = resolve_devices(config)
    dtype = resolve_precision(config.precision, learner)
    make_net(config.net, env_spec(config), config.use_lstm, config.seed)
    return dataclasses.replace(
        config,
        device=str(learner),
        learner_device=str(learner),
        inference_device=str(inference),
        precision="float32" if dtype == torch.float32 else "bfloat16",
    )


def make_gauges(
    kinds: list[Kind], config: Config, stack: contextlib.ExitStack
) -> dict[Kind, Gauge]:
    """A gauge of each kind, with processes of its own: those of ours have a lever set for good."""
    children = {kind: Children(cores()) for kind in kinds}
    return {
        kind: Gauge(kind, stack.enter_context(crew), config, cores())
        for kind, crew in children.items()
    }


class Bench:
    """One measurement; ``run`` is called once."""

    def __init__(
        self, config: Config, seconds: float, warmup_s: float, rounds: int, tell: Tell
    ) -> None:
        """``config`` comes from ``resolved``."""
        self._config = config
        self._seconds = seconds
        self._warmup_s = warmup_s
        self._rounds = rounds
        self._tell = tell
        self._places = places_of(config)
        self._components = ["env", "inference", "learner"]
        self._kinds: list[Kind] = ["ours", "reference"] if supports(config) else ["ours"]
        points = sum(
            len(settings(kind, name, config)) for kind in self._kinds for name in self._components
        )
        again = (rounds > 1) * rounds * len(self._kinds) * len(self._components)
        training_s = rounds * (warmup_s + seconds + STARTING_S)
        self._total_s = (points + again) * POINT_COST_S + training_s
        self._done_s = 0.0

    def run(self) -> dict[str, Any]:
        """Everything that was found, of types that JSON has."""
        with contextlib.ExitStack() as stack:
            gauges = make_gauges(self._kinds, self._config, stack)
            sweeps = {kind: self._sweep(gauge) for kind, gauge in gauges.items()}
            transfer = self._transfer(gauges["ours"])
            chosen = {
                kind: {name: best(points) for name, points in swept.items()}
                for kind, swept in sweeps.items()
            }
            rounds = [self._round(index, gauges, chosen, transfer) for index in range(self._rounds)]
        result = self._summary(rounds, transfer)
        result["settings"] = {
            kind: {name: point.parameters for name, point in points.items()}
            for kind, points in chosen.items()
        }
        result["sweeps"] = {
            kind: {
                name: [point.parameters | {"rate": round(point.rate, 1)} for point in points]
                for name, points in swept.items()
            }
            for kind, swept in sweeps.items()
        }
        result["rounds"] = rounds
        return result

    def _sweep(self, gauge: Gauge) -> dict[str, list[Point]]:
        swept = {}
        for name in self._components:

            def tell(point: Point, name: str = name) -> None:
                setting = " ".join(f"{key}={value}" for key, value in point.parameters.items())
                self._advance(
                    f"{gauge.kind} {name} {setting}: {point.rate:,.0f} per second", POINT_COST_S
                )

            swept[name] = gauge.sweep(name, POINT_S, tell)
        return swept

    def _transfer(self, gauge: Gauge) -> float | None:
        if set(self._places.values()) == {CPU}:
            return None
        return best(gauge.sweep("transfer", POINT_S, lambda point: None)).rate

    def _round(
        self, index: int, gauges: dict[Kind, Gauge], chosen: dict[Kind, dict[str, Point]],
        transfer: float | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Component by component, ours beside the reference, then training."""
        rates = {
            kind: {name: point.rate for name, point in points.items()}
            for kind, points in chosen.items()
        }
        if self._rounds > 1:
            for name in self._components:
                for kind, gauge in gauges.items():
                    parameters = chosen[kind][name].parameters
                    rates[kind][name] = gauge.rate(name, parameters, ROUND_S)
                    self._advance(
                        f"round {index + 1}: {kind} {name} {rates[kind][name]:,.0f}", POINT_COST_S
                    )
        done_s, whole_s = self._done_s, self._warmup_s + self._seconds

        def tell(time_s: float) -> None:
            self._done_s = done_s + STARTING_S + min(time_s, whole_s)
            self._advance(f"training, {time_s:.0f} of {whole_s:.0f} s", 0.0)

        trained = training.run(self._config, self._seconds, self._warmup_s, tell)
        bound = self._bound(rates["ours"], transfer)
        return {
            **{f"{kind}": of_kind for kind, of_kind in rates.items()},
            "bound_steps_per_s": bound,
            "efficiency": trained.steps_per_s / bound,
            **trained._asdict(),
        }

    def _bound(self, rates: dict[str, float], transfer: float | None) -> float:
        return bound_steps_per_s(rates, self._places, cores(), transfer)

    def _summary(self, rounds: list[dict[str, Any]], transfer: float | None) -> dict[str, Any]:
        config = self._config

        def median(*keys: str) -> float:
            values = [_at(one, keys) for one in rounds]
            return statistics.median(values)

        def median_if_known(key: str) -> float | None:
            values = [one[key] for one in rounds if one[key] is not None]
            return statistics.median(values) if values else None

        ours = {name: median("ours", name) for name in self._components}
        bound, steps = self._bound(ours, transfer), median("steps_per_s")
        result: dict[str, Any] = {
            "level_name": config.level_name,
            "net": config.net,
            "use_lstm": config.use_lstm,
            "preset": config.preset,
            "device": config.learner_device,
            "inference_device": config.inference_device,
            "precision": config.precision,
            "cores": cores(),
            "env_steps_per_core_s": ours["env"],
            "inference_rows_per_core_s": ours["inference"],
            "learner_rows_per_core_s": ours["learner"],
            "transfer_steps_per_s": transfer,
            "bound_steps_per_s": bound,
            "steps_per_s": steps,
            "frames_per_s": median("frames_per_s"),
            "efficiency": steps / bound,
            "policy_lag_mean": median_if_known("policy_lag_mean"),
            "cores_idle": median_if_known("cores_idle"),
            "reference_bound_steps_per_s": None,
            "steps_per_reference_bound": None,
        }
        if "reference" in self._kinds:
            plain = {name: median("reference", name) for name in self._components}
            reference = self._bound(plain, transfer)
            result["reference_bound_steps_per_s"] = reference
            result["steps_per_reference_bound"] = steps / reference
            result["reference"] = plain
        return result

    def _advance(self, what: str, cost_s: float) -> None:
        self._done_s += cost_s
        self._tell(what, min(1.0, self._done_s / self._total_s))


def _at(tree: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        tree = tree[key]
    return float(tree)
