#!/usr/bin/env python3
"""Sample Factory's side of ``bench_peers.py``: one timed training run, in its own environment.

    python scripts/peers/sample_factory_side.py --out=result.json --level=atari_breakout ...

Runs with the Python of the environment that ``bench_peers.py`` makes; nothing of asyncagent is
imported.  Sample Factory's own environments, wrappers, samplers and PPO loss (one epoch) run as
released; only the net is replaced, by one of the same layers as asyncagent's.  Sampling is
asynchronous and double-buffered, its defaults (all in one process was 30% slower).  The nets:

- ``shallow``: conv 8x8/4 16, conv 4x4/2 32, linear 256, heads;
- ``ancestor``: conv 8x8/4 32, 4x4/2 64, 3x3/2 128, linear 512, LSTM 512, heads.

asyncagent's LSTM also reads the last reward and action, which Sample Factory does not offer to its
nets: as many zeros stand in for them, so that the matrices have the same size.  PyTorch's LSTM adds
a second bias to the first; it is frozen at zero, and not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gymnasium.spaces import Discrete
from sample_factory.algo.runners.runner import AlgoObserver  # type: ignore[import-not-found]
from sample_factory.algo.utils.context import (  # type: ignore[import-not-found]
    global_model_factory,
)
from sample_factory.algo.utils.misc import ExperimentStatus  # type: ignore[import-not-found]
from sample_factory.cfg.arguments import (  # type: ignore[import-not-found]
    parse_full_cfg,
    parse_sf_args,
)
from sample_factory.envs.env_utils import register_env  # type: ignore[import-not-found]
from sample_factory.model.actor_critic import create_actor_critic  # type: ignore[import-not-found]
from sample_factory.model.core import ModelCoreIdentity, ModelCoreRNN  # type: ignore[import-not-found]  # fmt: skip
from sample_factory.model.encoder import Encoder  # type: ignore[import-not-found]
from sample_factory.train import make_runner  # type: ignore[import-not-found]
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

CONVS = {
    "shallow": ((16, 8, 4), (32, 4, 2)),
    "ancestor": ((32, 8, 4), (64, 4, 2), (128, 3, 2)),
}
"""(filters, size, stride) of each convolution, padded as TensorFlow's "SAME"."""
FEATURES = {"shallow": 256, "ancestor": 512}


