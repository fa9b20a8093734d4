"""The learner: batches of unroll columns in, updated weights out. Belongs to one thread."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree
import torch
from torch import Tensor, nn

from asyncagent.config import Config
from asyncagent.crew import Crew
from asyncagent.cuda import Graphs, Lane, wait_for
from asyncagent.cuda_learning import BatchStep, Ended
from asyncagent.losses import LossOutput, loss_of
from asyncagent.metrics import MAX_LAG_COUNTED, LearnerStatistics
from asyncagent.models import forward, load_weights
from asyncagent.optim import (
    clip_grad_norm,
    linear_learning_rate,
    make_optimizer,
    set_learning_rate,
)
from asyncagent.policy import Policy
from asyncagent.shares import LargestOutput, micro_batch_sizes, most_columns
from asyncagent.skipped import FILE, Judged, SkippedBatch, Skips, is_skipped, refuse_if_spoilt
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    ArraySpec,
    Discrete,
    IntArray,
    MultiDiscrete,
    Nest,
    Unroll,
    map_nest,
)
from asyncagent.tracks import COMPUTES, COPIES, WAITS, Track
from asyncagent.unroll import Columns, gather_columns, origins_of, split_columns


class Figures(NamedTuple):
    """Sums over a batch or over updates, each as a float or, stacked, as one tensor."""

    total: Any
    policy_gradient: Any
    baseline: Any
    entropy: Any
    rhos: Any
    """Importance weights, not cut off."""
    rows: Any
    """Valid ones."""


class Learner:
    """Owns the trained network, its optimiser and the counters that drive the schedule.

    A batch is cut by columns into micro-batches that fit the cache; losses are sums, so the
    accumulated gradient is the batch's own.  On a CPU several threads share the micro-batches:
    they need not wait for each other at every operator, as threads within one would.  On CUDA the
    whole batch is learned from at once, on a stream of the learner's own (see ``BatchStep``).
    """

    def __init__(
        self, config: Config, net: nn.Module, actions: ActionSpace, device: torch.device,
        dtype: torch.dtype, policy: Policy | None = None, observation: Nest = None,
    ) -> None:  # fmt: skip
        """``net`` is trained in place; ``policy``, where given, receives every update's weights.

        ``observation``: of the EnvSpec, for a batch that is kept; None: there are no sentences.
        """
        self.net = net.to(device)
        self.frames = 0
        """Frames learned from: action repeats times valid rows, skipped updates' included."""
        self.updates = 0
        """Skipped ones included."""
        self.track = Track(3)
        """What the thread that calls ``update`` does."""
        self._thread = 0
        self._config = config
        self._actions = actions
        self._device = device
        self._dtype = dtype
        self._policy = policy
        self._parameters = list(self.net.parameters())
        self._optimizer = make_optimizer(config, self._parameters)
        self._threads_set = False
        on_cpu = device.type == "cpu"
        num_threads = config.learner_threads if on_cpu else 1
        self._crew = Crew("learner", num_threads, self._prepare_thread)
        self._adding = threading.Lock()
        self._most_columns = 0
        self._lag_max = 0
        self._observation = observation
        self._skips = Skips(config.max_skipped_updates, Path(config.logdir) / FILE)
        self._origins: tuple[str, ...] = ()
        self._figures = torch.zeros(len(Figures._fields))
        self._sums = torch.zeros(len(Figures._fields) + 2, device=device)
        self._verdict = torch.zeros(3, device=device)
        self._lane = Lane(device)
        self._batch_step: BatchStep | None = None
        if not on_cpu:
            graphs = Graphs("learning", self._lane)
            self._batch_step = BatchStep(self._step, graphs, self._verdict, self.track)
        self._reset_statistics()

    @property
    def learning_rate(self) -> float:
        """Falls linearly from the configured rate to 0 at total_environment_frames."""
        config = self._config
        return linear_learning_rate(
            config.learning_rate, self.frames, config.total_environment_frames
        )

    def update(self, parts: list[Columns]) -> None:
        """Learn from one batch of columns; every update publishes its weights.

        An update whose loss or gradient is no number changes neither weights nor optimiser.  Its
        frames count all the same: on CUDA they have driven the schedule when it becomes known.

        Raises NotFinite after too many of those in a row, or where the weights are spoilt.
        """
        self.track.enter(COMPUTES)
        try:
            self._update_epochs(parts)
        finally:
            self.track.enter(WAITS)

    def _update_epochs(self, parts: list[Columns]) -> None:
        if not self._threads_set:
            self._prepare_thread()
            self._threads_set = True
            self._thread = threading.get_ident()
        if self._most_columns == 0 and self._batch_step is None:
            self._most_columns = self._columns_that_fit(parts[0])
        for epoch in range(self._config.epochs_per_batch):
            self._update(parts, count_frames=epoch == 0)

    def _update(self, parts: list[Columns], count_frames: bool) -> None:
        rows_before = self._rows
        with self._lane.use():
            set_learning_rate(self._optimizer, self.learning_rate)
            if self._batch_step is not None:
                self._count(self._batch_step(parts))
                # Known is the update before; of this one, the device sees to the weights.
                judged, publishes = self._judged_before(self._batch_step.ended), True
                self._origins = origins_of(parts)
            else:
                judged = self._learn_in_micro_batches(parts)
                publishes = not judged.skipped
            self.updates += 1
            if count_frames:
                self.frames += (self._rows - rows_before) * self._config.num_action_repeats
            if self._policy is not None and publishes:
                self._policy.publish(self.updates, self.net)
        if judged is not None:
            self._skips.see(judged, self._record)

    def take_statistics(self) -> LearnerStatistics:
        """Means since the last call, without skipped updates; waits for the device."""
        with self._lane.use():
            *sums, grad_norm, count = self._sums.tolist()
        figures = Figures(*sums)
        updates = count or math.nan
        rows = figures.rows or math.nan
        statistics = LearnerStatistics(
            frames=self.frames,
            updates=self.updates,
            num_updates=int(count),
            total_loss=figures.total / updates,
            policy_gradient_loss=figures.policy_gradient / updates,
            baseline_loss=figures.baseline / updates,
            entropy_loss=figures.entropy / updates,
            grad_norm=grad_norm / updates,
            entropy=-figures.entropy / rows,
            policy_lag_mean=self._lag_sum / (self._rows or math.nan),
            policy_lag_max=self._lag_max,
            rho_mean=figures.rhos / rows,
            learning_rate=self.learning_rate,
            action_counts=self._action_counts,
            skipped_updates=self._skips.total,
            policy_lag_counts=self._lag_counts,
        )
        self._reset_statistics()
        return statistics

    def state(self) -> dict[str, Any]:
        """A copy of weights, optimiser and counters; tensors and plain numbers only.

        Raises NotFinite rather than hand out what numbers gone wrong have spoilt.
        """
        with self._lane.use():
            net = copy.deepcopy(self.net.state_dict())
            optimizer = copy.deepcopy(self._optimizer.state_dict())
            for group in optimizer["param_groups"]:
                group["lr"] = self.learning_rate  # a number, also where it is a tensor here
            refuse_if_spoilt(net, optimizer, self.updates)
            wait_for(self._lane.mark())  # whoever saves the copies does not use the lane
        return {
            "net": net,
            "optimizer": optimizer,
            "frames": self.frames,
            "updates": self.updates,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        with self._lane.use():
            load_weights(self.net, state["net"])
            asked = [dict(group) for group in self._optimizer.param_groups]
            self._optimizer.load_state_dict(state["optimizer"])
            for group, wanted in zip(self._optimizer.param_groups, asked, strict=True):
                # The accumulators are the checkpoint's, the flags this run's.
                group.update({k: v for k, v in wanted.items() if k != "params"})
            if self._batch_step is not None:
                self._batch_step.forget()  # a recorded step knows the old accumulators' places
            self.frames = int(state["frames"])
            self.updates = int(state["updates"])
            if self._policy is not None:
                self._policy.publish(self.updates, self.net)

    def close(self) -> None:
        """Let the helping threads end."""
        self._crew.close()

    def _prepare_thread(self) -> None:
        # torch keeps the operator thread count per calling thread.
        torch.set_num_threads(1)

    def _learn_in_micro_batches(self, parts: list[Columns]) -> Judged:
        self._figures.zero_()
        buffers = [buffer.clone() for buffer in self.net.buffers()]
        self._optimizer.zero_grad(set_to_none=True)
        num_columns = sum(part.stop - part.start for part in parts)
        sizes = micro_batch_sizes(num_columns, self._crew.num_threads, self._most_columns)
        self._crew.share(self._learn_from, split_columns(parts, sizes))
        norm = clip_grad_norm(self._parameters, self._config.max_grad_norm)
        skipped = bool(is_skipped(self._figures[0], norm))
        if skipped:
            for buffer, before in zip(self.net.buffers(), buffers, strict=True):
                buffer.copy_(before)
        else:
            self._optimizer.step()
            self._sums += torch.cat([self._figures, norm[None], torch.ones(1)])
        total, norm_found = float(self._figures[0]), float(norm)
        return Judged(
            self.updates + 1,
            skipped,
            total,
            norm_found,
            lambda: gather_columns(parts),
            lambda: origins_of(parts),
        )

    def _learn_from(self, columns: list[Columns]) -> None:
        """Add the gradient and the figures of one micro-batch; on any thread of the crew."""
        mine = threading.get_ident() == self._thread  # others' work is no part of the track
        if mine:
            self.track.enter(COPIES)
        unroll = gather_columns(columns)
        if mine:
            self.track.enter(COMPUTES)
        figures, gradients = self._differentiate(map_nest(torch.from_numpy, unroll))
        with self._adding:
            self._figures += figures
            self._count(unroll)
            self._add(gradients)

    def _step(self, batch: Nest) -> None:
        """A whole update, of an Unroll of tensors; reads nothing back from their device."""
        buffers = [buffer.clone() for buffer in self.net.buffers()]
        self._optimizer.zero_grad(set_to_none=True)
        figures, gradients = self._differentiate(batch)
        self._add(gradients)
        norm = clip_grad_norm(self._parameters, self._config.max_grad_norm)
        skipped = is_skipped(figures[0], norm)
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        for buffer, before in zip(self.net.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        added = torch.cat([figures, norm[None], torch.ones_like(norm)[None]])
        self._sums += added.masked_fill(skipped, 0.0)
        self._verdict.copy_(torch.stack([skipped.float(), figures[0], norm]))

    def _differentiate(self, batch: Nest) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Figures, a float32 tensor, and a gradient for every parameter."""
        loss = self._loss(batch)
        gradients = torch.autograd.grad(loss.total, self._parameters, allow_unused=True)
        # exp(-inf) = 0 where not valid; a host may send an action that its own logits exclude.
        rhos = loss.log_rhos.clamp(max=80).exp().sum()
        rows = batch.valid.sum().float()
        figures = Figures(
            loss.total.detach(), loss.policy_gradient, loss.baseline, loss.entropy, rhos, rows
        )
        return torch.stack(figures), gradients

    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        sums, terms = [], []
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = _laid_out_as(parameter, gradient)
            else:
                sums.append(parameter.grad)
                terms.append(gradient)
        if sums:
            torch._foreach_add_(sums, terms)

    def _columns_that_fit(self, part: Columns) -> int:
        """Columns of a micro-batch at most."""
        rows = self._config.unroll_length + 1
        if self._config.micro_batch_rows:
            return max(1, self._config.micro_batch_rows // rows)
        column = gather_columns([Columns(part.unroll, part.start, part.start + 1)])
        with torch.no_grad(), LargestOutput(self.net) as largest:
            self._forward(map_nest(torch.from_numpy, column))
        return most_columns(self._crew.num_threads, rows, math.ceil(largest.num_bytes / rows))

    def _forward(self, batch: Nest) -> tuple[Tensor, Tensor]:
        return forward(self.net, batch, self._device, self._dtype)

    def _loss(self, batch: Nest) -> LossOutput:
        logits, values = self._forward(batch)
        return loss_of(self._config, self._actions, logits, values, batch)

    def _count(self, unroll: Unroll) -> None:
        valid = unroll.valid
        rows = int(valid.sum())
        lag = self.updates - unroll.policy_version[valid]
        self._rows += rows
        self._lag_sum += int(lag.sum())
        self._lag_max = max(self._lag_max, int(lag.max(initial=0)))
        counted = lag.clip(0, MAX_LAG_COUNTED)
        self._lag_counts += np.bincount(counted, minlength=MAX_LAG_COUNTED + 1)
        self._action_counts += count_choices(self._actions, unroll.action[valid])

    def _judged_before(self, ended: Ended | None) -> Judged | None:
        if ended is None:
            return None
        skipped, total, norm = ended.verdict.tolist()
        origins = self._origins
        return Judged(self.updates, skipped > 0, total, norm, lambda: ended.batch, lambda: origins)

    def _record(self, judged: Judged) -> SkippedBatch:
        """What there is to keep of a skipped update."""
        with self._lane.use():
            net = {
                name: t.detach().to("cpu", copy=True) for name, t in self.net.state_dict().items()
            }
        batch = judged.batch()
        leaves: list[ArraySpec] = optree.tree_leaves(self._observation)
        num_leaves = len(optree.tree_leaves(batch.observation))
        return SkippedBatch(
            self._config,
            self._actions,
            tuple(leaf.num_tokens for leaf in leaves) or (0,) * num_leaves,
            str(self._dtype).removeprefix("torch."),
            self.frames,
            judged.update,
            judged.update - 1 if self._batch_step is None else self.updates,
            judged.total_loss,
            judged.grad_norm,
            batch,
            judged.origins(),
            net,
        )

    def _reset_statistics(self) -> None:
        with self._lane.use():
            self._sums.zero_()
        self._rows = 0
        self._lag_sum = 0
        self._lag_max = 0
        self._lag_counts: Any = 0
        self._action_counts: Any = 0


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` in the memory layout of its parameter.

    A convolution's comes in another, and fused optimisers go through both in the order of memory.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def count_choices(space: ActionSpace, actions: ActionArray) -> IntArray | int:
    """How often each alternative of each choice was taken, int64 [A]; 0 where nothing is chosen.

    Args:
      actions: [N, ...] as ``space`` says.
    """
    if isinstance(space, Discrete):
        return np.bincount(actions, minlength=space.num_actions)
    if isinstance(space, MultiDiscrete):
        choices = zip(actions.T, space.sizes, strict=True)
        return np.concatenate([np.bincount(taken, minlength=size) for taken, size in choices])
    return 0
