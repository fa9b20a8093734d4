"""Nothing that is read, received or typed is run as code, but for what is listed here with reasons.

Pickles run what their writer put into them; eval, exec and shells run what they are given.  The
statements of every Python file of the project are looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal",
    "multiprocessing", "torch.multiprocessing", "torch.package",  # whose queues and pipes pickle
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "torch.jit.load",
    "concurrent.futures.ProcessPoolExecutor", "gymnasium.vector.AsyncVectorEnv",  # which pickle
}  # fmt: skip
METHODS = {"send_pyobj", "recv_pyobj", "send_serialized", "recv_serialized", "read_pickle"}
BY_NAME = {"importlib.import_module", "runpy.run_path", "runpy.run_module"}
"""Fine where the name is a constant."""

ALLOWED = {
    ("asyncagent/__init__.py", "importlib.import_module"): "one of a table's own modules",
    ("asyncagent/__main__.py", "importlib.import_module"): "one of a table's own commands",
    ("asyncagent/bench/leash.py", "runpy.run_module"): "`asyncagent`, which bench names",
    ("asyncagent/envs/base.py", "importlib.import_module"): "an engine that our code names",
    ("asyncagent/envs/gym.py", "importlib.import_module"): "--level_name=module:callable",
    ("asyncagent/envs/worker.py", "importlib.import_module"): "a maker that the group names",
    ("asyncagent/models.py", "importlib.import_module"): "--net=module:callable",
    ("asyncagent/selftest/child.py", "importlib.import_module"): "a check that its parent names",
    ("scripts/bench_envs.py", "gymnasium.vector.AsyncVectorEnv"): "measured beside ours",
    ("tests/test_checkpoint.py", "pickle"): "writes a hostile file, to see it refused",
    ("tests/test_export.py", "torch.jit.load"): "reads back what it has just exported",
}
"""(file, what): why."""


def files() -> list[Path]:
    """The project's own Python files."""
    folders = [ROOT / name for name in ("asyncagent", "scripts", "tests")]
    return [ROOT / "setup.py", *sorted(path for f in folders for path in f.rglob("*.py"))]


def found_in(source: str) -> Iterator[str]:
    """What runs, or may run, foreign code, by its full name."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
                yield from _forbidden(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = whole
                yield from _forbidden(whole)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = _resolve(node, names)
            if name in CALLS or name.rpartition(".")[2] in METHODS:
                yield name
        elif isinstance(node, ast.Call):
            yield from _found_in_call(_resolve(node.func, names), node)


def _forbidden(imported: str) -> Iterator[str]:
    for module in MODULES:
        if f"{imported}.".startswith(f"{module}."):
            yield module


def _resolve(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name, with what it was imported as; empty if it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_resolve(node.value, names)}.{node.attr}"
    return ""


def _found_in_call(name: str, call: ast.Call) -> Iterator[str]:
    values = {word.arg: word.value for word in call.keywords}
    if name in BY_NAME and not (call.args and isinstance(call.args[0], ast.Constant)):
        yield name
    if name == "torch.load" and not _is(values.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    for word, harmless in (("shell", False), ("allow_pickle", False), ("weights_only", True)):
        if word in values and not _is(values[word], harmless):
            yield f"{word}="
    if None in values and name in ("torch.load", "numpy.load"):
        yield f"{name} with **"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_runs_foreign_code() -> None:
    """Every exception has its reason, and no reason is left of one that is gone."""
    assert len(files()) > 100
    found = {
        (str(path.relative_to(ROOT)), what)
        for path in files()
        for what in found_in(path.read_text("utf-8"))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("import multiprocessing.connection as c", "multiprocessing"),
        ("from torch import multiprocessing", "torch.multiprocessing"),
        ("from multiprocessing import Queue", "multiprocessing"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("import os as o\no.system('ls')", "os.system"),
        ("from os import popen as p\np('ls')", "os.popen"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell="),
        ("import subprocess\nsubprocess.Popen('ls', shell=x)", "shell="),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("from torch import load\nload(f, weights_only=x)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=True, **more)", "torch.load with **"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle="),
        ("socket.recv_pyobj()", "socket.recv_pyobj"),
        ("from importlib import import_module as i\ni(name)", "importlib.import_module"),
    ],
)
def test_it_is_seen(source: str, what: str) -> None:
    """Whatever it is called, and wherever it stands."""
    assert what in set(found_in(source))


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "net.eval()",
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)\nnp.load(f, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import importlib\nimportlib.import_module('ray')",
    ],
)
def test_harmless_things_are_not(source: str) -> None:
    """Methods of the same name, and calls that read data only."""
    assert not set(found_in(source))
