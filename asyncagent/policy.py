"""The policy that acts: published weights with their version, and the inference step."""

from __future__ import annotations

import copy
import math
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asyncagent.config import Config
from asyncagent.cuda import Graphs, Lane, Mark, copy_all, is_reached, mark
from asyncagent.cuda_acting import PaddedBatches
from asyncagent.distributions import mode, sample
from asyncagent.errors import UsageError
from asyncagent.structs import ActionSpace, Nest, PolicyStep, map_nest
from asyncagent.tracks import Track


class Snapshot(NamedTuple):
    """Weights that nobody writes to again, and how many updates made them."""

    version: int
    parameters: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]
    ready: Mark
    """Reached when the copy is complete."""


def resolve_device(name: str, flag: str = "device") -> torch.device:
    """``auto`` is CUDA where there is a device. UsageError, naming ``flag``, for what is not there.

    A CUDA device comes with its index.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{flag}={name!r} must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"{flag}={name!r} must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"{flag}={name!r} is not there: torch sees {count} CUDA devices")
    return torch.device("cuda", device.index or 0)


def resolve_devices(config: Config) -> tuple[torch.device, torch.device]:
    """(learner_device, inference_device).

    A device left at ``auto`` is what ``device`` says; where that is ``auto`` too, two CUDA devices
    take one each, and one takes both.
    """
    learner, inference = config.learner_device, config.inference_device
    if learner == inference == config.device == "auto" and torch.cuda.device_count() > 1:
        learner, inference = "cuda:0", "cuda:1"
    return (
        _own_or_common("learner_device", learner, config.device),
        _own_or_common("inference_device", inference, config.device),
    )


def _own_or_common(flag: str, name: str, common: str) -> torch.device:
    return resolve_device(common) if name == "auto" else resolve_device(name, flag)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products; ``auto`` takes the faster one."""
    if name == "float32":
        return torch.float32
    if name == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _bfloat16_is_faster()
    return torch.bfloat16 if fast else torch.float32