class SameNetEncoder(Encoder):  # type: ignore[misc]
    """asyncagent's body of ``cfg.same_net``, scripted as Sample Factory scripts its own."""

    def __init__(self, cfg: Any, obs_space: Any) -> None:
        super().__init__(cfg)
        channels, height, width = obs_space["obs"].shape
        layers: list[nn.Module] = []
        for filters, size, stride in CONVS[cfg.same_net]:
            pads: list[int] = []
            for length in (width, height):
                total = max((math.ceil(length / stride) - 1) * stride + size - length, 0)
                pads += [total // 2, total - total // 2]
            left, right, top, bottom = pads
            padding = (top, left)
            if (top, left) != (bottom, right):
                layers.append(nn.ZeroPad2d((left, right, top, bottom)))
                padding = (0, 0)
            layers += [nn.Conv2d(channels, filters, size, stride, padding), nn.ReLU()]
            channels = filters
            height, width = math.ceil(height / stride), math.ceil(width / stride)
        features = FEATURES[cfg.same_net]
        layers += [nn.Flatten(), nn.Linear(channels * height * width, features), nn.ReLU()]
        self.layers = torch.jit.script(nn.Sequential(*layers))
        self.features = features

    def forward(self, obs_dict: Any) -> Any:
        return self.layers(obs_dict["obs"])

    def get_out_size(self) -> int:
        return self.features


class SameLstm(ModelCoreRNN):  # type: ignore[misc]
    """An LSTM as large as asyncagent's (see the module's docstring)."""

    def __init__(self, cfg: Any, input_size: int) -> None:
        super().__init__(cfg, input_size + cfg.same_extras)
        self.extras = cfg.same_extras
        self.core.bias_hh_l0.requires_grad = False
        nn.init.zeros_(self.core.bias_hh_l0)

    def forward(self, head_output: Any, rnn_states: Tensor) -> Any:
        if isinstance(head_output, PackedSequence):
            wider = nn.functional.pad(head_output.data, (0, self.extras))
            head_output = head_output._replace(data=wider)
        else:
            head_output = nn.functional.pad(head_output, (0, self.extras))
        return super().forward(head_output, rnn_states)


def make_core(cfg: Any, input_size: int) -> nn.Module:
    """The LSTM, or nothing."""
    kind = SameLstm if cfg.use_rnn else ModelCoreIdentity
    core: nn.Module = kind(cfg, input_size)
    return core


def make_atari(name: str, cfg: Any, env_config: Any, render_mode: str | None = None) -> Any:
    """Sample Factory's Atari environment."""
    import gymnasium
    from ale_py.registration import register_v0_v4_envs

    # Importing this release of ale_py registers nothing with the gymnasium that is needed here.
    if not any(known.startswith("Breakout") for known in gymnasium.registry):
        register_v0_v4_envs()  # type: ignore[no-untyped-call,unused-ignore]
    from sf_examples.atari.atari_utils import make_atari_env  # type: ignore[import-not-found]

    return make_atari_env(name, cfg, env_config, render_mode)


def make_doom(name: str, cfg: Any, env_config: Any, render_mode: str | None = None) -> Any:
    """Sample Factory's ViZDoom environment, on asyncagent's scenario: it ships without maps."""
    from sf_examples.vizdoom.doom.doom_utils import (  # type: ignore[import-not-found]
        DoomSpec,
        make_doom_env_impl,
    )

    spec = DoomSpec(name, cfg.doom_cfg, Discrete(cfg.doom_actions), 1.0, cfg.doom_timeout)
    return make_doom_env_impl(spec, cfg=cfg, env_config=env_config, render_mode=render_mode)


class Stopwatch(AlgoObserver):  # type: ignore[misc]
    """Takes the time between two of the learner's steps; ends the run after the second."""

    def __init__(self, warmup_s: float, seconds: float) -> None:
        self.frames_per_s = math.nan
        self.lag = math.nan
        self._warmup_s = warmup_s
        self._seconds = seconds
        self._first_s = math.nan
        self._start: tuple[float, int] | None = None

    def on_training_step(self, runner: Any, training_iteration_since_resume: int) -> None:
        now_s, frames = time.monotonic(), runner.env_steps.get(0, 0)
        if math.isnan(self._first_s):
            self._first_s = now_s
        elif self._start is None and now_s >= self._first_s + self._warmup_s:
            self._start = now_s, frames
        elif self._start is not None and now_s >= self._start[0] + self._seconds:
            self.frames_per_s = (frames - self._start[1]) / (now_s - self._start[0])
            self.lag = float(runner.policy_lag[0].get("version_diff_avg", math.nan))
            runner.cfg.train_for_seconds = -1


def configuration(flags: argparse.Namespace) -> Any:
    """Sample Factory's own, resolved."""
    net = ["--use_rnn=False"]
    if flags.use_lstm:
        net = ["--use_rnn=True", "--rnn_type=lstm", f"--rnn_size={FEATURES[flags.net]}"]
    argv = [
        *("--algo=APPO", f"--env={flags.level}", "--experiment=peer", "--device=cpu"),
        *(f"--train_dir={flags.folder}", "--restart_behavior=overwrite"),
        *("--num_policies=1", f"--num_workers={flags.workers}"),
        *(f"--num_envs_per_worker={flags.envs}", "--worker_num_splits=2"),
        *(f"--batch_size={flags.batch_rows}", f"--rollout={flags.unroll_length}"),
        *("--num_epochs=1", "--num_batches_per_epoch=1", "--with_vtrace=False"),
        *("--serial_mode=False", "--async_rl=True", "--set_workers_cpu_affinity=True"),
        *("--normalize_input=False", "--normalize_returns=False", "--obs_scale=255"),
        *("--env_frameskip=4", "--env_framestack=4", "--nonlinearity=relu", "--gamma=0.99"),
        *("--save_every_sec=100000", "--save_best_after=1000000000"),
        *net,
    ]
    parser, _ = parse_sf_args(argv)
    if flags.doom_cfg:
        from sf_examples.vizdoom.doom.doom_params import (  # type: ignore[import-not-found]
            add_doom_env_args,
        )

        add_doom_env_args(parser)
    for name in ("doom_cfg", "doom_actions", "doom_timeout"):
        parser.add_argument(f"--{name}", default=getattr(flags, name))
    parser.add_argument("--same_net", default=flags.net)
    parser.add_argument("--same_extras", default=flags.extras)
    return parse_full_cfg(parser, argv)


def count_parameters(cfg: Any, env_info: Any) -> int:
    """Trained parameters of the net that Sample Factory makes."""
    net = create_actor_critic(cfg, env_info.obs_space, env_info.action_space)
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of the figures, JSON")
    parser.add_argument("--folder", required=True, help="Sample Factory's train_dir")
    parser.add_argument("--level", required=True)
    parser.add_argument("--net", choices=CONVS, required=True)
    parser.add_argument("--use_lstm", action="store_true")
    parser.add_argument("--extras", type=int, default=0, help="zeros beside the LSTM's features")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--envs", type=int, required=True, help="per worker")
    parser.add_argument("--batch_rows", type=int, required=True)
    parser.add_argument("--unroll_length", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup_s", type=float, required=True)
    parser.add_argument("--doom_cfg", default="")
    parser.add_argument("--doom_actions", type=int, default=0)
    parser.add_argument("--doom_timeout", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Train, write the figures."""
    flags = parse()
    register_env(flags.level, make_doom if flags.doom_cfg else make_atari)
    global_model_factory().register_encoder_factory(SameNetEncoder)
    global_model_factory().register_model_core_factory(make_core)
    cfg, runner = make_runner(configuration(flags))
    stopwatch = Stopwatch(flags.warmup_s, flags.seconds)
    runner.register_observer(stopwatch)
    status = runner.init()
    if status == ExperimentStatus.SUCCESS:
        parameters = count_parameters(cfg, runner.env_info)
        status = runner.run()
    if status != ExperimentStatus.SUCCESS or math.isnan(stopwatch.frames_per_s):
        return 1
    result = {
        "frames_per_s": round(stopwatch.frames_per_s),
        "policy_lag_mean": round(stopwatch.lag, 2),
        "parameters": parameters,
        "precision": "float32",
    }
    flags.out.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
