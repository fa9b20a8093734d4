"""The learner: batches of unroll columns in, updated weights out. Belongs to one thread."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asyncagent.config import Config
from asyncagent.errors import NotFinite
from asyncagent.losses import LossOutput, impala_loss
from asyncagent.metrics import LearnerStatistics
from asyncagent.models import load_weights
from asyncagent.optim import clip_grad_norm, linear_learning_rate, make_optimizer
from asyncagent.policy import Policy
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
    accumulated gradient is the batch's own.
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
        self._lag_max = 0
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
            # torch keeps the operator thread count per calling thread.
            torch.set_num_threads(self._config.learner_threads)
            self._threads_set = True
        for epoch in range(self._config.epochs_per_batch):
            self._update(parts, count_frames=epoch == 0)

    def _update(self, parts: list[Columns], count_frames: bool) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        frames = 0
        for unroll in self._micro_batches(parts):
            loss = self._loss(unroll)
            loss.total.backward()  # type: ignore[no-untyped-call]
            rhos = loss.log_rhos.exp().sum()  # exp(-inf) = 0 where not valid
            self._sums[:5] += torch.stack(
                [loss.total.detach(), loss.policy_gradient, loss.baseline, loss.entropy, rhos]
            )
            frames += self._count(unroll) * self._config.num_action_repeats
        grad_norm = clip_grad_norm(self._parameters, self._config.max_grad_norm)
        self._sums[-1] += grad_norm
        self._optimizer.step()
        self.updates += 1
        self._updates_since += 1
        if count_frames:
            self.frames += frames
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
        return {
            "net": copy.deepcopy(self.net.state_dict()),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "frames": self.frames,
            "updates": self.updates,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where ``state()`` was taken."""
        load_weights(self.net, state["net"])
        asked = [dict(group) for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, wanted in zip(self._optimizer.param_groups, asked, strict=True):
            # The accumulators are the checkpoint's, the flags this run's.
            group.update({k: v for k, v in wanted.items() if k != "params"})
        self.frames = int(state["frames"])
        self.updates = int(state["updates"])
        if self._policy is not None:
            self._policy.publish(self.updates, self.net)

    def _micro_batches(self, parts: list[Columns]) -> Iterator[Unroll]:
        size = self._config.batch_size
        if self._device.type == "cpu" and self._config.micro_batch_rows:
            columns = max(1, self._config.micro_batch_rows // (self._config.unroll_length + 1))
            size = math.ceil(size / math.ceil(size / columns))  # of equal size, not one small last
        for run in split_columns(parts, size):
            yield gather_columns(run)

    def _loss(self, unroll: Unroll) -> LossOutput:
        config = self._config
        batch = map_nest(self._to_device, unroll)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = self.net(
                batch.observation, batch.reward, batch.last_action, batch.first, batch.core_state
            )
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

    def _count(self, unroll: Unroll) -> int:
        """Take the figures of one micro-batch; returns its valid rows."""
        valid = unroll.valid
        rows = int(valid.sum())
        lag = self.updates - unroll.policy_version[valid]
        self._rows += rows
        self._lag_sum += int(lag.sum())
        self._lag_max = max(self._lag_max, int(lag.max(initial=0)))
        self._action_counts += count_choices(self._actions, unroll.action[valid])
        return rows

    def _finite_sums(self) -> list[float]:
        sums: list[float] = self._sums.tolist()
        if not all(map(math.isfinite, sums)):
            raise NotFinite(
                f"a loss or a gradient is not finite (within the {self._updates_since} updates up "
                f"to number {self.updates}): a lower --learning_rate may help; "
                "the checkpoints are from before"
            )
        return sums

    def _reset_statistics(self) -> None:
        self._sums = torch.zeros(6, device=self._device)
        self._updates_since = 0
        self._rows = 0
        self._lag_sum = 0
        self._lag_max = 0
        self._action_counts: Any = 0

    def _to_device(self, array: Nest) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.to(self._device, non_blocking=True)


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
