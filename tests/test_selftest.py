"""The selftest passes here, and each of its checks fails where what it guards is broken."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncagent import actor, formats, optim, unroll, vtrace
from asyncagent.__main__ import main
from asyncagent.commands import selftest
from asyncagent.config import Config
from asyncagent.envs import make_group
from asyncagent.errors import UsageError
from asyncagent.learner import Learner
from asyncagent.policy import Policy
from asyncagent.remote import Listener, RemoteBridge, make_listener
from asyncagent.selftest import alignment, environments, goldens, loopback, machine, precision
from asyncagent.selftest.environments import SUBJECTS, Subject
from asyncagent.selftest.outcome import Absent, Failed
from asyncagent.selftest.registry import CHECKS, Check, chosen
from asyncagent.selftest.runner import Result, run
from asyncagent.structs import EnvStep
from tests import fake_deepmind_lab

ROOT = Path(__file__).resolve().parent.parent


# All of it.


@pytest.mark.slow
def test_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    """With the pinned versions nothing fails, and every engine shows what is on record."""
    assert main(["selftest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["failed"] == found["counts"]["no reference"] == 0
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert [*states] == [check.name for check in CHECKS]
    absent = {name for name, state in states.items() if state == "not installed"}
    assert absent <= {"gpu", "dmlab"}


def test_every_check_is_there() -> None:
    """Names are unique, and every check names a function that exists and says what it does."""
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert not {check.name for check in CHECKS} & {check.group for check in CHECKS}
    for check in CHECKS:
        module, _, name = check.function.partition(":")
        assert getattr(sys.modules[module], name).__doc__, check.name


# Mathematics.


def test_goldens_hold() -> None:
    """V-trace and the optimisers give the numbers worked out by hand."""
    assert "by hand" in goldens.check_vtrace()
    goldens.check_rmsprop()
    goldens.check_adam()


def _late(rewards: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(rewards[:1]), rewards[:-1]])


def _leaky(rhos: torch.Tensor, discounts: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    """Masks by a zero discount what went nowhere, and by nothing else."""
    nowhere = torch.isinf(rhos)
    return rhos.masked_fill(nowhere, 0.0), discounts.masked_fill(nowhere, 0.0), *rest


@pytest.mark.parametrize(
    "change",
    [
        lambda rhos, discounts, *rest: (rhos, 0.98 * discounts, *rest),
        lambda rhos, discounts, *rest: (rhos, discounts.clamp(min=0.5), *rest),
        lambda rhos, discounts, rewards, *rest: (rhos, discounts, _late(rewards), *rest),
        lambda rhos, discounts, rewards, values, last, *bars: (
            *(rhos, discounts, rewards, values, 0 * last, *bars),
        ),
        lambda rhos, discounts, rewards, values, last, *bars: (
            *(rhos, discounts, rewards, values, last, None, None),
        ),
        _leaky,
    ],
    ids=["discount", "end", "late reward", "bootstrap", "no clip", "leak"],
)
def test_broken_vtrace_is_found(
    change: Callable[..., tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another discount, no end, a late reward, no bootstrap, no clip, a mask that leaks."""
    real = vtrace.from_importance_weights
    monkeypatch.setattr(
        vtrace, "from_importance_weights", lambda *inputs, **more: real(*change(*inputs), **more)
    )
    with pytest.raises(Failed):
        goldens.check_vtrace()


def torchs_rmsprop(config: Config, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        parameters, config.learning_rate, config.decay, config.epsilon, momentum=config.momentum
    )


def other_epsilon(config: Config, parameters: Any) -> torch.optim.Optimizer:
    return optim.make_optimizer(
        dataclasses.replace(config, epsilon=1.01 * config.epsilon), parameters
    )


