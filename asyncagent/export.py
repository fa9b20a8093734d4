"""Policies as files that run without asyncagent: ONNX, TorchScript and torch.export.

A file takes one step: rows [N, ...] of what a net sees, any N, to logits, baseline and the core
state after them, all in float32; the logits are those that training acted on.  It says itself how
its inputs are called and shaped, and what they and its answers mean: a JSON object under the name
``asyncagent`` (ONNX: in metadata_props; the others: the extra file ``asyncagent.json``).  No file
is written before what it holds has been loaded again and has answered as the net does.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import optree
import torch
from torch import Tensor, nn

from asyncagent.bodies import Frames, SentenceBody
from asyncagent.checkpoint import NEWEST, choose_checkpoint
from asyncagent.config import Config
from asyncagent.distributions import LOG_STD_RANGE, acted_on
from asyncagent.envs import usable_spec
from asyncagent.envs.base import import_engine
from asyncagent.errors import UsageError
from asyncagent.files import write_beside
from asyncagent.models import load_weights, make_net
from asyncagent.structs import (
    ActionSpace,
    ArraySpec,
    Discrete,
    EnvSpec,
    MultiDiscrete,
    Nest,
    map_nest,
)

Format: TypeAlias = Literal["onnx", "torchscript", "torch_export"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".ts", "torch_export": ".pt2"}
ENTRY = "asyncagent"
CHECKED_ROWS = (1, 2, 7, 32)
"""Batch sizes that are compared."""
TOLERANCE = 1e-3
"""Largest difference from the net, as a share of the largest number compared, or of 1."""

Run: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Exported(NamedTuple):
    """What was written."""

    path: Path
    checkpoint: str
    """Name of its file."""
    frames: int
    """That the policy was trained for."""
    inputs: tuple[dict[str, Any], ...]
    """name, dtype and shape of each, in the order in which they are taken."""
    outputs: tuple[dict[str, Any], ...]
    largest_difference: float
    """From the net, in any output, over CHECKED_ROWS rows."""


def export(
    logdir: str | Path, format: Format, out: str | Path = "", checkpoint: str = NEWEST
) -> Exported:
    """Write the policy of a run's checkpoint.

    Args:
      out: file to write; default: ``policy`` in the run's folder, with the format's suffix.
      checkpoint: ``newest``, ``best`` or the name of a file.

    Raises:
      UsageError: packages are missing, the net cannot be exported or answers otherwise once it is,
        or the file cannot be written.
      CheckpointError: no such checkpoint, or none that can be read.
    """
    if out and os.path.isdir(out):
        raise UsageError(f"out={str(out)!r} is a folder: name the file to write")
    logdir = Path(logdir)
    path, state = choose_checkpoint(logdir, checkpoint)
    config = Config.from_json(state["config"], path)
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_engine(package, "export")
    spec = usable_spec(config)
    net = make_net(config.net, spec, config.use_lstm, config.seed)
    load_weights(net, state["net"])
    net = net.float().eval().requires_grad_(False)
    out = Path(out) if out else logdir / f"policy{SUFFIXES[format]}"
    inputs, outputs = _described(net, spec)
    frames = int(state["frames"])
    about = {
        "format": format,
        "level_name": config.level_name,
        "net": config.net,
        "use_lstm": config.use_lstm,
        "checkpoint": path.name,
        "frames": frames,
        "action_repeats": spec.action_repeats,
        "actions": {"kind": type(spec.actions).__name__, **vars(spec.actions)},
        "inputs": inputs,
        "outputs": outputs,
        "meaning": _meaning(spec),
    }
    content, run = convert(net, spec, format, about)
    difference = _compare(net, spec, run, f"net={config.net} as {format}")
    try:
        write_beside(out, [content])
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    return Exported(out, path.name, frames, inputs, outputs, difference)


def convert(
    net: nn.Module, spec: EnvSpec, format: Format, about: dict[str, Any]
) -> tuple[bytes, Run]:
    """The file's content, and what it does once it is loaded again.

    Args:
      net: in evaluation mode, float32, on the CPU; stays as it is.
      about: recorded in the file, with ``inputs`` and ``outputs`` as ``_described`` gives them.

    Raises:
      UsageError: the net cannot be exported.
    """
    example = optree.tree_leaves(random_inputs(net, spec, 3, torch.Generator().manual_seed(1)))
    make = {"onnx": _onnx, "torchscript": _torchscript, "torch_export": _torch_export}[format]
    before = logging.root.manager.disable
    # What exporters warn of is either no fault, or found when the answers are compared.
    logging.disable(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return make(_Step(_exportable(net), spec).eval(), tuple(example), about)
    except UsageError:
        raise
    except Exception as error:
        # Whatever the exporter made of somebody's net.
        raise UsageError(
            f"net={about.get('net', '')} cannot be exported as {format}: {_brief(error)}"
        ) from error
    finally:
        logging.disable(before)


def random_inputs(net: nn.Module, spec: EnvSpec, rows: int, generator: torch.Generator) -> Nest:
    """(observation, reward, last_action, first, core_state) at random, [rows, ...] each."""

    def uniform(most: int, shape: Sequence[int], dtype: str) -> Tensor:
        numbers = torch.randint(0, most + 1, tuple(shape), generator=generator)
        return numbers.to(getattr(torch, dtype))

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    def draw(leaf: ArraySpec) -> Tensor:
        shape = (rows, *leaf.shape)
        if leaf.num_tokens:
            length = uniform(leaf.shape[-1], (rows, *leaf.shape[:-1], 1), "int64")
            words = 1 + uniform(leaf.num_tokens - 1, shape, "int64")
            words = torch.where(torch.arange(leaf.shape[-1]) < length, words, 0)
            return words.to(getattr(torch, leaf.dtype))
        if leaf.dtype.startswith("float"):
            return normal(shape).to(getattr(torch, leaf.dtype))
        return uniform(255 if leaf.dtype == "uint8" else 1, shape, leaf.dtype)

    actions = spec.actions
    if isinstance(actions, Discrete):
        last_action = uniform(actions.num_actions - 1, (rows,), "int64")
    elif isinstance(actions, MultiDiscrete):
        choices = [uniform(size - 1, (rows,), "int64") for size in actions.sizes]
        last_action = torch.stack(choices, dim=-1)
    else:
        last_action = normal((rows, actions.num_dims))
    state = net.initial_state(rows)  # type: ignore[operator]
    return (
        map_nest(draw, spec.observation),
        normal((rows,)),
        last_action,
        uniform(1, (rows,), "bool"),
        map_nest(lambda leaf: normal(leaf.shape), state),
    )


class _Step(nn.Module):
    """A net's forward of one step, of and to tensors in a row."""

    def __init__(self, net: nn.Module, spec: EnvSpec) -> None:
        super().__init__()
        self.net = net
        self.actions = spec.actions
        inputs = random_inputs(net, spec, 1, torch.Generator())
        self.structure = optree.tree_structure(inputs)

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        *rows, core_state = optree.tree_unflatten(self.structure, leaves)
        rows = map_nest(lambda leaf: leaf.unsqueeze(0), rows)
        logits, values, core_state = self.net(*rows, core_state)
        logits = acted_on(self.actions, logits.squeeze(0))
        # A user's heads may answer in bfloat16.
        answer = (logits, values.squeeze(0), *optree.tree_leaves(core_state))
        return tuple(part.float() for part in answer)


