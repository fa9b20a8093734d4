"""Networks: TensorFlow's padding, recurrent resets, and the contract of users' nets."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asyncagent import config
from asyncagent.bodies import (
    AncestorBody,
    Conv2dSame,
    DeepBody,
    MlpBody,
    SentenceBody,
    ShallowBody,
    max_pool_same,
    pixel_conv,
    same_padding,
)
from asyncagent.errors import CheckpointError, UsageError
from asyncagent.lstm import LstmCore
from asyncagent.models import NETS as BUILT_IN
from asyncagent.models import ActorCritic, example_inputs, load_weights, make_net
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Box,
    Discrete,
    EnvSpec,
    MultiDiscrete,
    Nest,
    map_nest,
)

ATARI = EnvSpec(ArraySpec((4, 84, 84), "uint8"), Discrete(6), 4)
DMLAB = EnvSpec(ArraySpec((72, 96, 3), "uint8"), Discrete(9), 4)
VECTOR = EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1)
SENTENCE = ArraySpec((6,), "int32", num_tokens=50)
SENSES = EnvSpec(
    {
        "rgb": ArraySpec((24, 32, 3), "uint8"),
        "numbers": ArraySpec((5,), "float32"),
        "instruction": SENTENCE,
    },
    Discrete(4),
    4,
)
"""A picture, measurements and an instruction."""
SPACES = [Discrete(4), MultiDiscrete((3, 2)), Box(2)]


def flat_size(body: nn.Module) -> int:
    linears = [layer for layer in body.modules() if isinstance(layer, nn.Linear)]
    return linears[0].in_features


def test_flattened_sizes_are_the_ancestors() -> None:
    """deep at 72x96 flattens to 9*12*32, the ancestor's net at 84x84 to 6*6*128."""
    assert flat_size(DeepBody(ArraySpec((72, 96, 3), "uint8"))) == 9 * 12 * 32 == 3456
    assert flat_size(AncestorBody(ArraySpec((4, 84, 84), "uint8"))) == 6 * 6 * 128
    assert flat_size(ShallowBody(ArraySpec((4, 84, 84), "uint8"))) == 11 * 11 * 32


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (84, 8, 4, (2, 2)),
        (21, 4, 2, (1, 2)),
        (42, 3, 2, (0, 1)),
        (21, 3, 2, (1, 1)),
        (5, 1, 2, (0, 0)),
    ],
)
def test_same_padding(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
    """TensorFlow pads the odd row after: (0, 1) for 3x3 stride 2 on an even size."""
    assert same_padding(size, kernel, stride) == padding


@pytest.mark.parametrize("size", [(84, 84), (72, 96), (21, 10), (11, 12)])
@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (4, 2), (3, 2), (3, 1)])
def test_convolution_agrees_with_explicit_padding(
    size: tuple[int, int], kernel: int, stride: int
) -> None:
    """Conv2dSame is a convolution of the input padded as same_padding says."""
    conv = Conv2dSame(2, 3, kernel, stride)
    x = torch.randn(2, 2, *size)
    top, bottom = same_padding(size[0], kernel, stride)
    left, right = same_padding(size[1], kernel, stride)
    padded = torch.zeros(2, 2, size[0] + top + bottom, size[1] + left + right)
    padded[:, :, top : top + size[0], left : left + size[1]] = x
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias, stride))
    assert conv(x).shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("size", [(84, 84), (21, 21), (84, 21), (11, 42)])
def test_pooling_agrees_with_explicit_padding(size: tuple[int, int]) -> None:
    """max_pool_same pads with what never wins; even and odd sizes, mixed too."""
    x = -torch.rand(2, 3, *size) - 1  # negative, so that padding with 0 would show
    top, bottom = same_padding(size[0], 3, 2)
    left, right = same_padding(size[1], 3, 2)
    padded = F.pad(x, (left, right, top, bottom), value=-1e9)
    torch.testing.assert_close(max_pool_same(x), F.max_pool2d(padded, 3, 2))


