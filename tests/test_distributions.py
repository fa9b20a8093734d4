"""Distributions over actions: joint probabilities, frequencies of samples, bounds, gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncagent.distributions import (
    LOG_STD_RANGE,
    acted_on,
    encode,
    entropy,
    log_prob,
    mode,
    num_inputs,
    sample,
)
from asyncagent.structs import ActionSpace, Box, Discrete, MultiDiscrete

TUPLE = MultiDiscrete((3, 2, 4))
SPACES = [
    pytest.param(space, id=type(space).__name__)
    for space in (Discrete(5), TUPLE, Box(3, bounded=False))
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(space: ActionSpace, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, space.num_logits, generator=generator(7))


def product_of(space: MultiDiscrete, logits: Tensor) -> tuple[Discrete, Tensor, list[Tensor]]:
    """The Discrete space of all combinations, its logits, and the combinations in its order."""
    parts = torch.split(logits, list(space.sizes), dim=-1)
    combinations = list(itertools.product(*map(range, space.sizes)))
    joint = torch.stack(
        [sum(part[..., k] for part, k in zip(parts, combination, strict=True))  # type: ignore[misc]
         for combination in combinations], dim=-1,
    )  # fmt: skip
    return Discrete(len(combinations)), joint, [torch.tensor(one) for one in combinations]


@pytest.mark.parametrize("space", SPACES)
def test_shapes_and_types(space: ActionSpace) -> None:
    """Actions are as the space says, probabilities and entropies a number per row."""
    logits = random_logits(space, 4, 6)
    for action in (sample(space, logits, generator()), mode(space, logits)):
        assert action.shape == (4, 6, *space.array.shape)
        assert str(action.dtype) == f"torch.{space.array.dtype}"
        assert log_prob(space, logits, action).shape == (4, 6)
        seen = encode(space, action)
        assert seen.shape == (4, 6, num_inputs(space))
        assert seen.dtype == torch.float32
    assert entropy(space, logits).shape == (4, 6)


def test_one_choice_of_three_is_discrete() -> None:
    """MultiDiscrete((3,)) and Discrete(3) agree to the last bit, samples of one seed included."""
    one, plain = MultiDiscrete((3,)), Discrete(3)
    logits = random_logits(plain, 50, scale=3)
    actions = sample(plain, logits, generator())
    assert torch.equal(sample(one, logits, generator()), actions[:, None])
    assert torch.equal(mode(one, logits), mode(plain, logits)[:, None])
    assert torch.equal(log_prob(one, logits, actions[:, None]), log_prob(plain, logits, actions))
    assert torch.equal(entropy(one, logits), entropy(plain, logits))
    assert torch.equal(encode(one, actions[:, None]), encode(plain, actions))


def test_several_choices_are_the_product_of_their_softmaxes() -> None:
    """Joint log-probabilities, entropy and mode are those of one choice among all combinations."""
    logits = random_logits(TUPLE, 20, scale=2).double()
    flat, joint, combinations = product_of(TUPLE, logits)
    for k, combination in enumerate(combinations):
        torch.testing.assert_close(
            log_prob(TUPLE, logits, combination.expand(20, 3)),
            log_prob(flat, joint, torch.full((20,), k)),
        )
    torch.testing.assert_close(entropy(TUPLE, logits), entropy(flat, joint))
    assert torch.equal(mode(TUPLE, logits), torch.stack(combinations)[mode(flat, joint)])


def test_gaussian_agrees_with_scipys() -> None:
    """Log-density and entropy of a Box are the sums over its dimensions of a normal's."""
    space = Box(3)
    logits = random_logits(space, 40, scale=0.5).double()
    action = torch.randn(40, 3, generator=generator(1)).double() * 2
    normal = scipy.stats.norm(logits[:, :3].numpy(), logits[:, 3:].exp().numpy())
    densities = torch.from_numpy(normal.logpdf(action.numpy()).sum(-1))
    torch.testing.assert_close(log_prob(space, logits, action), densities)
    torch.testing.assert_close(entropy(space, logits), torch.from_numpy(normal.entropy().sum(-1)))


