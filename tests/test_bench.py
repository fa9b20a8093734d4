"""asyncagent bench: measuring processes, what is measured, the bound, the command."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncagent import shares
from asyncagent.__main__ import main
from asyncagent.bench import child, measure, reference, training
from asyncagent.bench.bound import bound_steps_per_s, places_of
from asyncagent.bench.child import Meter
from asyncagent.bench.children import ChildLost, Children, environment
from asyncagent.bench.components import (
    COMPONENTS,
    LearnerComponent,
    _MostColumns,
    observation_bytes,
    random_unroll,
)
from asyncagent.bench.job import Job
from asyncagent.bench.sweep import Gauge, Point, best, settings
from asyncagent.bench.training import Training
from asyncagent.config import resolve
from asyncagent.envs import env_spec
from asyncagent.errors import UsageError
from asyncagent.learner import Learner
from asyncagent.models import make_net
from asyncagent.vtrace import from_importance_weights

CATCH = resolve("catch", num_actors=8, batch_size=4, unroll_length=3, device="cpu")
JSON_KEYS = {
    *("env_steps_per_core_s", "inference_rows_per_core_s", "learner_rows_per_core_s"),
    *("bound_steps_per_s", "steps_per_s", "frames_per_s", "efficiency", "device", "cores", "net"),
    "level_name",
}
ON_CPU = dict.fromkeys(("env", "inference", "learner"), "cpu")


def job(component: str, parameters: dict[str, int], **fields: Any) -> Job:
    """A short job of ours."""
    return Job("ours", component, CATCH, parameters, **{"seconds": 0.0, "warm_up_s": 0.0} | fields)


# The bound.


def test_bound_on_cpu() -> None:
    """Two cores, steps of 1/3000 + 1/12000 + 1/4000 = 1/1500 core-seconds: 3,000 per second."""
    rates = {"env": 3000.0, "inference": 12000.0, "learner": 4000.0}
    assert bound_steps_per_s(rates, ON_CPU, cores=2) == pytest.approx(3000)


@pytest.mark.parametrize(
    ("rates", "transfer", "bound"),
    [
        ((3000, 100_000, 100_000), 1e6, 48_000),  # 16 cores of environments
        ((30_000, 100_000, 25_000), 1e6, 20_000),  # the GPU: 1/100,000 + 1/25,000 = 1/20,000
        ((30_000, 1e9, 1e9), 15_000, 15_000),  # the bus
    ],
)
def test_bound_with_gpu(rates: tuple[float, float, float], transfer: float, bound: float) -> None:
    """The slowest of environments, GPU and bus."""
    places = {"env": "cpu", "inference": "cuda:0", "learner": "cuda:0"}
    named = dict(zip(places, rates, strict=True))
    assert bound_steps_per_s(named, places, 16, transfer) == pytest.approx(bound)


def test_bound_with_two_gpus() -> None:
    """Each GPU has its component to itself: the slower one decides."""
    places = {"env": "cpu", "inference": "cuda:1", "learner": "cuda:0"}
    rates = {"env": 1e6, "inference": 100_000.0, "learner": 25_000.0}
    assert bound_steps_per_s(rates, places, 16, 1e9) == pytest.approx(25_000)


def test_places() -> None:
    """On a machine told to use its CPU everything is there."""
    assert places_of(CATCH) == ON_CPU


# A measuring process, from within.


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def test_meter_measures_whole_pieces() -> None:
    """Ready once warm, measures from the piece that hears "go" to the first that fills the time."""
    clock, said = Clock(), list[dict[str, Any]]()
    words = queue.SimpleQueue[str]()
    meter = Meter(2.0, 1.0, said.append, lambda: None if words.empty() else words.get(), clock)

    def piece(seconds: float, steps: int = 7) -> bool:
        clock.s += seconds
        return meter(steps)

    assert piece(1.9) and said == []
    assert piece(0.2) and said == [{"ready": True}]
    assert piece(50.0) and len(said) == 1  # works on until it is told to go
    words.put("go")
    assert piece(0.5)
    assert piece(0.8, 10) and piece(0.4, 14)
    assert said[1:] == [{"rate": pytest.approx(24 / 1.2)}]
    assert piece(5.0) and len(said) == 2  # keeps the machine busy for the others
    words.put("stop")
    assert not piece(0.1)
    assert not piece(0.1)  # every coroutine of the component hears it


def answers_to(words: list[Any], index: int = 0) -> list[dict[str, Any]]:
    """What a process says that hears ``words``, each as soon as it has said something."""
    said = io.StringIO()
    read, write = os.pipe()

    class Said(io.StringIO):
        def flush(self) -> None:
            if words:
                os.write(write, (json.dumps(words.pop(0)) + "\n").encode())
            elif not closed:
                os.close(write)
                closed.append(True)

    closed: list[bool] = []
    said = Said()
    with os.fdopen(read) as heard:
        child.main(index, heard, said)
    return [json.loads(line) for line in said.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("kind", "component", "parameters"),
    [
        ("ours", "env", {"group_size": 2, "groups": 2}),
        ("ours", "inference", {"rows": 3}),
        ("ours", "learner", {"columns": 0}),
        ("ours", "learner", {"columns": 2}),
        ("reference", "env", {"group_size": 2, "groups": 1}),
        ("reference", "inference", {"rows": 3}),
        ("reference", "learner", {"columns": 0}),
    ],
)
def test_child_measures(kind: Any, component: str, parameters: dict[str, int]) -> None:
    """Every component answers started, ready, a rate above 0, stopped; then takes the next job."""
    one = Job(kind, component, CATCH, parameters, seconds=0.0, warm_up_s=0.0).encode()
    answers = answers_to([one, "go", "stop", one, "go", "stop"])
    assert [next(iter(answer)) for answer in answers] == [
        "started", *["ready", "rate", "stopped"] * 2,
    ]  # fmt: skip
    assert all(answer["rate"] > 0 for answer in answers if "rate" in answer)


def test_child_tells_what_the_user_did_wrong() -> None:
    """A UsageError travels as such; the process ends."""
    wrong = Job("ours", "env", dataclasses.replace(CATCH, num_action_repeats=4), {"group_size": 1})
    answers = answers_to([wrong.encode() | {"parameters": {"group_size": 1, "groups": 1}}])
    assert answers[0] == {"started": True}
    assert "num_action_repeats" in answers[1]["usage_error"]


def test_child_tells_what_failed(capfd: pytest.CaptureFixture[str]) -> None:
    """Any other exception is named in the answer; its traceback goes to stderr."""
    wrong = job("inference", {}).encode()
    assert answers_to([wrong])[1] == {"error": "KeyError: 'rows'"}
    assert "Traceback" in capfd.readouterr().err


# Measuring processes, from outside.

PRELUDE = """
import json, sys
def say(**answer): print(json.dumps(answer), flush=True)
def hear(): return json.loads(sys.stdin.readline())
"""
GOOD = """
say(started=True)
while line := sys.stdin.readline():
    job = json.loads(line)
    say(ready=True)
    assert hear() == "go"
    say(rate=job["parameters"]["rate"] + int(sys.argv[1]))
    assert hear() == "stop"
    say(stopped=True)