def test_input_scale_is_a_division_of_the_input() -> None:
    """scale=1/255 in the first convolution is the frame divided by 255."""
    conv = Conv2dSame(4, 8, 8, 4, scale=1 / 255)
    x = torch.randint(0, 256, (2, 4, 84, 84)).float()
    expected = F.conv2d(x / 255, conv.weight, conv.bias, 4, 2)
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [ATARI, DMLAB], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("name", ["shallow", "deep", "ancestor"])
@pytest.mark.parametrize("use_lstm", [False, True])
def test_nets_answer_for_both_layouts(spec: EnvSpec, name: str, use_lstm: bool) -> None:
    """Every net takes [C, H, W] and [H, W, C] images and answers with float32 logits and values."""
    net = make_net(name, spec, use_lstm, seed=1)
    state = net.initial_state(2)  # type: ignore[operator]
    assert bool(state) is use_lstm
    with torch.autocast("cpu", torch.bfloat16):
        output = net(*example_inputs(spec, 3, 2), state)
    assert output.logits.shape == (3, 2, spec.actions.num_logits)
    assert output.values.shape == (3, 2)
    assert output.logits.dtype == output.values.dtype == torch.float32


def test_layouts_show_the_same_picture() -> None:
    """The same image in either layout gives the same features."""
    torch.manual_seed(0)
    first = ShallowBody(ArraySpec((3, 40, 48), "uint8"))
    last = ShallowBody(ArraySpec((40, 48, 3), "uint8"))
    last.load_state_dict(first.state_dict())
    image = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    torch.testing.assert_close(first(image), last(image.permute(0, 2, 3, 1).contiguous()))


def test_seed_makes_the_weights() -> None:
    """The same seed gives the same weights, another one others, and torch's own is left alone."""
    torch.manual_seed(5)
    one = make_net("mlp", VECTOR, False, 1).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    two = make_net("mlp", VECTOR, False, 1).state_dict()
    other = make_net("mlp", VECTOR, False, 2).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(after, torch.rand(1))


def test_lstm_agrees_with_torchs_and_resets_where_first() -> None:
    """LstmCore over T rows is nn.LSTMCell row by row with the state zeroed where first."""
    torch.manual_seed(0)
    core = LstmCore(5, 7)
    cell = nn.LSTMCell(5, 7)
    with torch.no_grad():
        cell.weight_ih.copy_(core.inputs.weight)
        cell.weight_hh.copy_(core.recurrent.weight)
        cell.bias_ih.copy_(core.inputs.bias)
        cell.bias_hh.zero_()
    features = torch.randn(6, 3, 5)
    first = torch.zeros(6, 3, dtype=torch.bool)
    first[0, 1] = first[3, 0] = first[5, 2] = True
    state = (torch.randn(3, 7), torch.randn(3, 7))
    outputs, last = core(features, first, state)
    hidden, memory = state
    for t in range(6):
        keep = (~first[t]).float()[:, None]
        hidden, memory = cell(features[t], (hidden * keep, memory * keep))
        torch.testing.assert_close(outputs[t], hidden)
    torch.testing.assert_close(last, (hidden, memory))
    assert (core.inputs.bias[7:14] == 1).all(), "the forget gate starts open"


def test_core_sees_reward_and_last_action() -> None:
    """With an LSTM the logits depend on the last reward, clipped to +-1, and the last action."""
    net = make_net("mlp", VECTOR, True, 1)
    observation, reward, last_action, first = example_inputs(VECTOR, 1, 1)
    state = net.initial_state(1)  # type: ignore[operator]
    base = net(observation, reward, last_action, first, state).logits
    assert not torch.equal(base, net(observation, reward + 1, last_action, first, state).logits)
    assert not torch.equal(base, net(observation, reward, last_action + 1, first, state).logits)
    one = net(observation, reward + 1, last_action, first, state).logits
    assert torch.equal(one, net(observation, reward + 50, last_action, first, state).logits)


