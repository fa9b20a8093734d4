"""Inference and updates in bfloat16 and on a GPU, against float32 on the CPU.

Both act and learn as a run does, through ``Policy`` and ``Learner``, from the same weights and the
same rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from asyncagent.config import Config
from asyncagent.envs.atari import OBSERVATION
from asyncagent.learner import Learner
from asyncagent.models import make_net
from asyncagent.policy import Policy
from asyncagent.selftest.outcome import Absent, require
from asyncagent.structs import Discrete, EnvSpec, Nest, Unroll, map_nest
from asyncagent.unroll import Columns, empty_unroll

SPEC = EnvSpec(OBSERVATION, Discrete(6), 4)
CONFIG = Config(
    level_name="atari_pong", net="shallow", use_lstm=True, unroll_length=8, batch_size=4,
    num_actors=4, num_groups=1, learner_threads=1,
)  # fmt: skip
NUM_ROWS = 32
NUM_STEPS = 4
"""Of either: on a GPU the first two are made, the next is recorded, and all others replayed."""
CPU = torch.device("cpu")


class Bounds(NamedTuple):
    """How far results may be from those of float32 on the CPU."""

    logits: float
    """Largest difference, as a share of the largest logit."""
    ranked: float
    """Least share of the pairs of actions that are ranked alike, in [0, 1]."""
    cosine: float
    """Least cosine between the changes of the weights."""
    length: float
    """Largest difference between the lengths of the changes, as a share."""


BFLOAT16 = Bounds(logits=0.08, ranked=0.9, cosine=0.98, length=0.1)
"""bfloat16 has 8 bits: some 0.4% per number, through some ten layers."""
TFLOAT32 = Bounds(logits=0.02, ranked=0.97, cosine=0.999, length=0.02)
"""A GPU may multiply with 10 bits what is asked for in float32."""


class Found(NamedTuple):
    """What one device and precision made of the rows."""

    logits: npt.NDArray[np.float64]
    """[NUM_ROWS, A]."""
    change: npt.NDArray[np.float64]
    """[number of weights]: by all updates."""


def check_bfloat16() -> str:
    """bfloat16 on the CPU."""
    exact = compute(CPU, torch.float32)
    return compare("bfloat16", compute(CPU, torch.bfloat16), exact, BFLOAT16)


def check_gpu() -> str:
    """float32 and, where the GPU computes in it, bfloat16. Absent where there is no GPU."""
    if not torch.cuda.is_available():
        raise Absent(f"no GPU: torch {torch.__version__} sees no CUDA device")
    device = torch.device("cuda:0")
    exact = compute(CPU, torch.float32)
    said = [compare("float32", compute(device, torch.float32), exact, TFLOAT32)]
    if torch.cuda.is_bf16_supported(including_emulation=False):
        said.append(compare("bfloat16", compute(device, torch.bfloat16), exact, BFLOAT16))
    return f"{torch.cuda.get_device_name(device)}: {'; '.join(said)}"


def compute(device: torch.device, dtype: torch.dtype) -> Found:
    """NUM_STEPS inference steps of the same NUM_ROWS rows, and as many updates of one batch."""
    net = make_net(CONFIG.net, SPEC, CONFIG.use_lstm, 1)
    with torch.no_grad():
        net.policy.weight.mul_(100)  # type: ignore[union-attr,operator]
    rng = np.random.RandomState(3)
    policy = Policy(net, SPEC.actions, device, dtype, seed=1)
    rows = (
        rng.randint(0, 256, (NUM_ROWS, *OBSERVATION.shape)).astype(np.uint8),
        rng.uniform(-1, 1, NUM_ROWS).astype(np.float32),
        rng.randint(0, 6, NUM_ROWS),
        rng.uniform(size=NUM_ROWS) < 0.2,
        policy.initial_state(NUM_ROWS),
    )
    for _ in range(NUM_STEPS):
        logits = policy.infer(*rows).logits
    before = _weights(net)
    learner = Learner(CONFIG, net, SPEC.actions, device, dtype)
    batch = [Columns(_batch(rng, policy.initial_state(CONFIG.batch_size)), 0, CONFIG.batch_size)]
    try:
        for _ in range(NUM_STEPS):
            learner.update(batch)
        learner.take_statistics()  # waits for the device
        return Found(logits.astype(np.float64), _weights(net) - before)
    finally:
        learner.close()


def _weights(net: torch.nn.Module) -> npt.NDArray[np.float64]:
    flat = torch.cat([p.detach().reshape(-1).cpu() for p in net.parameters()])
    weights: npt.NDArray[np.float64] = flat.double().numpy()
    return weights


def _batch(rng: np.random.RandomState, state: Nest) -> Unroll:
    """Random rows, with an end and the opening after it in every column."""
    unroll = empty_unroll(CONFIG.unroll_length, CONFIG.batch_size, SPEC, state)
    map_nest(lambda leaf: leaf.fill(0), unroll)
    columns = np.arange(CONFIG.batch_size)
    unroll.observation[:] = rng.randint(0, 256, unroll.observation.shape)
    unroll.reward[:] = rng.uniform(-2, 2, unroll.reward.shape)
    unroll.terminated[columns + 1, columns] = True
    unroll.first[columns + 2, columns] = True
    unroll.valid[:] = ~unroll.terminated[:-1]
    unroll.action[:] = rng.randint(0, 6, unroll.action.shape)
    unroll.last_action[1:] = np.where(unroll.first[1:], 0, unroll.action)
    return unroll


def compare(name: str, found: Found, wanted: Found, bounds: Bounds) -> str:
    """What there is to say; Failed, with the figure, where a bound is broken."""
    size = np.abs(wanted.logits).max()
    require(size > 0.1, f"{name}: the logits to compare with are as small as {size:.2g}")
    error = float(np.abs(found.logits - wanted.logits).max() / size)
    ranked = float(np.mean(_order(found.logits) == _order(wanted.logits)))
    length, wanted_length = (float(np.linalg.norm(one.change)) for one in (found, wanted))
    cosine = float(found.change @ wanted.change) / max(length * wanted_length, 1e-300)
    longer = abs(length / wanted_length - 1)
    for what, value, good, bound in (
        ("logits differ", error, error <= bounds.logits, f"at most {bounds.logits}"),
        ("actions ranked alike", ranked, ranked >= bounds.ranked, f"at least {bounds.ranked}"),
        ("cosine of updates", cosine, cosine >= bounds.cosine, f"at least {bounds.cosine}"),
        ("updates' lengths differ", longer, longer <= bounds.length, f"at most {bounds.length}"),
    ):
        require(bool(good), f"{name}: {what}: {value:.4f}, must be {bound}")
    return f"{name} logits to {error:.1%}, {ranked:.0%} ranked alike, updates' cosine {cosine:.4f}"


def _order(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """[N, A, A]: which of two actions is the likelier."""
    return logits[:, :, None] > logits[:, None, :]
