"""Each module imports only from those above it, and heavy libraries stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "asyncagent"

ORDER = (
    "errors",
    "files",
    "placement",
    "presets",
    "config",
    "structs",
    "stacks",
    "threads",
    "crew",
    "tasks",
    "diagnosis",
    "watchdog",
    "signals",
    "stages",
    "tracks",
    "cpu_times",
    "metrics",
    "accounting",
    "limits",
    "advice",
    "doctor",
    "records",
    "usage",
    "summaries",
    "board",
    "panel",
    "runs",
    "curves",
    "terminal",
    "envs",
    "scores",
    "batch",
    "batcher",
    "vtrace",
    "distributions",
    "blocked",
    "lstm",
    "bodies",
    "models",
    "cuda",
    "cuda_acting",
    "policy",
    "unroll",
    "actor",
    "losses",
    "shares",
    "optim",
    "skipped",
    "cuda_learning",
    "learner",
    "lockstep",
    "replay",
    "checkpoint",
    "video",
    "games",
    "evaluation",
    "watch",
    "export",
    "weights",
    "keys",
    "wire",
    "formats",
    "remote_group",
    "members",
    "intake",
    "remote",
    "saving",
    "building",
    "host_policy",
    "filming",
    "loop",
    "conversation",
    "host_duties",
    "host",
    "bench",
    "selftest",
    "__init__",
    "commands",
    "__main__",
)
"""Modules and packages of asyncagent; each may import those before it, and no other."""


class Import(NamedTuple):
    """One imported module; ``at_load`` unless a function or TYPE_CHECKING delays it."""

    target: str
    line: int
    at_load: bool


class Tree:
    """The import statements of a package."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.paths = {self._name(path): path for path in sorted(package.rglob("*.py"))}
        self.imports = {name: list(self._imports(name)) for name in self.paths}

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imports(self, name: str) -> Iterator[Import]:
        for node, at_load in _statements(ast.parse(self.paths[name].read_text("utf-8")), True):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, at_load)
                continue
            base = node.module or ""
            if node.level:
                is_package = self.paths[name].name == "__init__.py"
                parents = name.split(".")[: None if is_package else -1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *base.split(".")])
                base = base.strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in self.paths else base, node.lineno, at_load)

    def layer(self, module: str) -> str:
        """First name below the package; ``__init__`` for the package itself."""
        return [*module.split("."), "__init__"][1]

    def wrong_way(self) -> list[str]:
        """Imports of a module that does not stand before the importing one."""
        return [
            f"{self.paths[name].name}:{line} imports {target}"
            for name, imports in self.imports.items()
            for target, line, _ in imports
            if target.split(".")[0] == self.package.name
            and self.layer(target) not in self._visible_from(self.layer(name))
        ]

    def _visible_from(self, layer: str) -> tuple[str, ...]:
        if layer not in ORDER:
            return ORDER  # test_every_module_has_its_place says so
        inside = (layer,) if layer in ("envs", "bench", "selftest", "commands") else ()
        return ORDER[: ORDER.index(layer)] + inside

    def loads(self, name: str) -> set[str]:
        """Every module that importing ``name`` loads, as far as this package asks for it."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            parts = module.split(".")
            todo += [".".join(parts[:n]) for n in range(1, len(parts))]
            todo += [target for target, _, at_load in self.imports.get(module, []) if at_load]
        return seen

    def users(self, *libraries: str) -> list[str]:
        """Modules that import one of ``libraries``, wherever in the file."""
        return [
            name
            for name, imports in self.imports.items()
            if any(target.split(".")[0] in libraries for target, _, _ in imports)
        ]


def _statements(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_load
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for delayed in child.body:
                yield from _statements(ast.Module([delayed], []), False)
            for otherwise in child.orelse:
                yield from _statements(ast.Module([otherwise], []), at_load)
        else:
            delays = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, at_load and not delays)


@pytest.fixture(scope="module")
def tree() -> Tree:
    """The project's own package."""
    return Tree(PACKAGE)


