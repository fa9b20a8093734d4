"""``asyncagent replay-batch``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from asyncagent.commands.cli import parse
from asyncagent.errors import UsageError

if TYPE_CHECKING:
    from asyncagent.replay import FieldReport, Pass
    from asyncagent.skipped import SkippedBatch

DESCRIPTION = """Explain why an update was skipped: read the batch that a run kept in its folder,
compute its loss and gradient again, and say where the first number that is none comes from.

asyncagent replay-batch <file> is short for --file=<file>."""


@dataclass(frozen=True)
class ReplayFlags:
    """Which file, and how to tell."""

    file: str
    """What a run kept: <logdir>/skipped_batch.pt."""
    json: bool = False
    """Print one JSON object instead of text."""
    net: str = ""
    """The run's --net, where it was your own.

    No module is imported because a file says so."""


def main(arguments: Sequence[str]) -> int:
    """Parse the flags, examine the file and print what was found; returns the exit status."""
    flags = parse(
        ReplayFlags, _spelt_out(arguments), prog="asyncagent replay-batch", description=DESCRIPTION
    )
    from asyncagent.replay import as_json, build_net, compute, report_fields
    from asyncagent.skipped import load_skipped

    skipped = load_skipped(Path(flags.file))
    fields = report_fields(skipped.batch)
    passes: list[Pass] = []
    note = ""
    if ":" in skipped.config.net and flags.net != skipped.config.net:
        note = f"not computed: add --net={skipped.config.net} if that module may be imported"
    else:
        precisions = dict.fromkeys(("float32", skipped.precision))
        try:
            net = build_net(skipped)
            with Console(stderr=True).status("computing the loss again"):
                passes = [compute(skipped, net, precision) for precision in precisions]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            first, *_ = [*str(error).splitlines(), ""]
            raise UsageError(f"{flags.file}: its loss cannot be computed: {first}") from error
    if flags.json:
        found = {
            **_header(skipped),
            "fields": fields,
            "passes": passes,
            "note": note,
        }
        print(json.dumps(as_json(found)))
    else:
        print(_text(skipped, fields, passes, note))
    return 0


def _spelt_out(arguments: Sequence[str]) -> list[str]:
    """The file may stand alone, first or after a switch."""
    whole = []
    before = "--json"
    for argument in arguments:
        alone = not argument.startswith("-") and (before == "--json" or "=" in before)
        whole.append(f"--file={argument}" if alone else argument)
        before = argument
    return whole


def _header(skipped: SkippedBatch) -> dict[str, object]:
    columns = skipped.batch.reward.shape[1]
    weights = skipped.net.values()
    return {
        "update": skipped.update,
        "weights_update": skipped.weights_update,
        "frames": skipped.frames,
        "level_name": skipped.config.level_name,
        "net": skipped.config.net,
        "precision": skipped.precision,
        "unroll_length": len(skipped.batch.valid),
        "columns": columns,
        "origins": skipped.origins,
        "total_loss": skipped.total_loss,
        "grad_norm": skipped.grad_norm,
        "num_weights": sum(tensor.numel() for tensor in weights),
        "largest_weight": max((float(t.abs().max()) for t in weights if t.numel()), default=0.0),
    }


def _text(skipped: SkippedBatch, fields: list[FieldReport], passes: list[Pass], note: str) -> str:
    header = _header(skipped)
    lines = [
        f"update {skipped.update} of {skipped.config.level_name} was skipped after "
        f"{skipped.frames:,} frames: total loss {skipped.total_loss:g}, gradient norm "
        f"{skipped.grad_norm:g}",
        f"batch of {header['columns']} columns, {header['unroll_length']} steps each; net "
        f"{skipped.config.net} with {header['num_weights']:,} numbers, the largest "
        f"{header['largest_weight']:.3g}, as update {skipped.weights_update} left them",
        "",
    ]
    for field in fields:
        shape = "x".join(map(str, field.shape))
        line = (
            f"  {field.field:<18} {field.dtype:<8} {shape:<16} {field.least:g} ... {field.most:g}"
        )
        for count, what in (
            (field.num_not_finite, "not finite"),
            (field.num_extreme, "extreme"),
        ):
            line += f"; {count:,} {what}" if count else ""
        if field.first is not None:
            place = field.first
            row = "" if place.row is None else f"row {place.row}, "
            line += f", the first at {row}column {place.column}: {place.value:g}"
        lines.append(line)
    lines.append("")
    for one in passes:
        lines.append(
            f"{one.precision}: total loss {one.total_loss:g} (policy gradient "
            f"{one.policy_gradient_loss:g}, baseline {one.baseline_loss:g}, entropy "
            f"{one.entropy_loss:g}), gradient norm {one.grad_norm:g}"
        )
        lines.append(f"  {_explain(one)}")
    if note:
        lines.append(note)
    return "\n".join(lines)


def _explain(one: Pass) -> str:
    cause = one.cause
    if cause is None:
        return "every number is finite: with these numbers the update would have been made"
    where = "" if cause.row is None else f" of row {cause.row}"
    where += "" if cause.column is None else f" of column {cause.column}"
    layer = f" of {cause.layer}" if cause.layer and cause.term != "weights" else ""
    others = len(one.columns) - 1
    more = f" ({others} more columns go wrong, too)" if others > 0 and where else ""
    return f"goes wrong first: {cause.term}{layer}{where}: {cause.culprit}{more}"
