"""What an actor host infers with; the only part of it that needs torch."""

from __future__ import annotations

from typing import Any

import torch

from asyncagent.config import Config
from asyncagent.errors import UsageError
from asyncagent.models import make_net
from asyncagent.policy import Policy, resolve_device, resolve_precision
from asyncagent.structs import EnvSpec
from asyncagent.weights import Precision, decode_weights, num_weights


class HostPolicy:
    """A policy whose weights come from afar."""

    def __init__(self, config: Config, spec: EnvSpec, expected_weights: int, seed: int) -> None:
        """UsageError if the net made here is not the learner's."""
        torch.set_num_threads(1)
        device = resolve_device(config.device)
        dtype = resolve_precision(config.precision, device)
        self._net = make_net(config.net, spec, config.use_lstm, config.seed)
        found = num_weights(self._net)
        if found != expected_weights:
            raise UsageError(
                f"net {config.net} has {found:,} weights here and {expected_weights:,} at the "
                "learner: the same version of asyncagent must run on both"
            )
        self.policy = Policy(
            self._net,
            spec.actions,
            device,
            dtype,
            seed,
            config.inference_threads,
            random_actions=config.benchmark_mode,
        )

    def load(self, part: Any, version: int, precision: Precision) -> None:
        """Act with these weights from the next batch on. One thread."""
        decode_weights(self._net, part, precision)
        self.policy.publish(version, self._net)
