"""TensorFlow's RMSProp against scalar arithmetic; clipping; the learning-rate schedule."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncagent.config import Config
from asyncagent.optim import (
    RMSPropTF,
    clip_grad_norm,
    linear_learning_rate,
    make_optimizer,
)

GRADIENTS = [0.5, -2.0, 0.0, 3.0, -0.01, 1.0]


def parameter(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def step_with(optimizer: torch.optim.Optimizer, p: Tensor, gradient: float | Tensor) -> None:
    p.grad = torch.zeros_like(p) + gradient
    optimizer.step()


def tensorflow_rmsprop(
    p: float, gradients: list[float], rates: list[float], decay: float, mu: float, epsilon: float
) -> list[float]:
    """The parameter after each step, in Python's own floats."""
    ms, mom, path = 1.0, 0.0, []
    for g, lr in zip(gradients, rates, strict=True):
        ms = decay * ms + (1 - decay) * g * g
        mom = mu * mom + lr * g / math.sqrt(ms + epsilon)
        p -= mom
        path.append(p)
    return path


def test_first_steps_by_hand() -> None:
    """Two steps with round numbers: ms from one, epsilon inside the root."""
    p = parameter(1.0)
    optimizer = RMSPropTF([p], lr=0.1, decay=0.5, momentum=0.5, epsilon=0.25)
    # ms = 0.5 * 1 + 0.5 * 4 = 2.5; mom = 0.1 * 2 / sqrt(2.75) = 0.1206045
    step_with(optimizer, p, 2.0)
    assert p.item() == pytest.approx(1.0 - 0.1206045, abs=1e-7)
    # ms = 0.5 * 2.5 + 0.5 * 1 = 1.75; mom = 0.5 * 0.1206045 - 0.1 / sqrt(2) = -0.0104084
    step_with(optimizer, p, -1.0)
    assert p.item() == pytest.approx(1.0 - 0.1206045 + 0.0104084, abs=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("decay", "epsilon"), [(0.99, 0.1), (0.9, 1e-4), (1.0, 0.01)])