def _exportable(net: nn.Module) -> nn.Module:
    """A copy that computes the same by operators that exporters know."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, Frames):
            module.block = False  # oneDNN's layout is torch's own
        elif isinstance(module, SentenceBody):
            # forward leaves out rows that say the same, and reads lengths back.
            module.forward = module.encode  # type: ignore[method-assign, assignment]
    return net


def _described(
    net: nn.Module, spec: EnvSpec
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """Of every input and every output: name, dtype, shape; of sentences num_tokens."""
    example = random_inputs(net, spec, 1, torch.Generator())
    parts = ("observation", "reward", "last_action", "first", "core_state")
    inputs = []
    for name, part in zip(parts, example, strict=True):
        for keys, leaf in zip(optree.tree_paths(part), optree.tree_leaves(part), strict=True):
            inputs.append(_entry(".".join(map(str, (name, *keys))), leaf.dtype, leaf.shape[1:]))
    leaves: list[ArraySpec] = optree.tree_leaves(spec.observation)
    for entry, observed in zip(inputs, leaves, strict=False):
        if observed.num_tokens:
            entry["num_tokens"] = observed.num_tokens
    state = [entry for entry in inputs if entry["name"].startswith("core_state")]
    outputs = (
        _entry("logits", torch.float32, (spec.actions.num_logits,)),
        _entry("baseline", torch.float32, ()),
        *(entry | {"name": f"new_{entry['name']}"} for entry in state),
    )
    return tuple(inputs), outputs


def _meaning(spec: EnvSpec) -> dict[str, str]:
    """What somebody who has not asyncagent must know, in words, by what it is about."""
    meaning = {
        "logits": _meaning_of_logits(spec.actions),
        "reward": "the sum over the last action's repeats, as the game gave it; 0 where first",
        "last_action": "the action before, as it was sampled; 0 where first",
        "first": "true where the observation opens an episode: core_state does not count there",
        "core_state": "if the net has one: new_core_state of the step before",
    }
    leaves: list[ArraySpec] = optree.tree_leaves(spec.observation)
    if any(leaf.num_tokens for leaf in leaves):
        meaning["num_tokens"] = (
            "where an input has num_tokens, it is a sentence: its words, split at white space and "
            "otherwise as they are, as numbers from 1, then zeros; what is too long is cut off. A "
            "word's number is 1 + h % num_tokens, where h is the BLAKE2b digest of 8 bytes of the "
            "word in UTF-8, as a big-endian integer"
        )
    return meaning


def _meaning_of_logits(actions: ActionSpace) -> str:
    if isinstance(actions, Discrete):
        return f"softmax gives the chances of the actions 0 to {actions.num_actions - 1}"
    if isinstance(actions, MultiDiscrete):
        sizes = ", ".join(map(str, actions.sizes))
        return f"{len(actions.sizes)} choices, of {sizes} alternatives: a softmax for each in turn"
    low, high = LOG_STD_RANGE
    return (
        f"{actions.num_dims} means, then {actions.num_dims} log_std: natural logarithms of the "
        f"standard deviations, cut to [{low:g}, {high:g}], of independent Gaussians. Where both "
        "bounds of an action are finite, -1 stands for the lower, 1 for the upper: scale, then "
        "clip; elsewhere the unit is the environment's"
    )


def _entry(name: str, dtype: torch.dtype, shape: Sequence[int]) -> dict[str, Any]:
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": ["batch", *shape]}


def _compare(net: nn.Module, spec: EnvSpec, run: Run, what: str) -> float:
    """Largest difference between what was exported and the net; UsageError beyond TOLERANCE."""
    step = _Step(net, spec)
    generator = torch.Generator().manual_seed(2)
    largest = 0.0
    for rows in CHECKED_ROWS:
        inputs = optree.tree_leaves(random_inputs(net, spec, rows, generator))
        with torch.no_grad():
            expected = step(*inputs)
            try:
                found = run(inputs)
            except Exception as error:
                raise UsageError(
                    f"{what} was not written: it fails on {rows} rows: {_brief(error)}"
                ) from error
        for wanted, given in zip(expected, found, strict=True):
            if given.shape != wanted.shape or given.dtype != wanted.dtype:
                raise UsageError(
                    f"{what} was not written: of {rows} rows it makes {given.dtype} "
                    f"{tuple(given.shape)}, the net {wanted.dtype} {tuple(wanted.shape)}"
                )
            difference = float((given - wanted).abs().max())
            scale = max(1.0, float(wanted.abs().max()))
            if not difference <= TOLERANCE * scale:
                raise UsageError(
                    f"{what} was not written: it differs from the net by {difference:.2g} on "
                    f"{rows} rows; does its forward decide by values, or by the number of rows?"
                )
            largest = max(largest, difference)
    return largest


def _program(step: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    return torch.export.export(step, example, dynamic_shapes=_any_batch(example))


def _any_batch(example: tuple[Tensor, ...]) -> Any:
    batch = torch.export.Dim("batch", min=1)
    return (tuple({0: batch} for _ in example),)


def _torch_export(
    step: nn.Module, example: tuple[Tensor, ...], about: dict[str, Any]
) -> tuple[bytes, Run]:
    file = io.BytesIO()
    extra = {f"{ENTRY}.json": json.dumps(about)}
    torch.export.save(_program(step, example), file, extra_files=extra)
    file.seek(0)
    loaded = torch.export.load(file).module()
    return file.getvalue(), lambda inputs: loaded(*inputs)


def _torchscript(
    step: nn.Module, example: tuple[Tensor, ...], about: dict[str, Any]
) -> tuple[bytes, Run]:
    jit = cast(Any, torch.jit)
    file = io.BytesIO()
    traced = jit.freeze(jit.trace(step, example, check_trace=False))
    jit.save(traced, file, _extra_files={f"{ENTRY}.json": json.dumps(about)})
    file.seek(0)
    loaded = jit.load(file)
    return file.getvalue(), lambda inputs: cast(Sequence[Tensor], loaded(*inputs))


def _onnx(step: nn.Module, example: tuple[Tensor, ...], about: dict[str, Any]) -> tuple[bytes, Run]:
    import onnx
    import onnxruntime

    names = [entry["name"] for entry in about["inputs"]]
    program = torch.onnx.export(
        _program(step, example),
        dynamo=True,
        verbose=False,
        input_names=names,
        output_names=[entry["name"] for entry in about["outputs"]],
        dynamic_shapes=_any_batch(example),  # the name of the dimension
        external_data=False,
    )
    assert program is not None
    model = program.model_proto
    model.metadata_props.add(key=ENTRY, value=json.dumps(about))
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, fed)]

    return content, run


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"
