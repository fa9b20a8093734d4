"""The learner: batches of unroll columns in, updated weights out. Belongs to one thread."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asyncagent.config import Config
from asyncagent.crew import Crew
from asyncagent.cuda import Graphs, Lane, wait_for
from asyncagent.cuda_learning import BatchStep
from asyncagent.errors import NotFinite
from asyncagent.losses import LossOutput, impala_loss
from asyncagent.metrics import LearnerStatistics
from asyncagent.models import load_weights
from asyncagent.optim import (
    clip_grad_norm,
    linear_learning_rate,
    make_optimizer,
    set_learning_rate,
)
from asyncagent.policy import Policy
from asyncagent.shares import LargestOutput, micro_batch_sizes, most_columns
from asyncagent.structs import (
    ActionArray,
    ActionSpace,
    Discrete,
    IntArray,
    MultiDiscrete,
    Nest,
    Unroll,
    map_nest,
)
from asyncagent.unroll import Columns, gather_columns, split_columns


class Learner:
    """Owns the trained network, its optimiser and the counters that drive the schedule.

    A batch is cut by columns into micro-batches that fit the cache; losses are sums, so the
    accumulated gradient is the batch's own.  On a CPU several threads share the micro-batches:
    they need not wait for each other at every operator, as threads within one would.  On CUDA the
    whole batch is learned from at once, on a stream of the learner's own (see ``BatchStep``).
    """

    def __init__(
        self, config: Config, net: nn.Module, actions: ActionSpace, device: torch.device,
        dtype: torch.dtype, policy: Policy | None = None,
    ) -> None:  # fmt: skip
        """``net`` is trained in place; ``policy``, where given, receives every update's weights."""
        self.net = net.to(device)
        self.frames = 0
        """Frames learned from: action repeats times valid rows."""
        self.updates = 0
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
        self._sums = torch.zeros(6, device=device)
        self._lane = Lane(device)
        self._batch_step: BatchStep | None = None
        if not on_cpu:
            self._batch_step = BatchStep(self._step, Graphs("learning", self._lane))
        self._reset_statistics()

    @property
    def learning_rate(self) -> float:
        """Falls linearly from the configured rate to 0 at total_environment_frames."""
        config = self._config
        return linear_learning_rate(
            config.learning_rate, self.frames, config.total_environment_frames
        )

    def update(self, parts: list[Columns]) -> None:
        """Learn from one batch of columns; every update publishes its weights."""
        if not self._threads_set:
            self._prepare_thread()
            self._threads_set = True
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
            else:
                self._learn_in_micro_batches(parts)
            self.updates += 1
            self._updates_since += 1
            if count_frames:
                self.frames += (self._rows - rows_before) * self._config.num_action_repeats
            if self._policy is not None:
                self._policy.publish(self.updates, self.net)

    def take_statistics(self) -> LearnerStatistics:
        """Means since the last call; waits for the device. NotFinite if numbers went wrong."""
        total, pg, baseline, entropy, rhos, grad_norm = self._finite_sums()
        updates = self._updates_since or math.nan
        rows = self._rows or math.nan
        statistics = LearnerStatistics(
            frames=self.frames,
            updates=self.updates,
            num_updates=self._updates_since,
            total_loss=total / updates,
            policy_gradient_loss=pg / updates,
            baseline_loss=baseline / updates,
            entropy_loss=entropy / updates,
            grad_norm=grad_norm / updates,
            entropy=-entropy / rows,
            policy_lag_mean=self._lag_sum / rows,
            policy_lag_max=self._lag_max,
            rho_mean=rhos / rows,
            learning_rate=self.learning_rate,
            action_counts=self._action_counts,
        )
        self._reset_statistics()
        return statistics

    def state(self) -> dict[str, Any]:
        """A copy of weights, optimiser and counters; tensors and plain numbers only.

        Raises NotFinite rather than hand out weights that numbers gone wrong have spoilt.
        """
        self._finite_sums()
        with self._lane.use():
            net = copy.deepcopy(self.net.state_dict())
            optimizer = copy.deepcopy(self._optimizer.state_dict())
            for group in optimizer["param_groups"]:
                group["lr"] = self.learning_rate  # a number, also where it is a tensor here
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

    def _learn_in_micro_batches(self, parts: list[Columns]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        num_columns = sum(part.stop - part.start for part in parts)
        sizes = micro_batch_sizes(num_columns, self._crew.num_threads, self._most_columns)
        self._crew.share(self._learn_from, split_columns(parts, sizes))
        self._take_step()

    def _learn_from(self, columns: list[Columns]) -> None:
        """Add the gradient and the figures of one micro-batch; on any thread of the crew."""
        unroll = gather_columns(columns)
        figures, gradients = self._differentiate(map_nest(torch.from_numpy, unroll))
        with self._adding:
            self._sums[:5] += figures
            self._count(unroll)
            self._add(gradients)

    def _step(self, batch: Nest) -> None:
        """A whole update, of an Unroll of tensors; reads nothing back from their device."""
        self._optimizer.zero_grad(set_to_none=True)
        figures, gradients = self._differentiate(batch)
        self._sums[:5] += figures
        self._add(gradients)
        self._take_step()

    def _take_step(self) -> None:
        self._sums[-1] += clip_grad_norm(self._parameters, self._config.max_grad_norm)
        self._optimizer.step()

    def _differentiate(self, batch: Nest) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What ``_sums`` adds up, float32 [5], and a gradient for every parameter."""
        loss = self._loss(batch)
        gradients = torch.autograd.grad(loss.total, self._parameters, allow_unused=True)
        # exp(-inf) = 0 where not valid; a host may send an action that its own logits exclude.
        rhos = loss.log_rhos.clamp(max=80).exp().sum()
        figures = [loss.total.detach(), loss.policy_gradient, loss.baseline, loss.entropy, rhos]
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

    def _forward(self, batch: Nest) -> Any:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.net(
                batch.observation, batch.reward, batch.last_action, batch.first, batch.core_state
            )

    def _loss(self, batch: Nest) -> LossOutput:
        config = self._config
        output = self._forward(batch)
        return impala_loss(
            output[0].float(),  # a user's heads may answer in bfloat16 here
            output[1].float(),
            reward=batch.reward,
            terminated=batch.terminated,
            truncated=batch.truncated,
            action=batch.action,
            behaviour_logits=batch.behaviour_logits,
            valid=batch.valid,
            discounting=config.discounting,
            reward_clipping=config.reward_clipping,
            bootstrap_truncated=config.bootstrap_truncated,
            entropy_cost=config.entropy_cost,
            baseline_cost=config.baseline_cost,
            clip_rho_threshold=config.clip_rho_threshold,
            clip_pg_rho_threshold=config.clip_pg_rho_threshold,
            vtrace_lambda=config.vtrace_lambda,
            action_space=self._actions,
        )

    def _count(self, unroll: Unroll) -> None:
        valid = unroll.valid
        rows = int(valid.sum())
        lag = self.updates - unroll.policy_version[valid]
        self._rows += rows
        self._lag_sum += int(lag.sum())
        self._lag_max = max(self._lag_max, int(lag.max(initial=0)))
        self._action_counts += count_choices(self._actions, unroll.action[valid])

    def _finite_sums(self) -> list[float]:
        with self._lane.use():
            sums: list[float] = self._sums.tolist()
        if not all(map(math.isfinite, sums)):
            raise NotFinite(
                f"a loss or a gradient is not finite (within the {self._updates_since} updates up "
                f"to number {self.updates}): a lower --learning_rate may help; "
                "the checkpoints are from before"
            )
        return sums

    def _reset_statistics(self) -> None:
        with self._lane.use():
            self._sums.zero_()
        self._updates_since = 0
        self._rows = 0
        self._lag_sum = 0
        self._lag_max = 0
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
