"""Why an update was skipped: its loss and gradient again, until the first number that is none.

Columns are learned from one by one: losses are sums, so what one column makes of itself it also
makes of the batch, and the first step of its computation whose result is not finite is the one to
look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from torch import Tensor, nn

from asyncagent import distributions
from asyncagent.config import Config
from asyncagent.losses import LossOutput, loss_of
from asyncagent.models import forward, load_weights, make_net
from asyncagent.skipped import Place, SkippedBatch, arrays_of, describe, not_finite, places
from asyncagent.structs import ActionSpace, ArraySpec, EnvSpec, Nest, Unroll, map_nest

EXTREME = 1e10
"""Numbers beyond are nobody's rewards, logits or measurements: losses square them."""

TERMS = (
    *("weights", "network's output", "importance weights", "V-trace targets"),
    *("policy gradient loss", "baseline loss", "entropy loss", "total loss", "gradient"),
)
"""Steps of the computation, in their order."""

_CPU = torch.device("cpu")


class FieldReport(NamedTuple):
    """What one array of a batch holds."""

    field: str
    dtype: str
    shape: tuple[int, ...]
    least: float
    """Of its finite numbers; nan where there is none."""
    most: float
    num_not_finite: int
    num_extreme: int
    """Finite, but beyond EXTREME."""
    first: Place | None
    """The first number that is not finite or extreme."""


class Cause(NamedTuple):
    """The first step of the computation whose result is not finite."""

    term: str
    """One of TERMS."""
    layer: str
    """Name of the parameter, where it is a gradient or a weight."""
    row: int | None
    column: int | None
    origin: str
    """Who played that column."""
    culprit: str
    """What to blame for it, in words."""


class Pass(NamedTuple):
    """The update's computation in one precision."""

    precision: str
    total_loss: float
    policy_gradient_loss: float
    baseline_loss: float
    entropy_loss: float
    grad_norm: float
    """Before clipping."""
    columns: tuple[int, ...]
    """In which something is not finite."""
    cause: Cause | None
    """None: every number is finite."""


class _Found(NamedTuple):
    term: str
    row: int | None
    culprit: str
    layer: str = ""


def report_fields(batch: Unroll) -> list[FieldReport]:
    """What every array of a batch holds, in the order of an Unroll's fields."""
    reports = []
    for field, array in arrays_of(batch):
        strange = np.zeros(array.shape, np.bool_)
        finite, extreme = array, strange
        if array.dtype.kind == "f":
            good = np.isfinite(array)
            finite, extreme = array[good], good & (np.abs(array) > EXTREME)
            strange = ~good | extreme
        reports.append(
            FieldReport(
                field,
                str(array.dtype),
                array.shape,
                float(finite.min()) if finite.size else float("nan"),
                float(finite.max()) if finite.size else float("nan"),
                int(strange.sum()) - int(extreme.sum()),
                int(extreme.sum()),
                next(places(field, array, strange), None),
            )
        )
    return reports


def build_net(skipped: SkippedBatch) -> nn.Module:
    """The net with the weights that were kept.

    A net of the user's own is imported for it.  UsageError or CheckpointError, one line, where the
    net cannot be built or takes other weights.
    """
    observation = skipped.batch.observation
    leaves: list[np.ndarray] = optree.tree_leaves(observation)
    specs = iter(
        ArraySpec(leaf.shape[2:], str(leaf.dtype), count)
        for leaf, count in zip(leaves, skipped.num_tokens, strict=True)
    )
    spec = EnvSpec(map_nest(lambda _: next(specs), observation), skipped.actions, 1)
    config = skipped.config
    net = make_net(config.net, spec, config.use_lstm, config.seed)
    load_weights(net, skipped.net)
    return net