"""


def children(script: str, count: int = 2, timeout_s: float = 60.0) -> Children:
    """Processes that run ``script``."""
    return Children(count, timeout_s, (sys.executable, "-c", PRELUDE + script))


def test_rates_are_added_up() -> None:
    """Job after job goes to all processes, or to the first few."""
    with children(GOOD, 3) as crew:
        assert crew.measure(job("env", {"rate": 10})) == 10 + 11 + 12
        assert crew.measure(job("env", {"rate": 20}), 1) == 20
        assert crew.measure(job("env", {"rate": 30})) == 30 + 31 + 32


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("sys.exit('no such engine')", ChildLost, "status 1; its last words: no such engine"),
        ("say(started=1); hear(); sys.exit(3)", ChildLost, "status 3; its last words: none"),
        ("say(started=1); hear(); say(usage_error='give less')", UsageError, "^give less$"),
        ("say(started=1); hear(); say(error='E: x')", ChildLost, "E: x"),
        (
            "say(started=1); hear(); say(ready=1); hear(); 1 / (1 - int(sys.argv[1])); say(rate=1)",
            ChildLost,
            "ZeroDivisionError",
        ),
    ],
)
def test_failures_are_told(script: str, error: type[Exception], message: str) -> None:
    """Whatever a process dies of ends the measurement with its last words."""
    with pytest.raises(error, match=message), children(script, timeout_s=10.0) as crew:
        crew.measure(job("env", {}))


@pytest.mark.parametrize("script", ["hear()", "say(started=1); hear(); hear()"])
def test_silence_ends(script: str) -> None:
    """A process that says nothing, at its start or at work, is killed."""
    with (
        pytest.raises(ChildLost, match="took too long and was killed"),
        children(script, 1, timeout_s=0.5) as crew,
    ):
        crew.measure(job("env", {}))


def test_nothing_outlives_the_block(tmp_path: Path) -> None:
    """Processes end by themselves after a good measurement, and are killed after a bad one."""
    with children(GOOD) as crew:
        pids = [one._process.pid for one in crew._children]
    with (
        pytest.raises(RuntimeError, match="mine"),
        children("say(started=1); import time; time.sleep(300)") as bad,
    ):
        pids += [one._process.pid for one in bad._children]
        raise RuntimeError("mine")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_real_children() -> None:
    """The module that processes run by default speaks the protocol."""
    with Children(2) as crew:
        assert crew.measure(job("env", {"group_size": 4, "groups": 1}, seconds=0.1)) > 0
        assert crew.measure(job("inference", {"rows": 4}, seconds=0.1), 1) > 0


# What is measured.


@pytest.mark.parametrize("level_name", ["catch", "atari_pong", "doom_battle"])
def test_random_unroll_is_whole(level_name: str) -> None:
    """Every field is one that a learner can take: all valid, nothing ends, actions in range."""
    spec = env_spec(resolve(level_name))
    unroll = random_unroll(3, 2, spec, (np.ones((2, 5), np.float32),), 0)
    assert unroll.valid.all() and not (unroll.first | unroll.terminated | unroll.truncated).any()
    assert unroll.action.shape == (3, 2, *spec.actions.array.shape)
    assert (unroll.core_state[0] == 1).all()
    assert np.isfinite(unroll.reward).all() and len(np.unique(unroll.last_action)) > 1


def test_observation_bytes() -> None:
    """Those of all its arrays."""
    assert observation_bytes(env_spec(resolve("atari_pong"))) == 4 * 84 * 84
    assert observation_bytes(env_spec(CATCH)) == 4 * 10 * 5


def test_learner_component_takes_columns_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many columns per micro-batch; 0: as many as training takes with all its threads."""
    # Of which two share a cache that holds four columns each; one alone would take all eight.
    monkeypatch.setattr(shares, "last_level_cache_bytes", lambda: 8192)
    config = dataclasses.replace(CATCH, batch_size=8, learner_threads=2)
    net = make_net("mlp", env_spec(config), False, 1)
    spec = env_spec(config)
    seen: dict[int, int] = {}
    for columns in (0, 2, 8):
        component = LearnerComponent(config, {"columns": columns}, 0)
        with _MostColumns(component._learner.net) as most:
            component.run(lambda steps: False)
        seen[columns] = most.columns
        component.close()
    learner = Learner(config, net, spec.actions, torch.device("cpu"), torch.float32)
    with _MostColumns(net) as most:
        learner.update(component._batches[0])
    learner.close()
    assert seen == {0: most.columns, 2: 2, 8: 8} and most.columns == 4