class EpsilonInside(torch.optim.Optimizer):
    """Adam with epsilon inside the root, where RMSProp has it."""

    def __init__(self, config: Config, parameters: Any) -> None:
        super().__init__(parameters, {"lr": config.learning_rate})
        self._config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for p in group["params"]:
            state = self.state[p]
            t = state["t"] = state.get("t", 0) + 1
            means = []
            for name, beta, x in (
                ("m", self._config.momentum, p.grad),
                ("v", self._config.decay, p.grad**2),
            ):
                state[name] = beta * state.get(name, 0.0) + (1 - beta) * x
                means.append(state[name] / (1 - beta**t))
            p -= group["lr"] * means[0] / (means[1] + self._config.epsilon).sqrt()


@pytest.mark.parametrize(
    ("check", "make", "words"),
    [
        (goldens.check_rmsprop, torchs_rmsprop, "RMSProp by hand"),
        (goldens.check_rmsprop, other_epsilon, "RMSProp by hand"),
        (goldens.check_adam, other_epsilon, "adam, step"),
        (goldens.check_adam, EpsilonInside, "adam, step"),
    ],
)
def test_broken_optimisers_are_found(
    check: Callable[[], str], make: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's RMSProp in place of TensorFlow's, another epsilon, epsilon at another place."""
    monkeypatch.setattr(goldens, "make_optimizer", make)
    with pytest.raises(Failed, match=words):
        check()


def ruined(accumulators: dict[str, torch.Tensor]) -> None:
    for value in accumulators.values():
        value.fill_(torch.nan)


def decayed(accumulators: dict[str, torch.Tensor]) -> None:
    for name, value in accumulators.items():
        value.mul_(1.0 if name == "step" else 0.9)


def counted(accumulators: dict[str, torch.Tensor]) -> None:
    accumulators["step"] += 1


@pytest.mark.parametrize(
    ("check", "harm"),
    [
        (goldens.check_rmsprop, ruined),
        (goldens.check_rmsprop, decayed),
        (goldens.check_adam, ruined),
        (goldens.check_adam, decayed),
        (goldens.check_adam, counted),
    ],
)
def test_accumulators_changed_by_a_skipped_step_are_found(
    check: Callable[[], str], harm: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A skipped step that leaves the weights alone, and makes the next one another."""

    def make(config: Config, parameters: Any) -> torch.optim.Optimizer:
        optimizer = optim.make_optimizer(config, parameters)
        step = optimizer.step

        def broken() -> None:
            step()
            if bool(getattr(optimizer, "found_inf", False)):
                for accumulators in optimizer.state.values():
                    harm(accumulators)

        monkeypatch.setattr(optimizer, "step", broken)
        return optimizer

    monkeypatch.setattr(goldens, "make_optimizer", make)
    with pytest.raises(Failed, match="by hand, after a skipped step"):
        check()


@pytest.mark.parametrize("check", [goldens.check_rmsprop, goldens.check_adam])
def test_steps_that_are_not_skipped_are_found(
    check: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimiser that does not look whether to skip."""

    def make(config: Config, parameters: Any) -> torch.optim.Optimizer:
        optimizer = optim.make_optimizer(config, parameters)
        step = optimizer.step

        def broken() -> None:
            optimizer.found_inf = None  # type: ignore[attr-defined]
            step()

        monkeypatch.setattr(optimizer, "step", broken)
        return optimizer

    monkeypatch.setattr(goldens, "make_optimizer", make)
    with pytest.raises(Failed, match="a skipped step moved a weight"):
        check()


def test_accumulator_that_starts_at_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's mean square starts at one."""
    monkeypatch.setattr(torch, "ones_like", torch.zeros_like)
    with pytest.raises(Failed, match="RMSProp by hand"):
        goldens.check_rmsprop()


# The loop.


def test_rows_are_in_their_place() -> None:
    """Environments of all lengths come through the loop's pieces, whatever the batches."""
    assert alignment.check().startswith("336 rows of 5 environments")


JOINED = (
    *("reward", "terminated", "truncated", "first", "last_action"),
    *("action", "behaviour_logits", "policy_version"),
)
"""What ``UnrollWriter`` joins, in its order."""


@pytest.mark.parametrize("field", JOINED)
def test_rows_shifted_by_one_are_found(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands a row too early in its unroll is found, and named."""
    real, joined = unroll._join, itertools.cycle(JOINED)

    def shift(arrays: Iterable[np.ndarray], out: np.ndarray) -> None:
        rows = [*arrays]
        real(rows[1:] + rows[:1] if next(joined) == field else rows, out)

    monkeypatch.setattr(unroll, "_join", shift)
    words = {"behaviour_logits": "logits", "policy_version": "policy version"}
    with pytest.raises(Failed, match=f"row .*: {words.get(field, f'{field} is')}"):
        alignment.check()


def test_batches_without_columns_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing comes out of the queue there is nothing wrong with it, and that is no pass."""
    real = unroll.gather_columns
    monkeypatch.setattr(
        alignment,
        "gather_columns",
        lambda parts: real(parts)._replace(reward=np.zeros((alignment.T + 1, 0), np.float32)),
    )
    with pytest.raises(Failed, match=r"^0 rows came out of the queue, must be 336"):
        alignment.check()


def test_group_that_never_arrives_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are of the other group, and in their place."""
    real = actor.act

    async def act(group: Any, *more: Any) -> None:
        if group.num_envs == alignment.GROUPS[1]:
            await asyncio.Event().wait()
        await real(group, *more)

    monkeypatch.setattr(alignment, "act", act)
    with pytest.raises(Failed, match=r"of environments \[2, 3, 4\]"):
        alignment.check()


@pytest.mark.parametrize(
    ("lengths", "batches", "words"),
    [((4, 1, 6, 7, 1000), 12, r"no end .* \[4\]"), ((1, 1, 1, 1, 1), 2, "no seam")],
)
def test_what_never_happens_is_not_checked(
    lengths: tuple[int, ...], batches: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without an end, or unrolls without one before them, say nothing of either."""
    monkeypatch.setattr(alignment, "LENGTHS", lengths)
    monkeypatch.setattr(alignment, "BATCHES", batches)
    with pytest.raises(Failed, match=words):
        alignment.check()


def test_action_that_led_nowhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last action in a row that opens an episode."""
    monkeypatch.setattr(actor, "action_that_led_to", lambda row, action: action)
    with pytest.raises(Failed, match="last_action is"):
        alignment.check()


def test_core_state_of_another_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unroll that begins with a state zeroed too early."""
    real = unroll.UnrollWriter.__init__
    monkeypatch.setattr(
        unroll.UnrollWriter,
        "__init__",
        lambda self, buffer, state: real(self, buffer, (0 * state[0],)),
    )
    with pytest.raises(Failed, match="core state"):
        alignment.check()


# Environments.


@pytest.mark.parametrize("name", ["memory", "catch", "atari_envpool", "gym"])
def test_engines_show_what_is_on_record(name: str) -> None:
    """The pinned versions show what they showed when the references were made."""
    outcome = environments.check(name)
    assert outcome.state == "passed" and "as on record" in outcome.detail


def test_another_picture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that shows something else than it did elsewhere has failed."""
    monkeypatch.setattr(environments, "SEED", 2)
    with pytest.raises(Failed, match="which this version showed elsewhere"):
        environments.check("memory")


def test_unknown_version_is_a_state_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is on record for a version, the hash is told, and nothing has failed."""
    monkeypatch.setattr(environments, "references", lambda: {"memory": {"0.1": "0" * 64}})
    state, detail = environments.check("memory")
    digest = environments.play(SUBJECTS["memory"]).digest
    assert state == "no reference" and "not compared" in detail and digest in detail


def test_new_version_may_show_what_an_old_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is on record for the version, but what it shows is on record for another."""
    digest = environments.play(SUBJECTS["memory"]).digest
    monkeypatch.setattr(environments, "references", lambda: {"memory": {"0.1 z80": digest}})
    state, detail = environments.check("memory")
    assert state == "passed" and detail.endswith("as that of 0.1 z80")


def test_engine_that_differs_from_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two environments of one seed must show the same, also where nothing is on record."""
    seeds = iter((1, 2))
    real = make_group
    monkeypatch.setattr(
        environments,
        "make_group",
        lambda config, **more: real(config, **more | {"seed": next(seeds)}),
    )
    with pytest.raises(Failed, match="two environments with the same seed differ"):
        environments.check("memory")


def test_what_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field counts, floats to three decimals."""
    row = base_row()
    same = row._replace(reward=row.reward + np.float32(1e-5))
    others = [
        row._replace(reward=row.reward + np.float32(1e-2)),
        row._replace(observation={"a": row.observation["a"], "b": row.observation["b"] + 1}),
        row._replace(truncated=~row.truncated),
        row._replace(first=~row.first),
        row._replace(terminated=~row.terminated),
    ]
    digests = [digest_of(one) for one in (row, same, *others)]
    assert digests[0] == digests[1]
    assert len({*digests}) == 1 + len(others)


def base_row() -> EnvStep:
    no = np.zeros(2, np.bool_)
    shown = {"a": np.full((2, 3), 0.5, np.float32), "b": np.zeros((2, 4), np.uint8)}
    return EnvStep(shown, np.ones(2, np.float32), no, no, no, no)


def digest_of(row: EnvStep) -> str:
    digest = hashlib.sha256()
    environments._add(digest, row)
    return digest.hexdigest()


@pytest.mark.parametrize("package", ["numpy-of-tomorrow", "deepmind-lab-2"])
def test_missing_engine_is_no_failure(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not there is said to be not installed."""
    monkeypatch.setitem(SUBJECTS, "memory", Subject("memory", package, "atari"))
    with pytest.raises(Absent, match=f"{package} is not installed"):
        environments.check("memory")


def test_environment_that_dies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that is lost, and replaced, in mid-game has failed."""
    monkeypatch.setitem(SUBJECTS, "gym", Subject("tests.breaking_checks:dying", "numpy", ""))
    with pytest.raises(Failed, match="lost"):
        environments.check("gym")


def test_dmlab_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepMind Lab is made twice, in worker processes; nothing is on record for it."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "stand_ins"))
    monkeypatch.setitem(sys.modules, "deepmind_lab", fake_deepmind_lab)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    outcome = environments.check("dmlab")
    assert outcome.state == "passed" and "a second environment showed the same" in outcome.detail


# Precision.


@pytest.fixture(scope="module")
def exact() -> precision.Found:
    """float32 on the CPU."""
    return precision.compute(precision.CPU, torch.float32)


def test_bfloat16_is_near_enough(exact: precision.Found) -> None:
    """bfloat16 differs, but is within its bounds; float32 is within narrower ones."""
    rough = precision.compute(precision.CPU, torch.bfloat16)
    precision.compare("it", rough, exact, precision.BFLOAT16)
    assert not np.array_equal(rough.logits, exact.logits)
    assert not np.array_equal(rough.change, exact.change)
    again = precision.compute(precision.CPU, torch.float32)
    precision.compare("it", again, exact, precision.TFLOAT32)


@pytest.mark.parametrize("part", ["acting", "learning"])
def test_coarse_arithmetic_is_found(
    part: str, exact: precision.Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are half as large, and an update in which some weights go the other way."""
    forward, differentiate = Policy._forward, Learner._differentiate

    def halved(self: Policy, *inputs: Any) -> Any:
        logits, state = forward(self, *inputs)
        return logits / 2, state

    def turned(self: Learner, batch: Any) -> Any:
        figures, gradients = differentiate(self, batch)
        return figures, tuple(g if g is None else g.roll(1, 0) for g in gradients)

    if part == "acting":
        monkeypatch.setattr(Policy, "_forward", halved)
    else:
        monkeypatch.setattr(Learner, "_differentiate", turned)
    with pytest.raises(Failed, match="logits" if part == "acting" else "updates"):
        precision.compare(
            "it", precision.compute(precision.CPU, torch.float32), exact, precision.BFLOAT16
        )


def test_no_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CUDA device there is nothing to check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Absent, match="no GPU"):
        precision.check_gpu()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_agrees_with_the_cpu() -> None:
    """Both precisions of the GPU are within their bounds."""
    assert "float32" in precision.check_gpu()


# Network and machine.


@pytest.mark.parametrize("with_keys", [False, True])
def test_unrolls_arrive(with_keys: bool) -> None:
    """Bridge and host exchange weights and unrolls on 127.0.0.1, in the clear and encrypted."""
    assert "all intact" in loopback.check(with_keys)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("reward", "reward"),
        ("behaviour_logits", "logits"),
        ("policy_version", "version"),
        ("first", "first"),
    ],
)
def test_unrolls_changed_on_the_way_are_found(
    field: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number of each unroll is another when it arrives, and is named."""
    real = formats.UnrollFormat.encode

    def encode(self: Any, sent: Any, *more: Any) -> Any:
        changed = getattr(sent, field).copy()
        # The version before: one that the learner has yet to reach would be refused.
        changed[3, 0] = not changed[3, 0] if field == "first" else changed[3, 0] - 1
        return real(self, sent._replace(**{field: changed}), *more)

    monkeypatch.setattr(formats.UnrollFormat, "encode", encode)
    with pytest.raises(Failed, match=f"unroll 0, row 3: {words} is"):
        loopback.check(False)


def test_host_that_cannot_join_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host whose key is not taken sends nothing, and the check says how often it tried."""
    real = make_listener

    def nobody_allowed(config: Config) -> Listener:
        return real(dataclasses.replace(config, allowed_keys=str(tmp_path)))

    monkeypatch.setattr(loopback, "make_listener", nobody_allowed)
    monkeypatch.setattr(loopback, "LIMIT_S", 0.5)
    with pytest.raises(Failed, match="0 of 6 unrolls"):
        loopback.check(True)


def test_bridge_that_lets_strangers_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without a key must be refused."""
    monkeypatch.setattr(RemoteBridge, "refused", 0)
    monkeypatch.setattr(loopback, "REFUSAL_S", 0.5)
    with pytest.raises(Failed, match="not refused"):
        loopback.check(True)


def test_machine() -> None:
    """Limits, room and a worker process are as a run needs them."""
    assert "open files" in machine.check_machine()
    assert "per step" in machine.check_workers()
    assert "torch" in machine.check_packages()


@pytest.mark.parametrize("bound", ["MIN_DESCRIPTORS", "MIN_DISK_GB", "MIN_SHARED_MB"])
def test_shortage_is_found(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few descriptors, a full disk, too little shared memory."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20_000, 20_000))
    monkeypatch.setattr(machine, bound, 1e9)
    with pytest.raises(Failed, match="should be 1"):
        machine.check_machine()


# The runner.


def check_of(name: str, *arguments: str, limit_s: float = 60.0) -> Check:
    return Check(name, "tests", f"tests.breaking_checks:{name}", "look here", arguments, limit_s)


def results_of(*checks: Check) -> list[tuple[str, str]]:
    begun: list[str] = []
    told: list[Result] = []
    results = run(checks, lambda check: begun.append(check.name), told.append)
    assert begun == [check.name for check in checks] and told == results
    return [(result.state, result.detail) for result in results]


def test_outcomes() -> None:
    """What a check returns or raises is its outcome, whatever an engine prints meanwhile."""
    names = ("talks", "fails", "misses", "raises_in_a_group", "missing")
    talked, failed, missed, raised, missing = results_of(*(check_of(name) for name in names))
    assert talked == ("passed", "talked")
    assert failed == ("failed", "1 is not 2")
    assert missed == ("not installed", "there is no such thing")
    assert raised == ("failed", "ValueError: a line and another")
    assert missing[0] == "failed" and "AttributeError" in missing[1]


def test_crash_and_hang_end_their_check_alone(tmp_path: Path) -> None:
    """A segmentation fault, an exit and a hang have failed; those after them have their turn, and
    no process of theirs lives on."""
    pids = tmp_path / "pids"
    good = check_of("good", "as ever")
    crashed, one, exited, hung, two = results_of(
        check_of("crashes"),
        good,
        check_of("exits"),
        check_of("hangs", str(pids), limit_s=5.0),
        good,
    )
    assert one == two == ("passed", "as ever")
    assert crashed[0] == exited[0] == hung[0] == "failed"
    assert "killed, Segmentation fault" in crashed[1]
    assert "status 7; last words: the last words" in exited[1]
    assert "hung: it was ended after 5 s" in hung[1]
    for pid in pids.read_text().split():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_process_that_says_no_more_is_ended() -> None:
    """One that closes its stdout and lives on has hung, and the next check has its turn."""
    quiet, good = results_of(check_of("goes_quiet", limit_s=2.0), check_of("good", "as ever"))
    assert quiet == ("failed", "hung: it was ended after 2 s; last words: the last words")
    assert good == ("passed", "as ever")


def test_process_that_does_not_start_fails_every_check() -> None:
    """What keeps the checks' process from starting is told, and nothing is waited for."""
    told: list[Result] = []
    command = ("/bin/sh", "-c", "echo no room >&2; exit 3")
    run([check_of("good", "x")] * 2, lambda check: None, told.append, command)
    assert [result.state for result in told] == ["failed", "failed"]
    assert "does not start: no room" in told[0].detail


# The command.


def test_only() -> None:
    """Names and groups choose checks, in the order of the table; without any, all."""
    assert chosen("") == CHECKS
    assert [check.name for check in chosen("adam, curve,vtrace")] == ["vtrace", "adam", "curve"]
    assert {check.group for check in chosen("environments")} == {"environments"}
    with pytest.raises(UsageError, match="did you mean vtrace"):
        chosen("v_trace")


def test_table_and_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each check; status 0, or 1 with what each failure means and what to do."""
    assert main(["selftest", "--only=memory,adam"]) == 0
    captured = capsys.readouterr()
    assert "2 passed" in captured.out and "Adam to" in captured.out
    assert captured.err.splitlines() == ["1/2 adam: passed", "2/2 memory: passed"]
    checks = (check_of("fails"), check_of("good", "[as] it is"), check_of("misses"))
    monkeypatch.setattr(selftest, "chosen", lambda only: checks)
    assert main(["selftest"]) == 1
    out = capsys.readouterr().out
    assert "1 is not 2" in out and "fails: look here" in out and "[as] it is" in out
    assert "1 passed, 1 failed, 1 not installed" in out
    assert main(["selftest", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    first, second, _ = found["checks"]
    assert (first["state"], first["detail"], first["advice"]) == (
        "failed",
        "1 is not 2",
        "look here",
    )
    assert second["advice"] == "" and found["counts"]["passed"] == 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--only=v_trace", "did you mean vtrace"),
        ("--only=#", "choose packages"),
        ("--record=there/is/none.json", "no such folder"),
    ],
)
def test_bad_flags(flag: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that there is not, and a file that cannot be: one line, status 2."""
    assert main(["selftest", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_record(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Hashes are written beside those that are there; a file of another kind is refused."""
    path = tmp_path / "seen.json"
    path.write_text('{"memory": {"0.1": "abc"}}')
    assert main(["selftest", "--only=memory,adam", f"--record={path}"]) == 0
    found = json.loads(path.read_text())
    (version,) = found["memory"].keys() - {"0.1"}
    assert found == {
        "memory": {"0.1": "abc", version: environments.references()["memory"][version]}
    }
    for text in ("", "[]", '{"memory": 3}', "\xff"):
        path.write_text(text, "latin-1")
        capsys.readouterr()
        assert main(["selftest", f"--record={path}"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("vtrace", "there is no hash of vtrace: choose memory, catch"),
        ("dmlab,adam", "there is no hash of adam, dmlab: choose memory, catch"),
        ("memory,doom", "no package of memory, doom is installed"),
    ],
)
def test_record_of_nothing(
    only: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Where no hash would be written one line says so, and nothing is run."""
    for name in ("memory", "doom"):
        monkeypatch.setitem(SUBJECTS, name, Subject("memory", "numpy-of-tomorrow", ""))
    path = tmp_path / "seen.json"
    assert main(["selftest", f"--only={only}", f"--record={path}"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert words in line and not captured.out and not path.exists()
