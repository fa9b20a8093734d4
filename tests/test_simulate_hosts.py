"""The simulation of many actor hosts: a small one holds, and what does not hold is seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import simulate_hosts


@pytest.mark.slow
@pytest.mark.parametrize("curve", [False, True])
def test_ten_hosts(curve: bool) -> None:
    """Ten light hosts that come and go are served fairly; all who leave are noticed."""
    figures = simulate_hosts.simulate(
        hosts=10, seconds=3.0, join_leave_per_s=1.0, unrolls_per_s=100.0, processes=2, curve=curve
    )
    assert figures["failed"] == []
    assert figures["accepted"] > 100
    assert figures["joins"] == figures["left_with_bye"] + figures["vanished"]


def learner(**changes: Any) -> Any:
    """What a learner tells of hosts a and b: a leaves, b vanishes."""
    second: dict[str, Any] = {"hosts": 2, "memory_mb": 50.0, "updates": 1, "cpu_s": 1.0}
    lines: list[dict[str, Any]] = [
        {"event": "joins", "host": "a", "at_s": 1.0},
        {"event": "joins", "host": "b", "at_s": 1.0},
        second | {"rejected": 0, "refused": 0, "at_s": 5.0, "taken": 0},
        second
        | {"rejected": 0, "refused": 0, "memory_mb": changes.get("memory_mb", 50.0)}
        | {"at_s": 30.0, "taken": 100},
        {"event": "leaves", "host": "a", "at_s": 30.0},
        {"event": "is lost", "host": "b", "at_s": changes.get("lost_s", 39.0)},
        {"left_over": changes.get("left_over", [])},
    ]
    told = [line for line in lines if line.get("event") != changes.get("without", "none")]
    return SimpleNamespace(told=told, of=lambda key: [line for line in told if key in line])


def hosts(**changes: Any) -> list[dict[str, Any]]:
    """What those two tell."""
    same = {"present_s": 25.0, "accepted": 50, "silences": 0, "unknown": 0, "round_trip_ms": 1.0}
    return [
        same | {"left": "a", "politely": True, "at_s": 30.0},
        same | {"left": "b", "politely": False, "at_s": 30.0} | changes,
    ]


@pytest.mark.parametrize(
    ("of_learner", "of_hosts", "failed"),
    [
        ({}, {}, []),
        ({}, {"accepted": 10}, ["fair"]),
        ({"memory_mb": 90.0}, {}, ["memory"]),
        ({"lost_s": 20.0}, {}, ["heartbeats"]),
        ({}, {"silences": 1}, ["heartbeats"]),
        ({}, {"unknown": 1}, ["heartbeats"]),
        ({"lost_s": 41.0}, {}, ["membership"]),
        ({"without": "is lost"}, {}, ["membership"]),
        ({"without": "leaves"}, {}, ["membership"]),
        ({"left_over": ["b"]}, {}, ["membership"]),
    ],
)
def test_judgement(of_learner: dict[str, Any], of_hosts: dict[str, Any], failed: list[str]) -> None:
    """Unfairness, growth, a host lost wrongly, late or never: each is named, and nothing else."""
    told = learner(**of_learner)
    result = simulate_hosts.judge(told, 0, len(told.told), hosts(**of_hosts), 20.0)
    assert result["failed"] == failed