def test_learner_component_counts_steps() -> None:
    """A batch is unroll_length * batch_size steps, whatever the micro-batches."""
    counted: list[int] = []

    def going(steps: int) -> bool:
        counted.append(steps)
        return len(counted) < 2

    component = LearnerComponent(CATCH, {"columns": 1}, 0)
    component.run(going)
    component.close()
    assert counted == [12, 12] and component._learner.updates == 2


def test_settings() -> None:
    """Micro-batches up to the batch, the automatic choice among them; group sizes 8 to 64."""
    columns = [one["columns"] for one in settings("ours", "learner", resolve("atari_pong"))]
    assert columns == [0, 1, 2, 4, 8, 16, 32]
    assert settings("reference", "learner", CATCH) == [{"columns": 0}]
    sizes = [one["group_size"] for one in settings("ours", "env", resolve("atari_pong"))]
    assert sizes == [8, 16, 32, 64]
    workers = settings("ours", "env", resolve("doom_basic"))
    assert workers[0]["group_size"] == 1 and {one["groups"] for one in workers} == {1}
    assert set(COMPONENTS) == {"env", "inference", "learner", "transfer"}


# The reference.


@pytest.mark.parametrize(
    ("level_name", "net", "use_lstm"),
    [
        ("atari_breakout", "shallow", False),
        ("atari_breakout", "deep", True),
        ("atari_breakout", "ancestor", True),
        ("doom_benchmark", "ancestor", True),
        ("doom_deadly_corridor", "deep", False),
        ("catch", "mlp", True),
        ("catch", "auto", True),
    ],
)
def test_reference_net_is_as_large_as_ours(level_name: str, net: str, use_lstm: bool) -> None:
    """Parameter counts agree (asserted where the net is made), and so do the answers' shapes."""
    config = resolve(level_name, net=net, use_lstm=use_lstm)
    spec = env_spec(config)
    plain, ours = reference.make_plain_net(config), make_net(net, spec, use_lstm, 1)
    state = ours.initial_state(3)  # type: ignore[operator]
    unroll = random_unroll(1, 3, spec, [leaf.numpy() for leaf in state], 0)
    fields = (unroll.observation, unroll.reward, unroll.last_action, unroll.first)
    inputs = [torch.from_numpy(field) for field in fields]
    with torch.no_grad():
        logits, values, after = plain(*inputs, tuple(state))
        wanted = ours(*inputs, tuple(state))
    assert logits.shape == wanted[0].shape and values.shape == wanted[1].shape
    assert [leaf.shape for leaf in after] == [leaf.shape for leaf in wanted[2]]


