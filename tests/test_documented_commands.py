"""Every command of README and documentation runs, page by page, in a folder like a new checkout."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import on_a_budget
from tests.documents import PAGES, ROOT, TOGETHER, Block, blocks_of, inline_commands_of

WATCHDOG_S = 600.0
"""Longest that a block may take; mostly it is seconds."""
NOT_RUN = {"scripts/bench_peers.py": "installs another trainer"}
"""Commands within the text that are not run: why."""
SETUP = "#!/bin/sh\n# What it makes is there.\n"


class Checkout:
    """A folder with what a reader has: scripts, documents, a ``.venv``, the pages' own modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("scripts", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, folder)
        (folder / "asyncagent").symlink_to(ROOT / "asyncagent")
        (folder / "scripts" / "setup").write_text(SETUP)
        for block in (block for page in PAGES for block in blocks_of(page)):
            if block.module:
                (folder / block.module).write_text(block.text)
        self._make_venv(folder / ".venv")

    def _make_venv(self, place: Path) -> None:
        """An environment with the packages of this one, whose programs are on a budget."""
        venv.create(place, symlinks=True)
        (site,) = place.glob("lib/python3.*/site-packages")
        ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = [f"import site; site.addsitedir({path!r})" for path in sorted(ours)]
        (site / "of_the_tests.pth").write_text("\n".join(lines))
        programs = place / "bin"
        for name in ("python", *on_a_budget.MODULES):
            (programs / name).unlink(missing_ok=True)
            command = f"'{programs}/python3' '{on_a_budget.__file__}' {name}"
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)
        # scripts/docs compares these: its packages are there.
        (place / ".asyncagent-stamp").touch()
        (place / ".asyncagent-docs").touch()

    def run(self, block: Block) -> None:
        """Run a block; fails, with what was printed, unless every command of it has status 0."""
        texts = [block.text]
        if block.mark == TOGETHER:
            texts = block.text.splitlines()
        elif block.kind == "python":
            texts = [f"python - <<'END'\n{block.text}\nEND"]
        log = self.folder / "log.txt"
        with log.open("w") as output:
            started = [self._start(text, output.fileno()) for text in texts]
            try:
                statuses = [process.wait(WATCHDOG_S) for process in started]
            finally:
                for process in started:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
        said = log.read_text(errors="replace")[-3000:]
        assert not any(statuses), f"{block.place}: status {statuses}\n{block.text}\n{said}"

    def _start(self, text: str, output: int) -> subprocess.Popen[bytes]:
        kept = ("LANG", "TMPDIR", "OMP_NUM_THREADS", "XDG_RUNTIME_DIR")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        path = f"{self.folder / '.venv' / 'bin'}:{os.environ['PATH']}"
        environment |= {"PATH": path, "HOME": str(self.folder), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def to_run(page: Path) -> Iterator[Block]:
    """What is run of a page: its blocks, then the commands within its text."""
    yield from (block for block in blocks_of(page) if block.is_run)
    for command in inline_commands_of(page):
        if not any(name in command for name in NOT_RUN):
            yield Block(str(page.relative_to(ROOT)), 0, "sh", command, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(to_run(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_page(page: Path, tmp_path: Path) -> None:
    """Whoever follows the page from top to bottom, with little time, sees no command fail."""
    checkout = Checkout(tmp_path)
    for block in to_run(page):
        checkout.run(block)


@pytest.mark.slow
def test_a_command_that_fails(tmp_path: Path) -> None:
    """A block of which any command fails is told by its place."""
    checkout = Checkout(tmp_path)
    block = Block("docs/x.md", 7, "sh", ".venv/bin/asyncagent keys --no_such\ntrue\n", "")
    with pytest.raises(AssertionError, match=r"docs/x\.md:7: status \[2\](.|\n)*no flag"):
        checkout.run(block)


@pytest.mark.slow
def test_site(tmp_path: Path) -> None:
    """The site is built without a warning, and its pages need nothing from elsewhere."""
    pytest.importorskip("mkdocs", reason="./scripts/docs install brings it")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text("utf-8")
        assert 'src="http' not in text and '<link rel="stylesheet" href="http' not in text, page
