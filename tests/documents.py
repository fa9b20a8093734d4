"""The documents of the project as tests see them: blocks of code, commands, flags, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
KINDS = ("sh", "python", "text")
"""What a block of code may be: commands, a program (or a module, named in its first line), else."""
NOT_RUN = "not run: "
TOGETHER = "together"

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A block of code."""

    page: str
    """Its page's path from the project's folder."""
    line: int
    """Of its first line of code, from 1."""
    kind: str
    text: str
    mark: str
    """The comment right above it; empty if there is none."""

    @property
    def place(self) -> str:
        """Page and line, as a person looks for them."""
        return f"{self.page}:{self.line}"

    @property
    def module(self) -> str:
        """The file that a Python block is the whole of; empty where it is a program."""
        named = re.match(r"# (\w+\.py)\n", self.text) if self.kind == "python" else None
        return named[1] if named else ""

    @property
    def is_run(self) -> bool:
        """Whether somebody who follows the page would run it."""
        runs = self.kind == "sh" or (self.kind == "python" and not self.module)
        return runs and not self.mark.startswith(NOT_RUN)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of code of a page, from top to bottom."""
    whole = page.read_text("utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Block(
            name,
            whole.count("\n", 0, found.start("text")) + 1,
            found["kind"],
            found["text"],
            found["mark"] or "",
        )
        for found in _FENCE.finditer(whole)
    ]


def prose_of(page: Path) -> str:
    """A page without its blocks of code and its comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", page.read_text("utf-8")), flags=re.S)


def commands_of(page: Path) -> Iterator[str]:
    """Every command line of a page: of its blocks, and every piece of code within its text."""
    for block in blocks_of(page):
        if block.kind == "sh":
            text = re.sub(r"\s*\\\n\s*", " ", block.text)
            yield from re.split(r"\n|;|&&|\bdo\b", re.sub(r"(^|\s)#.*", "", text))
    for code in re.findall(r"`([^`]+)`", prose_of(page)):
        yield " ".join(code.split())


def inline_commands_of(page: Path) -> list[str]:
    """The whole commands within a page's text: with ``.venv/bin/``, without places to fill in."""
    codes = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose_of(page)))
    whole = re.compile(r"\.venv/bin/\S+ [^…<\[]*(?<!\.\.\.)")
    return list(dict.fromkeys(code for code in codes if whole.fullmatch(code)))


def anchors_of(page: Path) -> set[str]:
    """What links may name in a page, as Markdown renderers make it of headings."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in plain}


def links_of(page: Path) -> list[str]:
    """Where a page's links and pictures lead, within the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    return [target for target in targets if "://" not in target]
