"""The same work done plainly: a yardstick that stays as it is.

Stock torch modules under autocast with float32 weights, a whole batch at once, V-trace as a loop
over time, torch's own optimiser, bare environments.  What asyncagent does to be faster belongs
elsewhere: whoever changes this file changes what every figure in the docs was compared with.

Nets of the same sizes as ours, of observations of one array; ``supports`` says where there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from asyncagent.bench.components import (
    RING,
    Component,
    Going,
    precision_of,
    random_actions,
    random_unroll,
)
from asyncagent.bench.job import Parameters
from asyncagent.bodies import image_layout
from asyncagent.config import Config
from asyncagent.envs import atari, dmlab, doom, env_spec, family_of, gym, levels_of, toy
from asyncagent.envs.base import Env, env_seeds
from asyncagent.envs.worker import find_maker
from asyncagent.models import make_net
from asyncagent.policy import resolve_devices
from asyncagent.structs import ActionSpace, ArraySpec, Box, Discrete, EnvSpec, Unroll, map_nest

NETS = ("auto", "shallow", "deep", "ancestor", "mlp")
LSTM_UNITS = {"ancestor": 512, "mlp": 128}


def supports(config: Config) -> bool:
    """Whether there is a plain net for this configuration."""
    spec = env_spec(config)
    return (
        config.net in NETS
        and isinstance(spec.observation, ArraySpec)
        and not spec.observation.num_tokens
        and not isinstance(spec.actions, Box)
    )


class PlainNet(nn.Module):
    """Body, LSTM cell and heads of stock modules; rows [T, N, ...] as ours take them."""

    def __init__(self, config: Config, spec: EnvSpec) -> None:
        super().__init__()
        shape = cast(ArraySpec, spec.observation)
        self.is_image = len(shape.shape) == 3 and config.net != "mlp"
        self.is_bytes = shape.dtype == "uint8" and self.is_image
        self.channels_first = self.is_image and image_layout(shape)[3]
        self.sizes = _sizes(spec.actions)
        self.body, features = make_body(config.net, shape)
        self.units = LSTM_UNITS.get(config.net, 256) if config.use_lstm else 0
        self.core: nn.LSTMCell | None = None
        if self.units:
            self.core = nn.LSTMCell(features + 1 + sum(self.sizes), self.units)
        self.policy = nn.Linear(self.units or features, sum(self.sizes))
        self.baseline = nn.Linear(self.units or features, 1)

    def forward(
        self, observation: Tensor, reward: Tensor, last_action: Tensor, first: Tensor,
        core_state: Any,
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        steps, rows = reward.shape
        x = observation.flatten(0, 1).float()
        if self.is_bytes:
            x = x / 255
        if self.is_image and not self.channels_first:
            x = x.permute(0, 3, 1, 2)
        x = self.body(x).view(steps, rows, -1)
        if self.core is not None:
            actions = last_action.view(steps, rows, len(self.sizes)).unbind(-1)
            parts = zip(actions, self.sizes, strict=True)
            hot = [F.one_hot(action, size).float() for action, size in parts]
            x = torch.cat([x, reward.clamp(-1, 1).unsqueeze(-1), *hot], dim=-1)
            outputs = []
            for t in range(steps):
                keep = (~first[t]).float().unsqueeze(-1)
                core_state = self.core(x[t], tuple(keep * state for state in core_state))
                outputs.append(core_state[0])
            x = torch.stack(outputs)
        return self.policy(x), self.baseline(x).squeeze(-1), core_state


class Residual(nn.Module):
    """relu, conv, relu, conv, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.conv2(F.relu(self.conv1(F.relu(x)))))


