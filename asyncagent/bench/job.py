"""What a measuring process is asked to do."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from asyncagent.config import Config

Kind: TypeAlias = Literal["ours", "reference"]
Parameters: TypeAlias = dict[str, int]
"""One setting of a sweep."""


@dataclass(frozen=True)
class Job:
    """One component at one setting."""

    kind: Kind
    component: str
    """env, inference, learner or transfer."""
    config: Config
    parameters: Parameters
    seconds: float = 1.0
    """Of the measurement: as many whole pieces of work as it takes to fill them."""
    warm_up_s: float = 0.3

    def encode(self) -> dict[str, Any]:
        """As an object of types that JSON has."""
        return asdict(self)

    @classmethod
    def decode(cls, job: dict[str, Any]) -> Job:
        """What ``encode`` made."""
        return cls(**job | {"config": Config.from_json(json.dumps(job["config"]), "the job")})