def test_every_module_has_its_place(tree: Tree) -> None:
    """A module that ORDER does not list has no place yet."""
    unlisted = {tree.layer(name) for name in tree.paths} - set(ORDER)
    assert not unlisted, (
        f"add {', '.join(sorted(unlisted))} to ORDER in {Path(__file__).name}, "
        "after everything it imports"
    )


def test_modules_import_only_from_those_above(tree: Tree) -> None:
    """No module imports one that stands after it, not even inside a function or for types."""
    assert tree.wrong_way() == []


def test_env_base_knows_no_engine(tree: Tree) -> None:
    """envs.base imports nothing else of envs."""
    inside = [target for target, _, _ in tree.imports["asyncagent.envs.base"]]
    assert not [target for target in inside if target.startswith("asyncagent.envs")]


@pytest.mark.parametrize("module", ["vtrace", "losses"])
def test_mathematics_knows_no_event_loop(tree: Tree, module: str) -> None:
    """vtrace and losses do without asyncio, and so does all they load."""
    assert f"asyncagent.{module}" not in tree.users("asyncio", "uvloop")
    assert not tree.loads(f"asyncagent.{module}") & {"asyncio", "uvloop"}


@pytest.mark.parametrize("module", ["batch", "batcher", "unroll", "threads", "structs", "config"])
def test_plumbing_loads_no_torch(tree: Tree, module: str) -> None:
    """Importing what is independent of any model loads neither torch nor models."""
    loaded = tree.loads(f"asyncagent.{module}")
    assert "asyncagent.models" not in loaded
    assert not {name for name in loaded if name.split(".")[0] == "torch"}


def test_envs_know_no_torch(tree: Tree) -> None:
    """Nothing under envs/ imports torch, so that worker processes start fast and stay small."""
    envs = [name for name in tree.paths if tree.layer(name) == "envs"]
    assert not set(envs) & set(tree.users("torch"))
    for name in envs:
        assert not {loaded for loaded in tree.loads(name) if loaded.split(".")[0] == "torch"}, name


@pytest.mark.parametrize(
    "statement",
    [
        "import asyncagent.learner",
        "from asyncagent import learner",
        "from asyncagent.learner import Learner",
        "from .learner import Learner",
        "from . import learner",
        "def use():\n    from asyncagent import learner",
        "if TYPE_CHECKING:\n    from asyncagent.learner import Learner",
        "from asyncagent import later",
    ],
)
def test_wrong_way_is_seen(tmp_path: Path, statement: str) -> None:
    """Every way to write an import of a later or unlisted module is found."""
    package = tmp_path / "asyncagent"
    package.mkdir()
    for module in ("learner", "later"):
        (package / f"{module}.py").write_text("import torch\n")
    (package / "config.py").write_text(f"import json\nfrom asyncagent import errors\n{statement}\n")
    (package / "errors.py").write_text("")
    found = Tree(package).wrong_way()
    assert len(found) == 1 and found[0].startswith("config.py:")


def test_loads_follows_imports_at_load_only(tmp_path: Path) -> None:
    """loads goes through other modules and parent packages, not into functions or types."""
    package = tmp_path / "asyncagent"
    (package / "envs").mkdir(parents=True)
    (package / "__init__.py").write_text("import json\n")
    (package / "envs" / "__init__.py").write_text("def use():\n    import torch\n")
    (package / "envs" / "base.py").write_text("from ..errors import x\n")
    (package / "errors.py").write_text(
        "if TYPE_CHECKING:\n    import numpy\nelse:\n    import os\n"
    )
    names = {"asyncagent", "asyncagent.envs", "asyncagent.envs.base", "asyncagent.errors"}
    assert Tree(package).loads("asyncagent.envs.base") == names | {"json", "os"}