class UsersNet(nn.Module):
    """A net as a user would write it, with one thing wrong where a test asks for it."""

    def __init__(self, spec: EnvSpec, use_lstm: bool, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.body = MlpBody(spec.observation)
        self.logits = nn.Linear(128, spec.actions.num_logits + (fault == "actions"))
        self.value = nn.Linear(128, 1)

    def initial_state(self, num_rows: int) -> Nest:
        return {"rows": torch.zeros(num_rows, 2)}

    def forward(
        self, observation: Tensor, reward: Tensor, last_action: Tensor, first: Tensor, state: Nest
    ) -> Any:
        if self.fault == "raises":
            raise RuntimeError("boom")
        steps, rows = reward.shape
        features = self.body(observation.flatten(0, 1))
        logits = self.logits(features).view(steps, rows, -1)
        values = self.value(features).view(steps, rows, *([1] if self.fault == "values" else []))
        if self.fault == "dtype":
            logits = logits.double()
        if self.fault == "state":
            state = {"rows": torch.zeros(rows, 3)}
        return logits, values, state


def users_module(monkeypatch: pytest.MonkeyPatch, fault: str = "") -> str:
    module = types.ModuleType("users_module")
    module.build = lambda spec, use_lstm: UsersNet(spec, use_lstm, fault)  # type: ignore[attr-defined]
    module.wrong = lambda spec, use_lstm: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_module", module)
    return "users_module:build"


def test_users_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """module:callable builds the user's net."""
    assert isinstance(make_net(users_module(monkeypatch), VECTOR, False, 1), UsersNet)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("actions", "logits are torch.float32 (2, 3, 4), must be torch.float32 (2, 3, 3)"),
        ("dtype", "logits are torch.float64"),
        ("values", "values are torch.float32 (2, 3, 1), must be torch.float32 (2, 3)"),
        ("state", "core_state comes back"),
        ("raises", "failed on rows [T=2, N=3]: RuntimeError: boom"),
    ],
)
def test_users_net_that_breaks_the_contract(
    monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    """What is wrong with a user's net is said before anything runs."""
    with pytest.raises(UsageError) as caught:
        make_net(users_module(monkeypatch, fault), VECTOR, False, 1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["no_such_module:net", "users_module:nothing", "users_module:wrong"]
)
def test_users_net_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A module, attribute or result that is no net gives one line that names it."""
    users_module(monkeypatch)
    with pytest.raises(UsageError, match=name):
        make_net(name, VECTOR, False, 1)


def test_users_net_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current folder is found, whatever started the program."""
    (tmp_path / "beside_me.py").write_text("def build(spec, use_lstm): return 1 / 0\n")
    (tmp_path / "no_python.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with pytest.raises(UsageError, match="beside_me:build cannot be built: ZeroDivisionError"):
        make_net("beside_me:build", VECTOR, False, 1)
    with pytest.raises(UsageError, match="no_python:build: SyntaxError"):
        make_net("no_python:build", VECTOR, False, 1)


def test_weights_of_another_net_are_refused() -> None:
    """Loading another net's weights is a CheckpointError of one line."""
    state = make_net("mlp", VECTOR, False, 1).state_dict()
    with pytest.raises(CheckpointError) as caught:
        load_weights(make_net("mlp", VECTOR, True, 1), state)
    assert "another net's" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pixel_filters_do_not_answer_to_brightness() -> None:
    """A constant picture leaves the first layer's inside at 0, whatever its brightness."""
    conv = pixel_conv(ArraySpec((4, 84, 84), "uint8"), 16, 8, 4)
    inside = conv(torch.full((1, 4, 84, 84), 200.0))[:, :, 1:-1, 1:-1]
    assert inside.abs().max() < 1e-3
    assert conv(torch.rand(1, 4, 84, 84) * 255).abs().max() > 1


def test_pixels_are_bytes_other_images_are_as_they_are() -> None:
    """A picture of floats 0..1 shows what its bytes 0..255 show."""
    torch.manual_seed(0)
    of_bytes = ShallowBody(ArraySpec((3, 40, 48), "uint8"))
    of_floats = ShallowBody(ArraySpec((3, 40, 48), "float32"))
    of_floats.load_state_dict(of_bytes.state_dict())
    image = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    torch.testing.assert_close(of_bytes(image), of_floats(image / 255), rtol=1e-4, atol=1e-5)


def random_rows(spec: EnvSpec, steps: int, rows: int) -> Any:
    """Arguments of a net's forward pass, the core state left out, that are all but zeros."""
    generator = torch.Generator().manual_seed(2)

    def fill(leaf: Tensor) -> Tensor:
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator)
        return torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype)

    observation, *rest = map_nest(fill, example_inputs(spec, steps, rows))
    if isinstance(observation, dict):
        observation["rgb"] *= 200
        observation["instruction"] = sentences([3, 1], [], [49], [3, 1, 7, 7, 7, 9])[
            torch.arange(steps * rows) % 4
        ].view(steps, rows, -1)
    return observation, *rest


