"""The policy that acts: published weights with their version, and the inference step."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from asyncagent.distributions import mode, sample
from asyncagent.errors import UsageError
from asyncagent.structs import ActionSpace, Nest, PolicyStep, map_nest


class Snapshot(NamedTuple):
    """Weights that nobody writes to again, and how many updates made them."""

    version: int
    parameters: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]
    ready: torch.cuda.Event | None
    """On CUDA: recorded when the copy was complete."""


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is a device. UsageError for what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"device={name!r} must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"device={name!r} is not there: torch sees {count} CUDA devices")
    return device


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
    """Measure a convolution such as the networks use in both precisions (some 50 ms)."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(32, 16, 42, 42, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.zeros(32, 16, 3, 3, dtype=dtype)
        times = []
        with torch.inference_mode():
            for _ in range(5):
                start = time.perf_counter()
                torch.nn.functional.conv2d(x, weight)
                times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return best[torch.bfloat16] < best[torch.float32]


class Policy:
    """Acts with the newest published weights, on a copy of the net in evaluation mode.

    ``publish`` may be called from any thread; ``infer`` belongs to one thread, which takes new
    weights between batches only: no batch ever sees torn weights.
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
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._loaded: Snapshot | None = None
        self._current: Snapshot
        self.publish(0, net)

    @property
    def version(self) -> int:
        """Number of updates in the newest published weights."""
        return self._current.version

    def initial_state(self, num_rows: int) -> Nest:
        """Core state before the first row: nest of float32 numpy arrays [num_rows, ...]."""
        state = self._net.initial_state(num_rows)  # type: ignore[operator]
        return map_nest(_to_numpy, state)

    def publish(self, version: int, net: nn.Module) -> None:
        """Copy the weights of ``net`` and let the next batch act with them."""
        with torch.no_grad():
            parameters = tuple(
                parameter.detach().to(self.device, dtype, copy=True)
                for parameter, dtype in zip(net.parameters(), self._dtypes, strict=True)
            )
            buffers = tuple(buffer.to(self.device, copy=True) for buffer in net.buffers())
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self.device))
        self._current = Snapshot(version, parameters, buffers, ready)

    def infer(
        self, observation: Nest, reward: np.ndarray, last_action: np.ndarray, first: np.ndarray,
        core_state: Nest,
    ) -> PolicyStep:  # fmt: skip
        """Choose an action for every row; rows [N, ...] as in EnvStep, core_state [N, ...]."""
        if not self._threads_set:
            # torch keeps the operator thread count per calling thread.
            torch.set_num_threads(self._num_threads)
            self._threads_set = True
        snapshot = self._load()
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            inputs = map_nest(self._to_device, (observation, reward, last_action, first))
            rows = map_nest(lambda leaf: leaf.unsqueeze(0), inputs)
            state = map_nest(self._to_device, core_state)
            with torch.autocast(
                self.device.type, self._dtype, enabled=self._dtype != torch.float32
            ):
                logits, _, state = self._net(*rows, state)
            logits = logits.squeeze(0).float()
            if self._random_actions:
                logits = torch.zeros_like(logits)
            action = self._choose(logits)
            logits, action, state = map_nest(_to_numpy, (logits, action, state))
        version = np.full(len(action), snapshot.version, np.int64)
        return PolicyStep(action, logits, state, version)

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
        snapshot = self._current
        if snapshot is not self._loaded:
            if snapshot.ready is not None and self._stream is not None:
                self._stream.wait_event(snapshot.ready)
            for parameter, value in zip(self._net.parameters(), snapshot.parameters, strict=True):
                parameter.data = value
            for buffer, value in zip(self._net.buffers(), snapshot.buffers, strict=True):
                buffer.data = value
            self._loaded = snapshot
        return snapshot

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._stream is None else tensor.to(self.device, non_blocking=True)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """On the host, with floats in float32: a user's net may answer in bfloat16."""
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    array: np.ndarray = tensor.cpu().numpy()
    return array
