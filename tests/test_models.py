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
from asyncagent.errors import CheckpointError, UsageError
from asyncagent.models import NETS as BUILT_IN
from asyncagent.models import (
    ActorCritic,
    AncestorBody,
    Conv2dSame,
    DeepBody,
    LstmCore,
    MlpBody,
    ShallowBody,
    example_inputs,
    load_weights,
    make_net,
    max_pool_same,
    pixel_conv,
    same_padding,
)
from asyncagent.structs import ArraySpec, Discrete, EnvSpec, Nest

ATARI = EnvSpec(ArraySpec((4, 84, 84), "uint8"), Discrete(6), 4)
DMLAB = EnvSpec(ArraySpec((72, 96, 3), "uint8"), Discrete(9), 4)
VECTOR = EnvSpec(ArraySpec((10, 5), "float32"), Discrete(3), 1)


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
    conv = pixel_conv(4, 16, 8, 4)
    inside = conv(torch.full((1, 4, 84, 84), 200.0))[:, :, 1:-1, 1:-1]
    assert inside.abs().max() < 1e-3
    assert conv(torch.rand(1, 4, 84, 84) * 255).abs().max() > 1


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
