"""``asyncagent export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asyncagent.commands.cli import parse

DESCRIPTION = """Write a run's policy as a file that runs without asyncagent.

It takes one step of any number of environments: observation, reward, last_action, first and core
state to logits, baseline and new core state. It is written once what is loaded from it has answered
random inputs as the net does."""


@dataclass(frozen=True)
class ExportFlags:
    """Which policy, and as what."""

    logdir: str
    """Folder of the training run."""
    format: Literal["onnx", "torchscript", "torch_export"] = "onnx"
    """What to write.

    onnx is opened by onnxruntime, torchscript by torch.jit.load, torch_export by
    torch.export.load."""
    out: str = ""
    """File to write; none: policy.onnx, .ts or .pt2 in --logdir."""
    checkpoint: str = "newest"
    """newest, best (by mean return), or a file in --logdir."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, write, say what was written; returns the exit status."""
    flags = parse(ExportFlags, arguments, prog="asyncagent export", description=DESCRIPTION)
    from asyncagent.export import CHECKED_ROWS, export

    done = export(flags.logdir, flags.format, flags.out, flags.checkpoint)
    for title, entries in (("inputs", done.inputs), ("outputs", done.outputs)):
        print(f"{title}:")
        for entry in entries:
            shape = ", ".join(map(str, entry["shape"]))
            print(f"  {entry['name']:<20} {entry['dtype']:<8} [{shape}]")
    rows = ", ".join(map(str, CHECKED_ROWS))
    print(f"differs from torch by {done.largest_difference:.1g} at most (batches of {rows})")
    print(f"{done.checkpoint} ({done.frames:,} frames) written to {done.path}")
    return 0