def sentences(*words: list[int]) -> Tensor:
    """int32 [N, 6] as ``SENTENCE`` says."""
    return torch.tensor([[*one, *[0] * (6 - len(one))] for one in words], dtype=torch.int32)


@pytest.mark.parametrize("actions", SPACES, ids=str)
@pytest.mark.parametrize("name", ["shallow", "deep", "ancestor", "mlp"])
@pytest.mark.parametrize("use_lstm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_part_of_a_net_learns(
    name: str, use_lstm: bool, actions: ActionSpace, dtype: torch.dtype
) -> None:
    """Over a nest of observations every parameter gets a gradient, in either precision."""
    spec = EnvSpec(SENSES.observation, actions, 4)
    net = make_net(name, spec, use_lstm, 1)
    state = net.initial_state(4)  # type: ignore[operator]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = net(*random_rows(spec, 3, 4), state)
    assert output.logits.shape == (3, 4, actions.num_logits)
    assert output.logits.dtype == output.values.dtype == torch.float32
    (output.logits.square().sum() + output.logits.sum() + output.values.sum()).backward()
    for parameter_name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", ["shallow", "mlp"])
@pytest.mark.parametrize("part", ["rgb", "numbers", "instruction"])
def test_every_part_of_an_observation_is_seen(name: str, part: str) -> None:
    """The values depend on each array, and each row's on its own array only."""
    net = make_net(name, SENSES, False, 1)
    observation, *rest = random_rows(SENSES, 1, 4)
    before = net(observation, *rest, ()).values[0]
    observation[part][0, 2] += 1
    after = net(observation, *rest, ()).values[0]
    assert (before != after).tolist() == [False, False, True, False]


def test_nests_without_pictures_take_the_mlp() -> None:
    """An image network on a nest without an image says which net to use; with one it goes."""
    blind = {"numbers": ArraySpec((5,), "float32"), "flag": ArraySpec((), "bool")}
    spec = EnvSpec(blind, Discrete(2), 1)
    with pytest.raises(UsageError, match="--net=mlp"):
        make_net("deep", spec, False, 1)
    assert isinstance(make_net("mlp", spec, True, 1), ActorCritic)


@pytest.fixture
def encoder() -> SentenceBody:
    torch.manual_seed(4)
    return SentenceBody(SENTENCE)


def test_sentences_are_told_apart_by_words_and_their_order(encoder: SentenceBody) -> None:
    """Other words or another order give other features; no words give zeros."""
    codes = encoder(sentences([3, 1], [1, 3], [3], [3, 2], [], [3, 1, 3, 1, 3, 1]))
    assert codes.shape == (6, encoder.num_features)
    assert not codes[4].any()
    assert len(set(map(tuple, codes.tolist()))) == 6


