"""Where a run's time goes: the shares of its stages, and what they say limits it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Limit = Literal[
    "", "environments", "inference", "learner", "network", "event loop", "decoding", "actor hosts"
]
"""What a run waits for; empty: not known yet.

decoding: hosts' messages are taken in. actor hosts: none is there, and nobody else acts."""


class Stages(NamedTuple):
    """Shares of wall time, 0 to 1, since the report before; nan: not known, or there is none."""

    env_steps: float = math.nan
    """Environment groups: stepping; mean over the groups, as the two below."""
    env_waits_actions: float = math.nan
    """Environment groups: waiting for inference."""
    env_waits_learner: float = math.nan
    """Environment groups: waiting for a place in the queue."""
    inference_computes: float = math.nan
    """Inference thread: the network's forward pass, and what leads to actions."""
    inference_copies: float = math.nan
    """Inference thread: rows gathered, and moved to the device and back."""
    inference_waits: float = math.nan
    """Inference thread: waiting for rows."""
    learner_computes: float = math.nan
    """Learner thread: losses, gradients, the optimiser's step."""
    learner_copies: float = math.nan
    """Learner thread: unrolls gathered into a batch and moved to the device."""
    learner_waits: float = math.nan
    """Learner thread: waiting for unrolls."""
    loop_busy: float = math.nan
    """Event loop's thread: on a core."""
    cores_busy: float = math.nan
    """The machine's cores: used by this run, its workers included."""
    hosts_wait: float = math.nan
    """Actor hosts: waiting for the connection to the learner; mean over hosts."""
    hosts_step: float = math.nan
    """Actor hosts: their environments stepping; mean over hosts."""
    env_cpu: float = math.nan
    """The machine's cores: used by the environments, and by what has no line of its own."""
    inference_cpu: float = math.nan
    """The machine's cores: used by the inference thread."""
    learner_cpu: float = math.nan
    """The machine's cores: used by the learner's threads."""
    cores_taken: float = math.nan
    """The machine's cores: used by other programs."""


class Verdict(NamedTuple):
    """What limits the run, and what to change."""

    limit: Limit = ""
    advice: str = ""
    """One sentence: what limits, how one sees it, what helps and what does not."""