def test_agrees_with_scalar_arithmetic(momentum: float, decay: float, epsilon: float) -> None:
    """Every element follows TensorFlow's recurrence, with a learning rate set at every step."""
    rates = [0.1, 0.1, 0.05, 0.2, 0.0, 0.1]
    starts = [1.0, -3.0]
    scales = [1.0, -0.3]
    p = parameter(*starts)
    optimizer = RMSPropTF([p], lr=9.0, decay=decay, momentum=momentum, epsilon=epsilon)
    paths = [
        tensorflow_rmsprop(start, [g * s for g in GRADIENTS], rates, decay, momentum, epsilon)
        for start, s in zip(starts, scales, strict=True)
    ]
    for i, (g, lr) in enumerate(zip(GRADIENTS, rates, strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        step_with(optimizer, p, g * torch.tensor(scales))
        assert p.tolist() == pytest.approx([path[i] for path in paths], rel=1e-6)


def test_epsilon_stands_inside_the_root() -> None:
    """With ms at one for both, torch's root-plus-epsilon takes another step: 1/3 against 1/2."""
    ours, theirs = parameter(0.0), parameter(0.0)
    step_with(RMSPropTF([ours], lr=1.0, decay=1.0, epsilon=3.0), ours, 1.0)
    torch_rmsprop = torch.optim.RMSprop([theirs], lr=1.0, alpha=0.0, eps=3.0)
    step_with(torch_rmsprop, theirs, 1.0)  # alpha 0: its mean square is g**2 = 1
    assert ours.item() == pytest.approx(-1 / math.sqrt(1 + 3))
    assert theirs.item() == pytest.approx(-1 / (math.sqrt(1) + 3))


def test_mean_square_starts_at_one() -> None:
    """With a negligible epsilon the first step is damped by the one; torch's is g / |g| sized."""
    ours, theirs = parameter(0.0), parameter(0.0)
    step_with(RMSPropTF([ours], lr=1.0, decay=0.99, epsilon=1e-12), ours, 0.1)
    step_with(torch.optim.RMSprop([theirs], lr=1.0, alpha=0.99, eps=1e-12), theirs, 0.1)
    assert ours.item() == pytest.approx(-0.1 / math.sqrt(0.99 + 0.01 * 0.01))
    assert theirs.item() == pytest.approx(-0.1 / math.sqrt(0.01 * 0.01))


def test_momentum_holds_the_learning_rate_of_its_time() -> None:
    """A rate of 0 stops new gradients, not the momentum gathered under the old rate."""
    p = parameter(0.0)
    optimizer = RMSPropTF([p], lr=1.0, decay=1.0, momentum=0.5, epsilon=3.0)
    step_with(optimizer, p, 1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    step_with(optimizer, p, 1.0)
    assert p.item() == pytest.approx(-0.5 - 0.25)


def network() -> torch.nn.Module:
    """Two convolutions in channels_last and a linear layer."""
    torch.manual_seed(3)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(5 * 4 * 4, 2),
    )
    for p in layers.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    return layers


def train_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = net(images.to(memory_format=torch.channels_last)).square().sum()
    loss.backward()
    optimizer.step()


FLAGS: dict[str, dict[str, Any]] = {
    "rmsprop": {"optimizer": "rmsprop", "momentum": 0.9},
    "rmsprop without momentum": {"optimizer": "rmsprop"},
    "adam": {"optimizer": "adam", "momentum": 0.9, "decay": 0.999, "epsilon": 1e-5},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_saved_and_loaded_it_goes_on_the_same(flags: dict[str, Any]) -> None:
    """State written, read back with weights_only and loaded continues bit for bit."""
    config = Config(**flags)
    net, other = network(), network()
    optimizer, restored = (make_optimizer(config, n.parameters()) for n in (net, other))
    for seed in range(3):
        train_step(net, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 1e-3

    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["net"])
    restored.load_state_dict(saved["optimizer"])

    for seed in range(3, 6):
        train_step(net, optimizer, seed)
        train_step(other, restored, seed)
    assert restored.param_groups[0]["lr"] == 1e-3
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_channels_last_changes_no_number(flags: dict[str, Any]) -> None:
    """Whatever the layout of parameter and gradient, the step is the one of contiguous tensors."""
    generator = torch.Generator().manual_seed(4)
    start, gradient = torch.randn(2, 4, 3, 5, 6, generator=generator)
    plain = start.clone().requires_grad_()
    last = start.clone().to(memory_format=torch.channels_last).requires_grad_()
    for p in (plain, last):
        optimizer = make_optimizer(Config(**flags), [p])
        for _ in range(3):
            p.grad = gradient.clone(memory_format=torch.preserve_format).to(
                memory_format=torch.channels_last if p is last else torch.contiguous_format
            )
            optimizer.step()
    torch.testing.assert_close(last, plain)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_state_keeps_the_parameters_layout() -> None:
    """mean_square and momentum_buffer are as channels_last as their parameter."""
    p = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = RMSPropTF([p], lr=0.1, momentum=0.9)
    step_with(optimizer, p, 1.0)
    assert set(optimizer.state[p]) == {"mean_square", "momentum_buffer"}
    for tensor in optimizer.state[p].values():
        assert tensor.stride() == p.stride()


def test_parameters_without_gradient_stay() -> None:
    """A parameter that took no part is neither moved nor given state."""
    p, idle = parameter(1.0), parameter(2.0)
    optimizer = RMSPropTF([p, idle], lr=0.1)
    optimizer.step()
    step_with(optimizer, p, 1.0)
    assert idle.item() == 2.0
    assert idle not in optimizer.state
    assert p.item() < 1.0


def test_step_evaluates_a_closure() -> None:
    """step(closure) computes the gradients first and returns the closure's loss."""
    p = parameter(1.0)
    optimizer = RMSPropTF([p], lr=1.0, decay=1.0, epsilon=3.0)

    def closure() -> float:
        loss = (3.0 * p).sum()
        (p.grad,) = torch.autograd.grad(loss, p)
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert p.item() == pytest.approx(1.0 - 3.0 / 2.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": -0.1}, r"lr=-0.1 must be >= 0"),
        ({"decay": 1.5}, r"decay=1.5 must be in \[0, 1\]"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"epsilon": 0.0}, r"epsilon=0.0 must be > 0"),
        ({"lr": math.nan}, r"lr=nan must be >= 0"),
    ],
)
def test_impossible_numbers_are_refused(flags: dict[str, float], message: str) -> None:
    """The error says value and bound."""
    with pytest.raises(ValueError, match=message):
        RMSPropTF([parameter(1.0)], **({"lr": 0.1} | flags))


def test_make_optimizer_takes_every_flag() -> None:
    """Flags reach the optimiser they name, Adam's under Adam's names."""
    flags: dict[str, Any] = {
        "learning_rate": 0.125,
        "decay": 0.75,
        "momentum": 0.5,
        "epsilon": 0.25,
    }
    rmsprop = make_optimizer(Config(optimizer="rmsprop", **flags), iter([parameter(1.0)]))
    assert isinstance(rmsprop, RMSPropTF)
    group = rmsprop.param_groups[0]
    assert [group[n] for n in ("lr", "decay", "momentum", "epsilon")] == [0.125, 0.75, 0.5, 0.25]

    p = parameter(1.0)
    adam = make_optimizer(Config(optimizer="adam", **flags), [p])
    # m = 0.5 g and v = 0.25 g^2, both unbiased to g and g^2: the step is lr * g / (|g| + epsilon).
    step_with(adam, p, 0.5)
    assert p.item() == pytest.approx(1.0 - 0.125 * 0.5 / (0.5 + 0.25))
    # m = 0.5 * 0.25 + 0.5 * 1, v = 0.75 * 0.0625 + 0.25 * 1, over 1 - 0.5^2 and 1 - 0.75^2.
    m, v = 0.625 / 0.75, 0.296875 / 0.4375
    step_with(adam, p, 1.0)
    expected = 1.0 - 0.125 * 0.5 / 0.75 - 0.125 * m / (math.sqrt(v) + 0.25)
    assert p.item() == pytest.approx(expected)


def with_gradients(*gradients: list[float] | None) -> list[Tensor]:
    params = []
    for gradient in gradients:
        p = torch.zeros(len(gradient or [0.0]), requires_grad=True)
        p.grad = None if gradient is None else torch.tensor(gradient)
        params.append(p)
    return params


def gradients_of(params: list[Tensor]) -> list[list[float]]:
    return [p.grad.tolist() for p in params if p.grad is not None]


def test_clip_scales_to_the_bound() -> None:
    """All gradients shrink together until their global norm is the bound; the old norm is told."""
    params = with_gradients([3.0, 0.0], None, [4.0])
    norm = clip_grad_norm(iter(params), 2.0)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(5.0)
    assert gradients_of(params) == [pytest.approx([1.2, 0.0]), pytest.approx([1.6])]


@pytest.mark.parametrize("max_norm", [0.0, 5.0, 7.0])
def test_within_the_bound_nothing_changes(max_norm: float) -> None:
    """0 and bounds that are not exceeded leave every bit; the norm is told all the same."""
    params = with_gradients([3.0, 0.0], [4.0])
    assert clip_grad_norm(params, max_norm).item() == pytest.approx(5.0)
    assert gradients_of(params) == [[3.0, 0.0], [4.0]]


def test_clip_without_gradients() -> None:
    """No gradients have norm 0."""
    assert clip_grad_norm(with_gradients(None), 40.0).item() == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clip_hides_no_broken_gradient(bad: float) -> None:
    """A gradient of nan or inf shows in the norm and stays broken."""
    params = with_gradients([bad], [1.0])
    assert not clip_grad_norm(params, 40.0).isfinite()
    assert math.isnan(gradients_of(params)[0][0])


def test_learning_rate_falls_linearly_to_zero() -> None:
    """From the initial rate at frame 0 to 0 at the total, and never below."""
    rates = [linear_learning_rate(0.5, frames, 1000) for frames in (0, 250, 500, 1000, 1001, 9999)]
    assert rates == [0.5, 0.375, 0.25, 0.0, 0.0, 0.0]
    assert linear_learning_rate(0.5, 0, 0) == 0.0