def compute(skipped: SkippedBatch, net: nn.Module, precision: str) -> Pass:
    """Loss and gradient of the batch on the CPU, and where they go wrong."""
    dtype = getattr(torch, precision)
    names, parameters = zip(*net.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    losses = torch.zeros(4)
    found: dict[int, _Found] = {}
    norms: list[float] = []
    for column in range(skipped.batch.reward.shape[1]):
        batch = _tensors_of(skipped.batch, column)
        logits, values = forward(net, batch, _CPU, dtype)
        loss = loss_of(skipped.config, skipped.actions, logits, values, batch)
        grads = torch.autograd.grad(loss.total, parameters, allow_unused=True)
        grads = tuple(0 * p if g is None else g for p, g in zip(parameters, grads, strict=True))
        losses += torch.stack(
            [loss.total.detach(), loss.policy_gradient, loss.baseline, loss.entropy]
        )
        torch._foreach_add_(sums, list(grads))
        norms.append(float(nn.utils.get_total_norm(grads)))
        with torch.no_grad():
            first = _in_column(skipped, column, batch, logits, values, loss)
        first = first or _in_gradient(skipped, names, grads, column)
        if first is not None:
            found[column] = first
    norm = nn.utils.get_total_norm(sums)
    cause = _weights(skipped) or _cause(skipped, found)
    if cause is None and not bool(torch.isfinite(losses[0] + norm.square())):
        # No column by itself: in their sum.
        worst = int(np.argmax(norms))
        total = _in_gradient(skipped, names, sums, worst)
        if total is None:
            total = _Found("total loss", None, "it overflows where the columns are added up")
        cause = _made(skipped, worst, total)
    total_loss, policy_gradient, baseline, entropy = losses.tolist()
    return Pass(
        precision, total_loss, policy_gradient, baseline, entropy, float(norm), tuple(found), cause
    )  # fmt: skip


def _tensors_of(batch: Unroll, column: int) -> Nest:
    def rows(leaf: np.ndarray) -> Tensor:
        return torch.from_numpy(leaf[:, column : column + 1].copy())

    def state(leaf: np.ndarray) -> Tensor:
        return torch.from_numpy(leaf[column : column + 1].copy())

    one = map_nest(rows, batch._replace(core_state=()))
    return one._replace(core_state=map_nest(state, batch.core_state))


def _weights(skipped: SkippedBatch) -> Cause | None:
    spoilt = not_finite(skipped.net)
    if not spoilt:
        return None
    tensor = skipped.net[spoilt[0]]
    bad = int((~torch.isfinite(tensor)).sum())
    others = f"; so are {len(spoilt) - 1} more tensors" if len(spoilt) > 1 else ""
    culprit = f"{bad:,} of {tensor.numel():,} numbers of {spoilt[0]} are not finite{others}"
    return Cause("weights", spoilt[0], None, None, "", culprit)


def _cause(skipped: SkippedBatch, found: dict[int, _Found]) -> Cause | None:
    if not found:
        return None
    column = min(found, key=lambda column: TERMS.index(found[column].term))
    return _made(skipped, column, found[column])


def _made(skipped: SkippedBatch, column: int, found: _Found) -> Cause:
    origin = skipped.origins[column]
    return Cause(found.term, found.layer, found.row, column, origin, found.culprit)


def _in_column(
    skipped: SkippedBatch, column: int, batch: Nest, logits: Tensor, values: Tensor,
    loss: LossOutput,
) -> _Found | None:  # fmt: skip
    """The first step of one column's loss that is not finite, and its row."""

    def found(term: str, row: int, fields: Sequence[str], rows: slice, otherwise: str) -> _Found:
        return _Found(term, row, _blame(skipped, fields, rows, column) or otherwise)

    # A recurrent net carries what is wrong on to later rows, V-trace to earlier ones.
    row = _first(torch.cat([logits, values[..., None]], -1).flatten(1))
    if row is not None:
        seen = ("observation", "reward", "last_action", "core_state")
        words = "all it was shown is within bounds: its activations overflow"
        return found("network's output", row, seen, slice(0, row + 1), words)
    row = _first(torch.where(loss.log_rhos.isnan(), torch.nan, 0.0))
    if row is not None:
        words = "the action's log-probability is no number"
        acted = ("behaviour_logits", "action")
        return found("importance weights", row, acted, slice(row, row + 1), words)
    row = _last(loss.vs + loss.pg_advantages)
    if row is not None:
        words = "reward and values are finite: they overflow together"
        return found("V-trace targets", row, ("reward",), slice(row + 1, row + 2), words)
    for term, terms in _terms(skipped.config, skipped.actions, batch, logits, values, loss):
        row = _first(terms)
        if row is None and not bool(torch.isfinite(terms.sum())):
            row = int(terms.abs().argmax())
        if row is not None:
            # A reward counts in the targets of all the rows before it.
            fields = ("reward", "observation", "behaviour_logits")
            words = "no number of the batch is extreme: it overflows by itself"
            return found(term, row, fields, slice(row, None), words)
    return None


def _terms(
    config: Config, space: ActionSpace, batch: Nest, logits: Tensor, values: Tensor,
    loss: LossOutput,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """What the loss adds up, [T, 1] each; 0 where not valid."""
    log_probs = distributions.log_prob(space, logits[:-1], batch.action)
    errors = loss.vs - values[:-1]
    entropies = distributions.entropy(space, logits[:-1])
    terms = {
        "policy gradient loss": -log_probs * loss.pg_advantages,
        "baseline loss": 0.5 * errors.square(),
        "entropy loss": -entropies,
    }
    kept = {name: torch.where(batch.valid, term, 0.0) for name, term in terms.items()}
    yield from kept.items()
    yield (
        "total loss",
        kept["policy gradient loss"]
        + config.baseline_cost * kept["baseline loss"]
        + config.entropy_cost * kept["entropy loss"],
    )


def _in_gradient(
    skipped: SkippedBatch, names: Sequence[str], grads: Sequence[Tensor], column: int
) -> _Found | None:
    """The first gradient that is not finite, from the heads back to the input."""
    blamed = _blame(skipped, ("reward", "observation", "core_state"), slice(None), column)
    blamed = blamed or "no number of the batch is extreme"
    for name, grad in zip(reversed(names), reversed(grads), strict=True):
        if not bool(torch.isfinite(grad).all()):
            return _Found("gradient", None, f"the loss is finite, this is not; {blamed}", name)
    norm = nn.utils.get_total_norm(grads)
    if not bool(torch.isfinite(norm.square())):
        largest = max(range(len(grads)), key=lambda index: float(grads[index].abs().max()))
        words = f"its norm is {float(norm):g}, whose square overflows; {blamed}"
        return _Found("gradient", None, words, names[largest])
    return None


def _blame(skipped: SkippedBatch, fields: Sequence[str], rows: slice, column: int) -> str:
    """A number of the column that is not finite, else the most extreme one, in words."""
    extreme: list[Place] = []
    for field, array in arrays_of(skipped.batch):
        if array.dtype.kind != "f" or field.split("[")[0] not in fields:
            continue
        here = np.zeros(array.shape, np.bool_)
        here[column if field.startswith("core_state") else (rows, column)] = True
        for place in places(field, array, here & ~np.isfinite(array)):
            return describe(place, skipped.origins)
        extreme += places(field, array, here & (np.abs(array) > EXTREME))
    if not extreme:
        return ""
    return describe(max(extreme, key=lambda place: abs(place.value)), skipped.origins)


def _first(rows: Tensor) -> int | None:
    """The first row of [T, ...] that holds a number which is not finite."""
    bad = (~torch.isfinite(rows)).flatten(1).any(1).nonzero()
    return int(bad[0]) if len(bad) else None


def _last(rows: Tensor) -> int | None:
    bad = (~torch.isfinite(rows)).flatten(1).any(1).nonzero()
    return int(bad[-1]) if len(bad) else None


def as_json(value: Any) -> Any:
    """Records as objects, and numbers that JSON does not know as strings."""
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value