def _bfloat16_is_faster() -> bool:
    """Measure a convolution such as the networks use in both precisions, in turn, on one thread.

    The best time of each counts, so that other work on the machine does not decide (some 50 ms).
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    x = torch.zeros(32, 16, 42, 42).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(32, 16, 3, 3)
    inputs = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in best}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for dtype in 10 * tuple(best):
                start = time.perf_counter()
                torch.nn.functional.conv2d(*inputs[dtype])
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] < best[torch.float32]


class Policy:
    """Acts with the newest published weights, on a copy of the net in evaluation mode.

    ``publish`` may be called from any thread, one at a time; ``infer`` belongs to one thread, which
    takes new weights between batches only: no batch ever sees torn weights.  On CUDA these are the
    newest whose copy is complete; inference never waits for an update.
    """

    def __init__(
        self, net: nn.Module, actions: ActionSpace, device: torch.device, dtype: torch.dtype,
        seed: int, num_threads: int = 1, greedy: bool = False, random_actions: bool = False,
    ) -> None:  # fmt: skip
        """``net`` is copied; ``seed`` drives action sampling; ``greedy`` takes the likeliest.

        With ``random_actions`` the net is asked, and acted at random whatever it says.
        """
        self._net = copy.deepcopy(net).to(device).eval().requires_grad_(False)
        self.device = device
        self._actions = actions
        self._dtype = dtype
        self._num_threads = num_threads
        self._greedy = greedy
        self._random_actions = random_actions
        self._generator = torch.Generator(device).manual_seed(seed)
        self._generator_lock = threading.Lock()
        self._threads_set = False
        low: set[str] = getattr(net, "low_precision_parameters", set)()
        self._dtypes = [
            dtype if name in low else parameter.dtype for name, parameter in net.named_parameters()
        ]
        self._loaded: Snapshot | None = None
        self._published: tuple[Snapshot, ...] = ()
        self._padded: PaddedBatches | None = None
        self.track = Track(3)
        """What the thread that infers does."""
        self._lane = Lane(device)
        if device.type == "cuda":
            # Graphs need weights that stay in their place.
            for parameter, low_dtype in zip(self._net.parameters(), self._dtypes, strict=True):
                parameter.data = parameter.data.to(low_dtype)
            graphs = Graphs("inference", self._lane)
            self._padded = PaddedBatches(self._forward, self._choose, actions, graphs, self.track)
        self.publish(0, net)

    @property
    def version(self) -> int:
        """Number of updates in the newest published weights."""
        return self._published[-1].version

    def snapshot(self) -> Snapshot:
        """The newest published weights; any thread."""
        return self._published[-1]

    def initial_state(self, num_rows: int) -> Nest:
        """Core state before the first row: nest of float32 numpy arrays [num_rows, ...]."""
        state = self._net.initial_state(num_rows)  # type: ignore[operator]
        return map_nest(_to_numpy, state)

    def publish(self, version: int, net: nn.Module) -> None:
        """Copy the weights of ``net`` and let the next batch act with them."""
        parameters = [parameter.detach() for parameter in net.parameters()]
        copies = [
            torch.empty_like(parameter, dtype=dtype, device=self.device)
            for parameter, dtype in zip(parameters, self._dtypes, strict=True)
        ]
        buffers = [torch.empty_like(buffer, device=self.device) for buffer in net.buffers()]
        copy_all((*copies, *buffers), (*parameters, *net.buffers()))
        ready = None
        if self.device.type == "cuda":
            ready = mark(torch.cuda.current_stream(self.device))
        new = Snapshot(version, tuple(copies), tuple(buffers), ready)
        self._published = _newest_reached((*self._published, new))

    def infer(
        self, observation: Nest, reward: np.ndarray, last_action: np.ndarray, first: np.ndarray,
        core_state: Nest,
    ) -> PolicyStep:  # fmt: skip
        """Choose an action for every row; rows [N, ...] as in EnvStep, core_state [N, ...]."""
        if not self._threads_set:
            # torch keeps the operator thread count per calling thread.
            torch.set_num_threads(self._num_threads)
            self._threads_set = True
        if self._padded is not None:
            return self._infer_padded(observation, reward, last_action, first, core_state)
        snapshot = self._load()
        with torch.inference_mode():
            inputs = map_nest(
                torch.from_numpy, (observation, reward, last_action, first, core_state)
            )
            logits, state = self._forward(*inputs)
            action = self._choose(logits)
            logits, action, state = map_nest(_to_numpy, (logits, action, state))
        version = np.full(len(action), snapshot.version, np.int64)
        return PolicyStep(action, logits, state, version)

    def _infer_padded(self, *inputs: Nest) -> PolicyStep:
        assert self._padded is not None
        num_rows = len(inputs[1])
        # In inference mode, operators that only CUDA spares from reading back look alike.
        with torch.no_grad(), self._lane.use():
            snapshot = self._load()
            action, logits, state = self._padded(inputs, num_rows)
        return PolicyStep(action, logits, state, np.full(num_rows, snapshot.version, np.int64))

    def _forward(
        self, observation: Nest, reward: Tensor, last_action: Tensor, first: Tensor,
        core_state: Nest,
    ) -> tuple[Tensor, Nest]:  # fmt: skip
        """Logits float32 [N, A] and core state of tensors [N, ...]."""
        rows = map_nest(lambda leaf: leaf.unsqueeze(0), (observation, reward, last_action, first))
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits, _, state = self._net(*rows, core_state)
        logits = logits.squeeze(0).float()
        return torch.zeros_like(logits) if self._random_actions else logits, state

    def generator_state(self) -> Tensor:
        """State of the action sampler, uint8; any thread."""
        with self._generator_lock:
            return self._generator.get_state()

    def set_generator_state(self, state: Tensor) -> None:
        """Continue sampling where ``generator_state`` was taken; any thread."""
        with self._generator_lock:
            self._generator.set_state(state)

    def _choose(self, logits: Tensor) -> Tensor:
        if self._greedy:
            return mode(self._actions, logits)
        with self._generator_lock:
            return sample(self._actions, logits, self._generator)

    def _load(self) -> Snapshot:
        snapshot = _newest_reached(self._published)[0]
        if snapshot is not self._loaded:
            targets = (*self._net.parameters(), *self._net.buffers())
            values = (*snapshot.parameters, *snapshot.buffers)
            if self._padded is None:
                for target, value in zip(targets, values, strict=True):
                    target.data = value
            else:
                self._lane.after(snapshot.ready)
                copy_all(targets, values)
            # Kept until the next is loaded, when this copy, as the batch it was for, is done.
            self._loaded = snapshot
        return snapshot


def _newest_reached(snapshots: tuple[Snapshot, ...]) -> tuple[Snapshot, ...]:
    """Without those that are older than the newest whose copy is complete; never none."""
    for index in reversed(range(len(snapshots))):
        if is_reached(snapshots[index].ready):
            return snapshots[index:]
    return snapshots


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """On the host, with floats in float32: a user's net may answer in bfloat16."""
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    array: np.ndarray = tensor.cpu().numpy()
    return array