def test_a_sentence_ends_with_its_last_word(encoder: SentenceBody) -> None:
    """Its code is the LSTM's output there, whatever zeros follow and whoever its neighbours are."""
    alone = encoder(sentences([3, 1])[:, :2])
    torch.testing.assert_close(encoder(sentences([3, 1])), alone)
    torch.testing.assert_close(encoder(sentences([7, 8, 9, 10, 11, 12], [3, 1]))[1:], alone)
    words = encoder.embedding(torch.tensor([[3], [1]]))
    zeros = (torch.zeros(1, 64), torch.zeros(1, 64))
    outputs, _ = encoder.core(words, torch.zeros(2, 1, dtype=torch.bool), zeros)
    torch.testing.assert_close(outputs[1], alone)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(sentences([], [], []), id="all-empty"),
        pytest.param(sentences([5], [], [5], [5, 6], [], [5, 6]), id="repeated"),
        pytest.param(sentences([1, 2, 3, 4, 5, 6], [2], [3, 3]), id="all-different"),
    ],
)
def test_encoding_each_sentence_once_changes_nothing(encoder: SentenceBody, rows: Tensor) -> None:
    """Features and gradients are those of encoding every row word by word."""
    weights = torch.randn(len(rows), 64)
    results = []
    for codes in (encoder(rows), encoder.encode(rows)):
        encoder.zero_grad()
        (codes * weights).sum().backward()
        results.append([codes, *(p.grad for p in encoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_old_checkpoints_fit() -> None:
    """The parameters of nets for one image keep their names."""
    shallow = ["body.layers.1", "body.layers.3", "body.layers.6"]
    blocks = [f"body.layers.{i}.conv{j}" for i in (3, 4, 7, 8, 11, 12) for j in (1, 2)]
    deep = ["body.layers.1", "body.layers.5", "body.layers.9", "body.layers.15", *blocks]
    core = {"core.inputs.weight", "core.inputs.bias", "core.recurrent.weight"}

    def names(layers: list[str]) -> set[str]:
        return {f"{x}.{of}" for x in [*layers, "policy", "baseline"] for of in ("weight", "bias")}

    assert set(make_net("shallow", ATARI, False, 1).state_dict()) == names(shallow)
    assert set(make_net("deep", ATARI, True, 1).state_dict()) == names(deep) | core


def test_deviations_of_a_box_start_at_one_in_every_state() -> None:
    """Logits of a Box are means of the features and a log_std of 0 that is learnt by itself."""
    net = make_net("mlp", EnvSpec(VECTOR.observation, Box(2), 1), False, 1)
    assert isinstance(net, ActorCritic)
    rows = random_rows(EnvSpec(VECTOR.observation, Box(2), 1), 2, 3)
    logits = net(*rows, ()).logits
    assert len(set(logits[..., :2].flatten().tolist())) == 12
    assert not logits[..., 2:].any()
    with torch.no_grad():
        net.get_parameter("policy.log_std").copy_(torch.tensor([-1.0, 0.5]))
    assert (net(*rows, ()).logits[..., 2:] == torch.tensor([-1.0, 0.5])).all()
    assert "policy.log_std" not in net.low_precision_parameters()


@pytest.mark.parametrize("actions", SPACES, ids=str)
def test_core_sees_every_part_of_the_last_action(actions: ActionSpace) -> None:
    """With an LSTM each part of the last action, whatever its space, changes the values."""
    spec = EnvSpec(VECTOR.observation, actions, 1)
    net = make_net("mlp", spec, True, 1)
    observation, reward, last_action, first = example_inputs(spec, 1, 1)
    state = net.initial_state(1)  # type: ignore[operator]
    seen = [net(observation, reward, last_action, first, state).values]
    for part in last_action.view(-1):
        part += 1
        seen.append(net(observation, reward, last_action, first, state).values)
    assert len(set(torch.cat(seen).flatten().tolist())) == last_action.numel() + 1


def test_image_net_on_vectors_is_refused() -> None:
    """An image network on a vector observation says which net to use."""
    with pytest.raises(UsageError, match="--net=mlp"):
        make_net("shallow", VECTOR, False, 1)


def test_heads_stay_in_float32() -> None:
    """Everything but the heads may be held in bfloat16 by the inference copy."""
    net = make_net("shallow", ATARI, True, 1)
    assert isinstance(net, ActorCritic)
    low = net.low_precision_parameters()
    kept = {name for name, _ in net.named_parameters()} - low
    assert kept == {"policy.weight", "policy.bias", "baseline.weight", "baseline.bias"}


def test_flag_and_code_name_the_same_nets() -> None:
    """What --net accepts by name is what models.py builds."""
    assert tuple(BUILT_IN) == config.NETS