def test_gaussians_deviation_is_bounded() -> None:
    """Beyond its bounds log_std counts as the bound, and its gradient still leads back."""
    low, high = LOG_STD_RANGE
    beyond = torch.tensor([[0.0, low - 3.0], [0.0, high + 40.0]], requires_grad=True)
    at = torch.tensor([[0.0, low], [0.0, high]], requires_grad=True)
    action = torch.tensor([[0.001], [30.0]])
    space = Box(1)
    torch.testing.assert_close(log_prob(space, beyond, action), log_prob(space, at, action))
    torch.testing.assert_close(entropy(space, beyond), entropy(space, at))
    torch.testing.assert_close(
        sample(space, beyond, generator()), sample(space, at, generator()), rtol=1e-4, atol=1e-4
    )
    gradients = [
        torch.autograd.grad((log_prob(space, x, action) + entropy(space, x)).sum(), x)[0]
        for x in (beyond, at)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0][:, 1].all()


@pytest.mark.parametrize("space", [Discrete(4), TUPLE], ids=["Discrete", "MultiDiscrete"])
def test_samples_have_the_frequencies_of_the_softmaxes(space: Discrete | MultiDiscrete) -> None:
    """Chi-square over 50,000 samples, of every choice and of all combinations together."""
    count = 50_000
    logits = random_logits(space, scale=1.5)
    actions = sample(space, logits.expand(count, -1), generator(3)).reshape(count, -1)
    sizes = space.sizes if isinstance(space, MultiDiscrete) else (space.num_actions,)
    if isinstance(space, MultiDiscrete):
        flat, joint, _ = product_of(space, logits)
        probabilities = log_prob(flat, joint.expand(flat.num_actions, -1), torch.arange(24)).exp()
    else:
        probabilities = logits.softmax(-1)
    index = torch.zeros(count, dtype=torch.int64)
    for size, choice in zip(sizes, actions.unbind(-1), strict=True):
        index = index * size + choice
    seen = torch.bincount(index, minlength=len(probabilities))
    expected = (probabilities.double() / probabilities.double().sum() * count).numpy()
    assert scipy.stats.chisquare(seen.numpy(), expected).pvalue > 1e-4


def test_gaussian_samples_are_normal() -> None:
    """50,000 samples of a Box pass for independent normals of its means and deviations."""
    space, count = Box(2), 50_000
    logits = torch.tensor([0.3, -2.0, -1.0, 0.5])
    actions = sample(space, logits.expand(count, -1), generator(3))
    for dim in range(2):
        normal = scipy.stats.norm(logits[dim].item(), logits[2 + dim].exp().item())
        assert scipy.stats.kstest(actions[:, dim].numpy(), normal.cdf).pvalue > 1e-4
    assert abs(torch.corrcoef(actions.T)[0, 1].item()) < 4 / math.sqrt(count)


@pytest.mark.parametrize("space", SPACES)
def test_entropy_is_the_mean_negative_log_probability(space: ActionSpace) -> None:
    """Over 50,000 samples, within 5 sigma: entropy, log_prob and sample speak of one thing."""
    logits = random_logits(space).expand(50_000, -1)
    surprise = -log_prob(space, logits, sample(space, logits, generator(2)))
    sigma = surprise.std() / math.sqrt(len(surprise))
    assert abs(surprise.mean() - entropy(space, logits)[0]) < 5 * sigma


def test_samples_are_those_of_gumbel_max() -> None:
    """A seed means what it always meant: exponential noise of the logits' shape, drawn at once."""
    logits = random_logits(Discrete(6), 100)
    noise = torch.empty(100, 6).exponential_(generator=generator(4))
    expected = (logits - noise.log()).argmax(-1)
    assert torch.equal(sample(Discrete(6), logits, generator(4)), expected)