def test_reference_net_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not as large as ours is no reference."""
    body = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 127)), 127)
    monkeypatch.setattr(reference, "make_body", lambda net, shape: body)
    with pytest.raises(AssertionError, match="parameters"):
        reference.make_plain_net(CATCH)


def test_reference_vtrace() -> None:
    """The loop over time agrees with the program's V-trace."""
    generator = torch.Generator().manual_seed(0)
    log_rhos, rewards = (torch.randn(5, 3, generator=generator) for _ in range(2))
    values = torch.randn(6, 3, generator=generator)
    discounts = torch.tensor([0.9, 0.9, 0.0, 0.9, 0.9])[:, None].expand(5, 3)
    vs, advantages = reference.plain_vtrace(log_rhos, discounts, rewards, values)
    wanted = from_importance_weights(log_rhos, discounts, rewards, values[:-1], values[-1])
    torch.testing.assert_close(vs, wanted.vs)
    torch.testing.assert_close(advantages, wanted.pg_advantages)


def test_reference_learns_what_is_good() -> None:
    """Its loss has the right signs: the action that is rewarded becomes likelier."""
    config = dataclasses.replace(CATCH, learning_rate=1e-3, entropy_cost=0.0)
    learner = reference.PlainLearner(config, {}, 0)
    batch = learner._batches[0]
    batch.reward[1:] = np.where(batch.action == 1, 1, -1)
    for _ in range(30):
        learner._update(batch)
    assert (learner._net(batch)[0].argmax(-1) == 1).float().mean() > 0.9


@pytest.mark.parametrize(
    ("level_name", "net", "supported"),
    [
        ("catch", "mlp", True),
        ("doom_benchmark", "ancestor", True),
        ("doom_battle", "ancestor", False),  # two arrays
        ("catch", "my_net:Net", False),
    ],
)
def test_reference_supports(level_name: str, net: str, supported: bool) -> None:
    """Observations of one array and our own nets; for others there is no reference."""
    assert reference.supports(resolve(level_name, net=net)) == supported


