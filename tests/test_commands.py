"""The command line: spellings, presets, resuming, and mistakes told in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asyncagent.__main__ import COMMANDS, main
from asyncagent.checkpoint import save_checkpoint
from asyncagent.commands.test import Meter, show
from asyncagent.commands.train import configure
from asyncagent.config import Config, resolve
from asyncagent.envs import env_spec
from asyncagent.envs.dmlab30 import LEVELS
from asyncagent.errors import NotFinite, UsageError
from asyncagent.evaluation import Evaluation, LevelResult
from asyncagent.models import make_net
from asyncagent.structs import Episode

RESULT = LevelResult("catch", "catch", (1.0,), (9,), (False,), 1, 0)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with status 2 and one line on stderr; returns the line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_numbers_gone_wrong_end_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that found no way on says why in one line, without a traceback, and exits with 1."""

    def train(config: Config) -> None:
        raise NotFinite("11 updates in a row were skipped")

    monkeypatch.setattr("asyncagent.loop.train", train)
    assert main(["train", "--level_name=catch"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "asyncagent train: 11 updates in a row were skipped"


@pytest.mark.parametrize("spelling", ["--level_name=catch", "--level-name=catch"])
def test_both_spellings(spelling: str) -> None:
    """--level_name and --level-name are the same flag, also for choosing the preset."""
    config = configure([spelling])
    assert config.level_name == "catch"
    assert config.net == "mlp"


def test_flag_and_value_may_be_two_words() -> None:
    """--seed 5 is --seed=5."""
    assert configure(["--seed", "5", "--level_name", "catch"]).seed == 5


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("--use_lstm", True),
        ("--use-lstm=true", True),
        ("--use_lstm=1", True),
        ("--no_use_lstm", False),
        ("--no-use-lstm", False),
        ("--use_lstm=False", False),
    ],
)
def test_switches(spelling: str, expected: bool) -> None:
    """A switch is a flag by itself, has a negation, and takes a value."""
    assert configure([spelling]).use_lstm is expected


def test_no_flags_train_breakout_with_the_papers_values() -> None:
    """The default run is the paper's, on Breakout."""
    config = configure([])
    assert config == resolve("atari_breakout")


def test_preset_is_overlaid_by_flags() -> None:
    """Flags given win over the preset; the rest stays the preset's."""
    config = configure(["--level_name=atari_pong", "--preset=workstation", "--batch_size=16"])
    expected = resolve("atari_pong", "workstation", batch_size=16)
    assert config == expected


def test_num_actors_alone_is_enough() -> None:
    """Groups follow from the actors unless they are given."""
    assert configure(["--num_actors=4"]).num_actors == 4
    assert configure(["--num_actors=9"]).num_actors == 9
    doom = configure(["--level_name=doom_basic", "--num_actors=16", "--num_groups=4"])
    assert doom == resolve("doom_basic", num_actors=16, num_groups=4)
    assert doom.min_inference_rows == 8


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--learner_device=tpu", "learner_device='tpu' must be auto, cpu, cuda or cuda:N"),
        ("--inference_device=cuda:99", "inference_device='cuda:99' is not there"),
        ("--device=cuda:99", "device='cuda:99' is not there"),
        ("--listen=tcp://0.0.0.0:5555", "--insecure"),
        ("--listen=nonsense", "listen='nonsense' must be tcp://HOST:PORT"),
    ],
)
def test_what_only_training_finds_wrong(
    flag: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Devices and addresses are looked at when the run is built: one line, status 2."""
    logdir = f"--logdir={tmp_path / 'run'}"
    assert words in one_line_error(capsys, "train", "--level_name=catch", logdir, flag)


def test_resumed_run_keeps_its_flags(tmp_path: Path) -> None:
    """Flags left out take the values of the run found in --logdir."""
    config = resolve("catch", seed=9, learning_rate=0.5, logdir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    again = configure([f"--logdir={tmp_path / 'run'}", "--unroll_length=7"])
    assert (again.level_name, again.seed, again.learning_rate) == ("catch", 9, 0.5)
    assert again.unroll_length == 7
    with pytest.raises(UsageError, match="--preset=paper"):
        configure([f"--logdir={tmp_path / 'run'}", "--preset=workstation"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level_name=atari_brekout"], ["atari_brekout", "atari_breakout"]),
        (["--level_name=cach"], ["cach", "catch"]),
        (["--batch_size=0"], ["batch_size=0", ">= 1"]),
        (["--batch_size=two"], ["two"]),
        (["--learning_rate=-1"], ["learning_rate=-1.0", "> 0"]),
        (["--reward_clipping=abs_two"], ["abs_two"]),
        (["--preset=slow"], ["slow", "workstation"]),
        (["--bach_size=3"], ["--bach_size", "--batch_size"]),
        (["--net=shalow"], ["shalow", "shallow"]),
        (["--net=no_such_module:net", "--level_name=catch"], ["no_such_module"]),
        (["--num_actors=10", "--num_groups=3"], ["num_groups=3", "num_actors=10"]),
        (["--device=cuda:99", "--level_name=catch"], ["cuda:99"]),
        (["--device=tpu", "--level_name=catch"], ["tpu"]),
    ],
)
def test_mistakes_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    """A wrong flag gives exit status 2 and one line with the fault and what would be right."""
    line = one_line_error(capsys, "train", *arguments)
    for word in words:
        assert word in line


def test_an_unknown_format_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """What a flag may be is said, and nothing is said twice."""
    line = one_line_error(capsys, "export", "--format=foo")
    assert line.lower().count("invalid choice") == 1
    for word in ("'foo'", "--format", "onnx", "torchscript", "torch_export"):
        assert word in line


def test_read_only_logdir(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that cannot be written, not even by root, is told before anything starts."""
    line = one_line_error(capsys, "train", "--logdir=/proc/asyncagent")
    assert "cannot be written" in line


def test_logdir_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A logdir that cannot be made is told before anything starts."""
    (tmp_path / "file").write_text("")
    line = one_line_error(capsys, "train", f"--logdir={tmp_path / 'file' / 'run'}")
    assert "cannot be written" in line


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest command is named."""
    assert "did you mean 'train'" in one_line_error(capsys, "trian")


def test_test_without_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Testing an empty folder says what would be right."""
    assert "no checkpoint in" in one_line_error(capsys, "test", f"--logdir={tmp_path}")


def test_test_needs_a_logdir(capsys: pytest.CaptureFixture[str]) -> None:
    """A required flag that is missing is named."""
    assert "--logdir" in one_line_error(capsys, "test")


def catch_run(logdir: Path) -> None:
    """The checkpoint of a run that learned nothing."""
    config = resolve("catch")
    net = make_net(config.net, env_spec(config), config.use_lstm, config.seed)
    logdir.mkdir()
    save_checkpoint(logdir, {"frames": 3000, "config": config.to_json(), "net": net.state_dict()})


def test_test_shows_and_writes_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test mode prints a row per level and leaves every game in test.json."""
    catch_run(tmp_path / "run")
    assert main(["test", f"--logdir={tmp_path / 'run'}", "--test_num_episodes=7"]) == 0
    told = json.loads((tmp_path / "run" / "test.json").read_text())
    assert len(told["levels"][0]["returns"]) == 7
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("catch")]
    assert row[:3] == ["catch", "7", f"{told['levels'][0]['mean']:.2f}"]
    assert row[-3:] == ["9", "0%", "-"]