def test_actions_as_a_net_sees_them() -> None:
    """One-hot; one-hots of every choice side by side; numbers cut off at -1 and 1."""
    assert encode(Discrete(3), torch.tensor([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert encode(TUPLE, torch.tensor([1, 0, 3])).tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1]
    assert encode(Box(3), torch.tensor([-7.0, 0.25, 1.5])).tolist() == [-1, 0.25, 1]


@pytest.mark.parametrize("space", SPACES)
def test_logits_acted_on_describe_the_same_distribution(space: ActionSpace) -> None:
    """A Box's deviations are within their bounds; nothing else is another number."""
    logits = random_logits(space, 100, scale=9.0)
    acted = acted_on(space, logits)
    size = space.num_dims if isinstance(space, Box) else 0
    low, high = LOG_STD_RANGE
    others = space.num_logits - size
    assert torch.equal(acted[:, :others], logits[:, :others])
    assert torch.equal(acted[:, others:], logits[:, others:].clamp(low, high))
    assert size == 0 or not torch.equal(acted, logits)
    action = sample(space, logits, generator())
    torch.testing.assert_close(log_prob(space, acted, action), log_prob(space, logits, action))
    torch.testing.assert_close(entropy(space, acted), entropy(space, logits))


@pytest.mark.parametrize("space", SPACES)
def test_logits_of_zero_are_acting_at_random(space: ActionSpace) -> None:
    """No alternative is likelier than another; a Box is standard normal."""
    logits = torch.zeros(space.num_logits)
    expected = {5: math.log(5), 9: math.log(24), 6: 1.5 * math.log(2 * math.pi * math.e)}
    assert entropy(space, logits).item() == pytest.approx(expected[space.num_logits])


def test_no_gradient_drives_a_mean_further_out_of_its_bounds() -> None:
    """A loss is lowered by moving a mean within its bounds or back to them, not away from them;
    where there are no bounds nothing is held back. Probabilities are the same in both."""
    logits = torch.tensor([[-2.0, 0.0], [-0.5, 0.0], [0.5, 0.0], [2.0, 0.0]], requires_grad=True)
    for action, held in ((5.0, [False, False, False, True]), (-5.0, [True, False, False, False])):
        actions = torch.full((4, 1), action)
        free = log_prob(Box(1, bounded=False), logits, actions)
        bounded = log_prob(Box(1), logits, actions)
        torch.testing.assert_close(bounded, free)
        (of_free,) = torch.autograd.grad(-free.sum(), logits)
        (of_bounded,) = torch.autograd.grad(-bounded.sum(), logits)
        assert (of_bounded[:, 0] == 0).tolist() == held
        kept = torch.where(torch.tensor(held), 0.0, of_free[:, 0])
        torch.testing.assert_close(of_bounded[:, 0], kept)
        torch.testing.assert_close(of_bounded[:, 1], of_free[:, 1])


@pytest.mark.parametrize("space", SPACES)
def test_gradients(space: ActionSpace) -> None:
    """Gradients of log-probability and entropy are those of finite differences."""
    logits = random_logits(space, 3).double().requires_grad_()
    action = sample(space, logits.detach(), generator())
    assert torch.autograd.gradcheck(lambda x: log_prob(space, x, action), logits)
    assert torch.autograd.gradcheck(lambda x: entropy(space, x), logits)


@pytest.mark.parametrize("space", SPACES)
def test_narrow_logits_are_widened(space: ActionSpace) -> None:
    """Logits in bfloat16 give float32 probabilities and entropies of the same numbers."""
    logits = random_logits(space, 8).bfloat16()
    action = mode(space, logits.float())
    for narrow, wide in (
        (log_prob(space, logits, action), log_prob(space, logits.float(), action)),
        (entropy(space, logits), entropy(space, logits.float())),
    ):
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, wide)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.floats(-50, 50),
    st.integers(0, 2**31 - 1),
)
def test_choices_keep_their_bounds(sizes: list[int], scale: float, seed: int) -> None:
    """Whatever the sizes and logits: actions in range, mode likeliest, 0 <= entropy <= log."""
    space = MultiDiscrete(tuple(sizes))
    logits = scale * torch.randn(16, space.num_logits, generator=generator(seed))
    drawn, likeliest = sample(space, logits, generator(seed)), mode(space, logits)
    for action in (drawn, likeliest):
        assert ((action >= 0) & (action < torch.tensor(sizes))).all()
        assert torch.equal(encode(space, action).sum(-1), torch.full((16,), float(len(sizes))))
    assert (log_prob(space, logits, drawn) <= log_prob(space, logits, likeliest) + 1e-5).all()
    nats = entropy(space, logits)
    assert (nats >= -1e-5).all()
    assert (nats <= sum(map(math.log, sizes)) + 1e-4).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.floats(-1e4, 1e4), st.floats(-1e3, 1e3), st.integers(0, 2**31 - 1))
def test_gaussians_stay_finite(num_dims: int, means: float, log_stds: float, seed: int) -> None:
    """Whatever the logits: samples, log-densities, entropies and gradients are finite."""
    space = Box(num_dims)
    logits = torch.tensor([means] * num_dims + [log_stds] * num_dims).expand(8, -1)
    logits = logits.clone().requires_grad_()
    action = sample(space, logits.detach(), generator(seed))
    density, nats = log_prob(space, logits, action), entropy(space, logits)
    (gradient,) = torch.autograd.grad((density + nats).sum(), logits)
    for numbers in (action, density, nats, gradient):
        assert numbers.isfinite().all()
    assert (density <= log_prob(space, logits, mode(space, logits)) + 1e-4).all()