# Training.

RUN = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1].removeprefix("--logdir="))
config = json.loads((folder / "config.json").read_text())
"""
REPORTS = """
with (folder / "metrics.jsonl").open("w", buffering=1) as file:
    for n in range(1, 6):
        report = {"time_s": n, "frames": 90 * n, "updates": 2 * n, "frames_per_s": 90.0 + n}
        print(json.dumps(report | {"policy_lag_mean": LAG, "policy_lag_max": n}), file=file)
    file.write('{"time_s": 6, "fra')
    signal.pause()
"""


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Training]:
    """``training.run`` of a script in place of ``asyncagent train``."""

    def run(script: str) -> Training:
        monkeypatch.setattr(training, "COMMAND", (sys.executable, "-c", RUN + script))
        return training.run(CATCH, 3.0, 1.5, lambda time_s: None)

    return run


@pytest.mark.parametrize("lag", [1.5, None])
def test_training_figures(run_script: Callable[[str], Training], lag: float | None) -> None:
    """From the first report after the warm-up to the first at the end; a lag may be unknown."""
    trained = run_script(REPORTS.replace("LAG", repr(lag)))
    assert (trained.seconds, trained.frames_per_s, trained.updates) == (3, 90, 6)
    assert trained.steps_per_s == 6 * 4 * 3 / 3  # updates of 4 columns of 3 steps
    assert (trained.frames_per_s_min, trained.frames_per_s_median) == (93, 94)
    assert trained.policy_lag_mean == lag and trained.policy_lag_max == 5
    assert trained.cores_idle is None or 0 <= trained.cores_idle <= 1.1


def test_one_report_that_spans_all_is_told(run_script: Callable[[str], Training]) -> None:
    """There is nothing between it and itself to measure: more seconds are asked for."""
    script = REPORTS.replace("LAG", "0.0").replace("range(1, 6)", "(1, 6)")
    with pytest.raises(UsageError, match=r"^seconds=3 is too short: one report"):
        run_script(script)


def test_training_takes_the_configuration_over(run_script: Callable[[str], Training]) -> None:
    """The run finds the flags recorded in its folder, with a report every second and no end."""
    script = "print(config['batch_size'], config['report_interval_s'], folder == "
    script += "pathlib.Path(config['logdir']), config['total_environment_frames']); sys.exit(1)"
    with pytest.raises(training.TrainingFailed, match=r"4 1.0 True 1000000000000$"):
        run_script(script)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("sys.exit('no memory')", training.TrainingFailed, "status 1; its last words: no memory"),
        (
            "print('asyncagent train: no such level', file=sys.stderr); sys.exit(2)",
            UsageError,
            "^no such level$",
        ),
        ("signal.pause()", training.TrainingFailed, "made no report for 0.3 s"),
    ],
)
def test_training_failures(
    run_script: Callable[[str], Training], monkeypatch: pytest.MonkeyPatch, script: str,
    error: type[Exception], message: str,
) -> None:  # fmt: skip
    """A run that ends by itself, refuses, or says nothing ends the measurement."""
    monkeypatch.setattr(training, "SILENCE_S", 0.3 if "pause" in script else 60.0)
    with pytest.raises(error, match=message):
        run_script(script)


def test_run_ends_with_its_parent() -> None:
    """A leashed program goes on while its stdin is open, and ends when that closes."""
    program = ("timeit", "-n1", "-r1", "print('here', flush=True); __import__('time').sleep(300)")
    command = (sys.executable, "-m", "asyncagent.bench.leash", *program)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment()) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"here\n" and process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1


# The command.


class FakeGauge:
    """Rates without measuring: the same for every setting but one, which is better."""

    def __init__(self, kind: str, rates: dict[str, float]) -> None:
        self.kind = kind
        self._rates = rates

    def rate(self, component: str, parameters: dict[str, int], seconds: float) -> float:
        last = settings(self.kind, component, CATCH)[-1]  # type: ignore[arg-type]
        return self._rates[component] * (1.0 if parameters == last else 0.5)

    sweep = Gauge.sweep
    _config = CATCH


@pytest.fixture
def without_measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every measurement's result is known beforehand."""
    rates = {
        "ours": {"env": 3000.0, "inference": 12000.0, "learner": 4000.0},
        "reference": {"env": 3000.0, "inference": 6000.0, "learner": 2000.0},
    }
    trained = Training(9.0, 6000.0, 1200.0, 6000.0, 5900.0, 6100.0, None, 3, 0.05, 100)
    monkeypatch.setattr(measure, "cores", lambda: 2)
    monkeypatch.setattr(
        measure, "make_gauges",
        lambda kinds, config, stack: {kind: FakeGauge(kind, rates[kind]) for kind in kinds},
    )  # fmt: skip
    monkeypatch.setattr(training, "run", lambda *arguments: trained)
    yield