def make_body(net: str, shape: ArraySpec) -> tuple[nn.Module, int]:
    """Layers for one observation, and how many features they make."""
    if net == "mlp" or len(shape.shape) != 3:
        size = math.prod(shape.shape)
        layers = [nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(*layers), 128
    channels, height, width, _ = image_layout(shape)
    layers = []
    if net == "deep":
        for depth in (16, 32, 32):
            layers += [nn.Conv2d(channels, depth, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
            layers += [Residual(depth), Residual(depth)]
            channels, height, width = depth, math.ceil(height / 2), math.ceil(width / 2)
        layers.append(nn.ReLU())
    else:
        convs = [(16, 8, 4), (32, 4, 2)]
        if net == "ancestor":
            convs = [(32, 8, 4), (64, 4, 2), (128, 3, 2)]
        for depth, kernel, stride in convs:
            padding = _padding(height, kernel, stride), _padding(width, kernel, stride)
            layers += [nn.Conv2d(channels, depth, kernel, stride, padding), nn.ReLU()]
            channels, height, width = depth, math.ceil(height / stride), math.ceil(width / stride)
    features = 512 if net == "ancestor" else 256
    layers += [nn.Flatten(), nn.Linear(channels * height * width, features), nn.ReLU()]
    return nn.Sequential(*layers), features


def _padding(size: int, kernel: int, stride: int) -> int:
    """Least padding on both sides with which the output's size is ceil(size / stride)."""
    return math.ceil(max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) / 2)


def _sizes(actions: ActionSpace) -> tuple[int, ...]:
    assert not isinstance(actions, Box)
    return (actions.num_actions,) if isinstance(actions, Discrete) else actions.sizes


def make_plain_net(config: Config) -> PlainNet:
    """The plain net; AssertionError unless it has as many parameters as ours.

    Torch's LSTM cell has two biases that are added up, ours one.
    """
    spec = env_spec(config)
    net = PlainNet(config, spec)
    ours = make_net(config.net, spec, config.use_lstm, config.seed)
    count, wanted = (sum(p.numel() for p in n.parameters()) for n in (net, ours))
    assert count - 4 * net.units == wanted, f"{count} parameters, asyncagent's net has {wanted}"
    return net


def categoricals(logits: Tensor, sizes: tuple[int, ...]) -> list[Any]:
    """A distribution for each choice of an action."""
    return [Categorical(logits=part) for part in torch.split(logits, list(sizes), dim=-1)]


class PlainInference:
    """Forward pass and sampling on batches of ``rows`` random observations."""

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        del index
        spec = env_spec(config)
        self._net = _Net(config, resolve_devices(config)[1])
        state = self._net.initial_state(parameters["rows"])
        self._batches = [
            random_unroll(1, parameters["rows"], spec, state, seed) for seed in range(RING)
        ]

    def run(self, going: Going) -> None:
        """See ``components.Component``."""
        for unroll in itertools.cycle(self._batches):
            first_row = map_nest(lambda leaf: leaf[:1], unroll._replace(core_state=()))
            action, _, _ = self._act(first_row._replace(core_state=unroll.core_state))
            if not going(action.shape[1]):
                return

    @torch.no_grad()
    def _act(self, unroll: Unroll) -> tuple[Any, Any, Any]:
        logits, _, state = self._net(unroll)
        parts = categoricals(logits, self._net.net.sizes)
        action = torch.stack([part.sample() for part in parts], dim=-1)
        answer: tuple[Any, Any, Any] = map_nest(_to_numpy, (action, logits, state))
        return answer

    def close(self) -> None:
        """Nothing to let go of."""


class PlainLearner:
    """A whole batch at once: forward, V-trace, backward, RMSProp, weights to the acting net."""

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        del parameters, index
        spec = env_spec(config)
        self._config = config
        device, acting = resolve_devices(config)
        self._net, self._acting = _Net(config, device), make_plain_net(config)
        self._acting.to(acting)
        state = self._net.initial_state(config.batch_size)
        self._batches = [
            random_unroll(config.unroll_length, config.batch_size, spec, state, seed)
            for seed in range(RING)
        ]
        self._optimizer = torch.optim.RMSprop(
            self._net.net.parameters(), lr=config.learning_rate, alpha=config.decay,
            eps=config.epsilon, momentum=config.momentum,
        )  # fmt: skip

    def run(self, going: Going) -> None:
        """See ``components.Component``."""
        for batch in itertools.cycle(self._batches):
            self._update(batch)
            if not going(batch.valid.size):
                return

    def _update(self, batch: Unroll) -> None:
        config, net = self._config, self._net.net
        logits, values, _ = self._net(batch)
        fields = (batch.action, batch.behaviour_logits, batch.reward[1:].clip(-1, 1))
        action, behaviour, rewards = map_nest(self._net.to_device, fields)
        ends = self._net.to_device(batch.terminated | batch.truncated)
        action = action.view(*rewards.shape, len(net.sizes)).unbind(-1)
        targets = categoricals(logits[:-1], net.sizes)
        behaviours = categoricals(behaviour, net.sizes)
        log_probs: Tensor
        log_probs = sum(p.log_prob(a) for p, a in zip(targets, action, strict=True))
        with torch.no_grad():
            acted = sum(p.log_prob(a) for p, a in zip(behaviours, action, strict=True))
            discounts = config.discounting * (~ends[1:]).float()
            vs, advantages = plain_vtrace(log_probs - acted, discounts, rewards, values)
        policy_loss = -(log_probs * advantages).sum()
        baseline_loss = 0.5 * (vs - values[:-1]).square().sum()
        entropy_loss: Tensor = -sum(part.entropy().sum() for part in targets)
        loss = policy_loss + config.baseline_cost * baseline_loss
        loss = loss + config.entropy_cost * entropy_loss
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)
        self._optimizer.step()
        self._acting.load_state_dict(net.state_dict())
        loss.item()

    def close(self) -> None:
        """Nothing to let go of."""


def plain_vtrace(
    log_rhos: Tensor, discounts: Tensor, rewards: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """vs and advantages [T, B] of arXiv 1802.01561, remark 1, all thresholds 1.

    Args:
      log_rhos, discounts, rewards: [T, B].
      values: [T+1, B].
    """
    weights = log_rhos.exp().clamp(max=1)
    deltas = weights * (rewards + discounts * values[1:] - values[:-1])
    behind = torch.zeros_like(values[0])
    differences = []
    for t in reversed(range(len(rewards))):
        behind = deltas[t] + discounts[t] * weights[t] * behind
        differences.append(behind)
    vs = values[:-1] + torch.stack(differences[::-1])
    next_vs = torch.cat([vs[1:], values[-1:]])
    return vs, weights * (rewards + discounts * next_vs - values[:-1])


class _Net:
    """A plain net on its device, asked with numpy arrays, under autocast."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self._dtype = precision_of(config)
        self.net = make_plain_net(config).to(device)

    def initial_state(self, rows: int) -> Any:
        units = self.net.units
        return (np.zeros((rows, units), np.float32),) * 2 if units else ()

    def to_device(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def __call__(self, unroll: Unroll) -> tuple[Tensor, Tensor, Any]:
        """float32 logits [T, N, A] and values [T, N], and the state."""
        fields = (unroll.observation, unroll.reward, unroll.last_action, unroll.first)
        inputs = map_nest(self.to_device, fields)
        state = map_nest(self.to_device, unroll.core_state)
        with torch.autocast(self.device.type, self._dtype, self._dtype != torch.float32):
            logits, values, state = self.net(*inputs, state)
        return logits.float(), values.float(), state


def _to_numpy(tensor: Tensor) -> Any:
    return tensor.cpu().numpy() if tensor.dtype == torch.int64 else tensor.float().cpu().numpy()


class PlainPool:
    """An engine that steps ``group_size`` environments at once, and nothing around it."""

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        levels = levels_of(config.level_name)
        self._size = parameters["group_size"]
        seeds = env_seeds(config.seed, index * self._size, self._size)
        self._step = _bare_step(config, levels[index % len(levels)], seeds)
        actions = env_spec(config).actions
        self._actions = random_actions(actions, (64, self._size), np.random.default_rng(index))

    def run(self, going: Going) -> None:
        """See ``components.Component``."""
        for action in itertools.cycle(self._actions):
            self._step(action)
            if not going(self._size):
                return

    def close(self) -> None:
        """The pool goes with the object."""


def _bare_step(config: Config, level: str, seeds: list[int]) -> Callable[[Any], Any]:
    if level == "memory":
        engine = toy.MemoryEngine(seeds)
        engine.reset()
        return engine.step
    options: dict[str, Any] = {}
    rules = atari.PROTOCOLS[config.atari_protocol]
    if family_of(level) == "atari" and config.atari_backend == "ale":
        from ale_py.vector_env import AtariVectorEnv

        ale: Any = AtariVectorEnv(
            atari.game_of(level), len(seeds), num_threads=1, frameskip=config.num_action_repeats,
            repeat_action_probability=rules.sticky, noop_max=rules.max_noops + 1,
            full_action_space=rules.full_action_space, use_fire_reset=False, episodic_life=False,
            reward_clipping=False, max_num_frames_per_episode=atari.MAX_FRAMES,
        )  # fmt: skip
        ale.reset(seed=np.array(seeds, np.int64))
        return cast(Callable[[Any], Any], ale.step)
    import envpool

    task = {"cartpole": "CartPole-v1", "catch": "Catch-v0"}.get(level)
    if task is None:
        task = "".join(map(str.capitalize, atari.game_of(level).split("_"))) + "-v5"
        options = {
            "frame_skip": config.num_action_repeats,
            "repeat_action_probability": rules.sticky,
            "noop_max": max(1, rules.max_noops),
            "full_action_space": rules.full_action_space,
            "use_fire_reset": False,
            "episodic_life": False,
            "reward_clip": False,
            "max_episode_steps": 2**30,
        }
    pool: Any = envpool.make_gymnasium(
        task, num_envs=len(seeds), env_seed=seeds, num_threads=1, **options
    )
    pool.reset()
    return cast(Callable[[Any], Any], pool.step)


class PlainEnvs:
    """``group_size`` single environments in turn, in this process, without a worker around them."""

    def __init__(self, config: Config, parameters: Parameters, index: int) -> None:
        levels = levels_of(config.level_name)
        level, size = levels[index % len(levels)], parameters["group_size"]
        make = find_maker(_recipe(config, level))
        self._envs: list[Env] = []
        for seed in env_seeds(config.seed, index * size, size):
            self._envs.append(make(seed=seed))
        actions = env_spec(config).actions
        self._actions = random_actions(actions, (64,), np.random.default_rng(index))

    def run(self, going: Going) -> None:
        """See ``components.Component``."""
        for env in self._envs:
            env.reset()
        for action in itertools.cycle(self._actions):
            for env in self._envs:
                outcome = env.step(action)
                if outcome.terminated or outcome.truncated:
                    env.reset()
            if not going(len(self._envs)):
                return

    def close(self) -> None:
        """Let the engines go."""
        for env in self._envs:
            env.close()


def _recipe(config: Config, level: str) -> Any:
    family = family_of(level)
    if family == "dmlab":
        return dmlab.recipe(level, config, test=False)
    return (doom if family == "doom" else gym).recipe(level, config.num_action_repeats)


def plain_env(config: Config, parameters: Parameters, index: int) -> Component:
    """The bare environments of the level's family."""
    in_pool = family_of(levels_of(config.level_name)[0]) in ("atari", "toy")
    return (PlainPool if in_pool else PlainEnvs)(config, parameters, index)


COMPONENTS: dict[str, Callable[[Config, Parameters, int], Component]] = {
    "env": plain_env,
    "inference": PlainInference,
    "learner": PlainLearner,
}