def test_test_passes_flags_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags of test mode reach the evaluation; those left out leave the run's own alone."""
    asked: dict[str, Any] = {}

    def evaluate(logdir: str, num_episodes: int, **flags: Any) -> Evaluation:
        asked.update(flags)
        return Evaluation(0, 0, False, False, (RESULT,))

    monkeypatch.setattr("asyncagent.evaluation.evaluate", evaluate)
    arguments = ["--video", "--greedy", "--seed=3", "--dataset_path=data", "--renderer=hardware"]
    arguments.append("--checkpoint=best")
    assert main(["test", f"--logdir={tmp_path}", *arguments, "--level_name=a,b"]) == 0
    del asked["on_episode"]
    assert asked == {
        "video": True,
        "greedy": True,
        "seed": 3,
        "device": "auto",
        "dataset_path": "data",
        "renderer": "hardware",
        "level_name": "a,b",
        "checkpoint": "best",
    }


def test_test_of_dmlab30() -> None:
    """Every level has a row with both names; the suite's scores are the last line."""
    levels = tuple(
        LevelResult(level.train, level.test, (level.human,), (900,), (True,), 4, index == 3)
        for index, level in enumerate(LEVELS)
    )
    console = Console(record=True, width=160, file=io.StringIO())
    show(Evaluation(10**6, 7, False, True, levels), console)
    lines = console.export_text().splitlines()
    assert sum(line.split()[-3:] == ["3,600", "100%", "100.0"] for line in lines) == 30
    assert any(
        line.startswith(
            "rooms_collect_good_objects_train (played: rooms_collect_good_objects_test)"
        )
        for line in lines
    )
    assert any("lost and replaced: 1;" in line for line in lines)
    assert any("acted at random" in line for line in lines)
    assert lines[-1] == "DMLab-30 human-normalised score: 100.00, with levels capped at 100: 100.00"


def test_test_in_a_file_is_not_silent() -> None:
    """Without a terminal a line now and then says how many games have ended."""
    now_s = 0.0
    out = io.StringIO()
    meter = Meter(Console(file=out), clock=lambda: now_s)
    for done in range(1, 61):
        now_s += 1.0
        meter.on_episode(Episode("catch", 1.0, 9, 0), 60 - done)
    lines = out.getvalue().splitlines()
    assert lines == [f"{done} of 60 games played" for done in (10, 20, 30, 40, 50, 60)]


def test_test_cannot_film_what_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--video of a level without a picture, or an unfit level, is refused in one line."""
    catch_run(tmp_path / "run")
    logdir = f"--logdir={tmp_path / 'run'}"
    assert "catch shows no picture" in one_line_error(capsys, "test", logdir, "--video")
    line = one_line_error(capsys, "test", logdir, "--level_name=cartpole")
    assert "does not fit a policy that learned catch" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help lists every flag and exits with 0."""
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code in (0, None)
    flag = {
        "actors": "--connect",
        "keys": "--out",
        "replay-batch": "--file",
        "selftest": "--only",
    }.get(command, "--logdir")
    assert flag in capsys.readouterr().out