@pytest.mark.usefixtures("without_measuring")
@pytest.mark.parametrize("rounds", [1, 3])
def test_json(rounds: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One object on stdout: the best of each sweep, the bound, what was achieved, their ratio."""
    flags = ["--level_name=catch", "--device=cpu", f"--rounds={rounds}", "--json"]
    assert main(["bench", *flags]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result.keys() >= JSON_KEYS
    assert result["bound_steps_per_s"] == pytest.approx(3000)
    assert result["steps_per_s"] == 1200 and result["frames_per_s"] == 6000
    assert result["efficiency"] == pytest.approx(0.4)
    assert result["reference_bound_steps_per_s"] == pytest.approx(2000)
    assert result["steps_per_reference_bound"] == pytest.approx(0.6)
    assert (result["device"], result["cores"], result["net"]) == ("cpu", 2, "mlp")
    assert len(result["rounds"]) == rounds and result["policy_lag_mean"] is None
    assert "100%" in captured.err or "9" in captured.err


@pytest.mark.usefixtures("without_measuring")
def test_idle_cores_that_are_not_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Null in JSON, a word in the tables."""
    trained = Training(9.0, 6000.0, 1200.0, 6000.0, 5900.0, 6100.0, None, 3, None, 100)
    monkeypatch.setattr(training, "run", lambda *arguments: trained)
    assert main(["bench", "--level_name=catch", "--device=cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cores_idle"] is None
    assert main(["bench", "--level_name=catch", "--device=cpu"]) == 0
    assert "cores idle unknown" in capsys.readouterr().out


@pytest.mark.usefixtures("without_measuring")
def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure is in the tables, every point of the sweeps too."""
    assert main(["bench", "--level_name=catch", "--device=cpu"]) == 0
    text = capsys.readouterr().out
    for figure in ("3,000", "12,000", "4,000", "2,000", "1,200", "6,000", "0.400", "0.60", "1.50"):
        assert figure in text, figure
    assert "columns 4 4,000" in text and "rows 8 6,000" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds=1"], "seconds=1.0 must be >= 3"),
        (["--rounds=0"], "rounds=0 must be >= 1"),
        (["--level_name=atari_brekout"], "atari_breakout"),
        (["--level_name=catch", "--net=shallow"], "use --net=mlp"),
        (["--device=cuda:99"], "is not there"),
        (["--no_such_flag=1"], "no flag --no_such_flag"),
    ],
)
def test_bad_input(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit status 2."""
    assert main(["bench", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help says what is measured and lists the flags."""
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert "efficiency" in text and "--warmup_s" in text and "--batch_size" in text


@pytest.mark.slow
def test_bench_for_real(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sweeps, training and all, on a tiny level."""
    monkeypatch.setattr(measure, "POINT_S", 0.05)
    flags = ["--level_name=catch", "--device=cpu", "--seconds=3", "--warmup_s=1", "--json"]
    assert main(["bench", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= JSON_KEYS
    assert 0 < result["efficiency"] < 1.2
    assert result["precision"] == "float32" and result["settings"]["ours"]["inference"]["rows"] >= 8


def test_best() -> None:
    """The fastest point counts."""
    points = [Point({"rows": 1}, 3.0), Point({"rows": 2}, 5.0), Point({"rows": 4}, 4.0)]
    assert best(points).parameters == {"rows": 2}
