"""Exported policies answer as the net does, for any number of rows, or are not written."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

from asyncagent import export as exporting
from asyncagent.__main__ import main
from asyncagent.checkpoint import save_checkpoint
from asyncagent.config import resolve
from asyncagent.distributions import sample
from asyncagent.envs import env_spec
from asyncagent.envs.instructions import SPEC as INSTRUCTION
from asyncagent.errors import UsageError
from asyncagent.export import CHECKED_ROWS, Format, convert, random_inputs
from asyncagent.models import NetOutput, make_net
from asyncagent.structs import ArraySpec, Box, Discrete, EnvSpec, MultiDiscrete, Nest, map_nest

IMAGE = ArraySpec((3, 24, 32), "uint8")
LAST = ArraySpec((24, 32, 3), "uint8")
FORMATS: tuple[Format, ...] = ("onnx", "torchscript", "torch_export")


def catch_run(logdir: Path, **flags: Any) -> Path:
    """The checkpoint of a run that learned nothing."""
    config = resolve("catch", **flags)
    net = make_net(config.net, env_spec(config), config.use_lstm, config.seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {"frames": 3000, "config": config.to_json(), "net": net.state_dict()}
    logdir.mkdir(exist_ok=True)
    save_checkpoint(logdir, state)
    return logdir


def check(net: nn.Module, spec: EnvSpec, format: Format) -> None:
    """Export, load and compare with the net itself, called as the learner calls it."""
    net = net.float().eval().requires_grad_(False)
    inputs, outputs = exporting._described(net, spec)
    _, run = convert(net, spec, format, {"inputs": inputs, "outputs": outputs})
    for rows in CHECKED_ROWS:
        example = random_inputs(net, spec, rows, torch.Generator().manual_seed(rows))
        leaves = optree.tree_leaves(example)
        assert [[*leaf.shape[1:]] for leaf in leaves] == [entry["shape"][1:] for entry in inputs]
        *parts, state = example
        unrolled = map_nest(lambda leaf: leaf[None], tuple(parts))
        with torch.no_grad():
            expected = NetOutput(*net(*unrolled, state))
        wanted = [expected.logits[0], expected.values[0], *optree.tree_leaves(expected.core_state)]
        found = run(leaves)
        assert len(found) == len(wanted) == len(outputs)
        for given, right in zip(found, wanted, strict=True):
            assert torch.allclose(given, right, rtol=1e-4, atol=1e-4)


MIXED = {"order": ArraySpec((), "float32"), "picture": IMAGE, "said": ArraySpec((3,), "int32", 50)}


@pytest.mark.parametrize(
    ("name", "observation", "actions", "use_lstm", "format"),
    [
        ("mlp", ArraySpec((5, 2), "float32"), MultiDiscrete((3, 4)), True, "torchscript"),
        ("shallow", IMAGE, Discrete(4), False, "onnx"),
        ("deep", IMAGE, Box(2), True, "torchscript"),
        ("ancestor", LAST, Discrete(4), False, "torch_export"),
        ("auto", MIXED, Box(3), True, "torchscript"),
    ],
)
def test_nets(name: str, observation: Nest, actions: Any, use_lstm: bool, format: Format) -> None:
    """Bodies, cores, heads and actions of all kinds come out of the file as they are."""
    spec = EnvSpec(observation, actions, 4)
    check(make_net(name, spec, use_lstm, 1), spec, format)


@pytest.mark.parametrize("format", FORMATS)
def test_deviations_are_those_acted_with(format: Format) -> None:
    """What a net says of a deviation beyond the bounds, the file says as the policy takes it."""
    spec = EnvSpec(ArraySpec((3,), "float32"), Box(3), 1)
    net = make_net("mlp", spec, False, 1).eval().requires_grad_(False)
    net.policy.log_std.copy_(torch.tensor([-9.0, 4.0, 0.5]))  # type: ignore[union-attr,operator]
    inputs, outputs = exporting._described(net, spec)
    _, run = convert(net, spec, format, {"inputs": inputs, "outputs": outputs})
    example = random_inputs(net, spec, 5, torch.Generator().manual_seed(1))
    *parts, state = example
    raw = net(*map_nest(lambda leaf: leaf[None], tuple(parts)), state)[0][0]
    logits = run(optree.tree_leaves(example))[0]
    assert torch.allclose(logits[:, :3], raw[:, :3], atol=1e-5)
    assert torch.equal(logits[:, 3:], torch.tensor([-5.0, 2.0, 0.5]).expand(5, 3))
    standard = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    acted = sample(spec.actions, raw, torch.Generator().manual_seed(2))
    assert torch.allclose(logits[:, :3] + logits[:, 3:].exp() * standard, acted, atol=1e-4)


def test_raw_deviations_are_found() -> None:
    """A file that gave the net's deviations as they are would not be written."""
    spec = EnvSpec(ArraySpec((2,), "float32"), Box(2), 1)
    net = make_net("mlp", spec, False, 1).eval().requires_grad_(False)
    net.policy.log_std.fill_(2.5)  # type: ignore[union-attr,operator]

    def run(inputs: Any) -> list[Tensor]:
        logits, values, _ = net(*(leaf[None] for leaf in inputs), ())
        return [logits[0], values[0]]

    with pytest.raises(UsageError, match=r"it differs from the net by 0\.5"):
        exporting._compare(net, spec, run, "net")


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (Discrete(4), ["the actions 0 to 3"]),
        (MultiDiscrete((3, 4)), ["2 choices, of 3, 4 alternatives"]),
        (
            Box(2),
            ["2 means, then 2 log_std", "[-5, 2]", "-1 stands for the lower, 1 for the upper"],
        ),
    ],
)
def test_the_file_says_what_numbers_mean(actions: Any, words: list[str]) -> None:
    """Of every kind of actions, and of sentences where there are some."""
    meaning = exporting._meaning(EnvSpec(IMAGE, actions, 1))
    assert "num_tokens" not in meaning and all(part in meaning["logits"] for part in words)
    spoken = exporting._meaning(EnvSpec({"a": IMAGE, "b": INSTRUCTION}, actions, 1))
    assert "BLAKE2b" in spoken["num_tokens"] and spoken["logits"] == meaning["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("name", "use_lstm"), [("shallow", False), ("deep", True)])
def test_instructions_and_images(name: str, use_lstm: bool, format: Format) -> None:
    """DMLab's observations: a picture and up to 32 words."""
    spec = EnvSpec((ArraySpec((72, 96, 3), "uint8"), INSTRUCTION), Discrete(9), 4)
    check(make_net(name, spec, use_lstm, 1), spec, format)


@pytest.mark.parametrize("format", FORMATS)
def test_command(format: Format, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file says itself what it takes, and plays as the checkpoint's net from row to row."""
    logdir = catch_run(tmp_path / "run", use_lstm=True)
    assert main(["export", f"--logdir={logdir}", f"--format={format}"]) == 0
    out = capsys.readouterr().out
    path = logdir / f"policy{exporting.SUFFIXES[format]}"
    assert f"(3,000 frames) written to {path}" in out
    assert "new_core_state.1" in out
    content = path.read_bytes()
    about, run = load(format, content)
    assert [entry["name"] for entry in about["inputs"]] == [
        *("observation", "reward", "last_action", "first", "core_state.0", "core_state.1")
    ]
    assert about["inputs"][0] == {
        "name": "observation", "dtype": "float32", "shape": ["batch", 10, 5]
    }  # fmt: skip
    assert about["actions"] == {"kind": "Discrete", "num_actions": 3}
    assert (about["level_name"], about["frames"]) == ("catch", 3000)
    assert "the actions 0 to 2" in about["meaning"]["logits"]

    config = resolve("catch", use_lstm=True)
    net = make_net(config.net, env_spec(config), True, 1)
    state = torch.load(next(logdir.glob("checkpoint_*.pt")), weights_only=True)
    net.load_state_dict(state["net"])
    generator = torch.Generator().manual_seed(3)
    inputs = [random_inputs(net, env_spec(config), 2, generator)[:4] for _ in range(4)]
    unrolled = [torch.stack(parts) for parts in zip(*inputs, strict=True)]
    core = net.initial_state(2)  # type: ignore[operator]
    with torch.no_grad():
        expected = NetOutput(*net(*unrolled, core))
    logits = []
    for row in inputs:
        answer, _, *core = run([*row, *core])
        logits.append(answer)
    assert torch.allclose(torch.stack(logits), expected.logits, atol=1e-4)


def load(format: Format, content: bytes) -> tuple[dict[str, Any], Any]:
    """What a file says of itself, and what it computes, by its own format's library alone."""
    if format == "onnx":
        import onnx
        import onnxruntime

        model = onnx.load_from_string(content)
        (about,) = [entry.value for entry in model.metadata_props if entry.key == "asyncagent"]
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return json.loads(about), lambda inputs: [
            torch.from_numpy(array)
            for array in session.run(
                None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            )
        ]
    extra: dict[str, Any] = {"asyncagent.json": ""}
    if format == "torchscript":
        module: Any = torch.jit.load(io.BytesIO(content), _extra_files=extra)  # type: ignore[no-untyped-call]
    else:
        module = torch.export.load(io.BytesIO(content), extra_files=extra).module()
    return json.loads(extra["asyncagent.json"]), lambda inputs: module(*inputs)


class ByValue(nn.Module):
    """Decides by what it sees, as Python does: no exporter can follow."""

    def __init__(self, spec: EnvSpec, use_lstm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.num_logits = spec.actions.num_logits

    def initial_state(self, num_rows: int) -> Nest:
        return ()

    def forward(
        self, observation: Tensor, reward: Tensor, last_action: Tensor, first: Tensor, core: Nest
    ) -> tuple[Tensor, Tensor, Nest]:
        logits = self.weight * reward.unsqueeze(-1).expand(*reward.shape, self.num_logits)
        if self.decides(reward):
            logits = logits + 1
        return logits, logits[..., 0], core

    def decides(self, reward: Tensor) -> bool:
        return float(reward.sum()) > 0


class ByRows(ByValue):
    """Decides by the number of rows."""

    def decides(self, reward: Tensor) -> bool:
        return reward.shape[1] == CHECKED_ROWS[-1]


class Plain(ByValue):
    """Decides nothing, and can be exported."""

    def decides(self, reward: Tensor) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "format"),
    [("ByValue", "onnx"), ("ByValue", "torchscript"), ("ByRows", "torch_export")],
)
def test_what_cannot_be_exported(
    name: str, format: Format, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own nets that a file cannot hold are refused in one line, and nothing is written."""
    logdir = catch_run(tmp_path, net=f"tests.test_export:{name}")
    before = set(logdir.iterdir())
    assert main(["export", f"--logdir={logdir}", f"--format={format}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"net=tests.test_export:{name}" in line and format in line and len(line) < 400
    assert set(logdir.iterdir()) == before


def test_own_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A net of one's own is exported as ours are."""
    logdir = catch_run(tmp_path, net="tests.test_export:Plain")
    out = tmp_path / "elsewhere.ts"
    assert main(["export", f"--logdir={logdir}", "--format=torchscript", f"--out={out}"]) == 0
    _, run = load("torchscript", out.read_bytes())
    reward = torch.tensor([0.5, 2.0])
    net = resolve("catch")
    spec = env_spec(net)
    inputs = optree.tree_leaves(random_inputs(Plain(spec, False), spec, 2, torch.Generator()))
    inputs[1] = reward
    logits = run(inputs)[0]
    assert torch.allclose(logits / logits[0, 0], torch.tensor([[1.0] * 3, [4.0] * 3]))


@pytest.mark.parametrize(("error", "fails"), [(0.0, False), (0.1, True), (math.nan, True)])
def test_differences_are_found(error: float, fails: bool) -> None:
    """What differs from the net, or is no number, in the last row of the largest batch is seen."""
    spec = EnvSpec(ArraySpec((2,), "float32"), Discrete(2), 1)
    net = make_net("mlp", spec, False, 1).eval()
    step = exporting._Step(net, spec)

    def run(inputs: Any) -> list[Tensor]:
        with torch.no_grad():
            logits, values = step(*inputs)
        if len(values) == CHECKED_ROWS[-1]:
            values[-1] += error
        return [logits, values]

    if not fails:
        assert exporting._compare(net, spec, run, "net") == 0
        return
    with pytest.raises(UsageError, match="was not written: it differs"):
        exporting._compare(net, spec, run, "net")


def test_random_sentences_are_sentences() -> None:
    """Words stand in front, zeros behind, of every length from none to all."""
    spec = EnvSpec(ArraySpec((4,), "int32", num_tokens=5), Discrete(2), 1)
    net = make_net("mlp", spec, False, 1)
    sentences = random_inputs(net, spec, 500, torch.Generator().manual_seed(1))[0]
    assert sentences.dtype == torch.int32
    lengths = (sentences > 0).sum(-1)
    assert set(lengths.tolist()) == {0, 1, 2, 3, 4} and set(sentences.unique().tolist()) == {
        *range(6)
    }
    assert ((sentences > 0) == (torch.arange(4) < lengths[:, None])).all()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--out=/proc/policy", "cannot be written"),
        ("--out=.", "is a folder: name the file to write"),
        ("--out=/", "is a folder: name the file to write"),
        ("--format=tflite", "onnx"),
        ("--checkpoint=best", "is not there"),
        ("--logdir=/proc", "no checkpoint"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, words: str
) -> None:
    """One line says what is wrong and what would be right."""
    arguments = [f"--logdir={catch_run(tmp_path)}", "--format=torchscript", flag]
    assert main(["export", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_missing_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without onnxruntime one line says what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", f"--logdir={catch_run(tmp_path)}"]) == 2
    assert "pip install -e '.[export]'" in capsys.readouterr().err
