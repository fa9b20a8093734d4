"""What MkDocs asks while it builds: pages that stand elsewhere, and where links then point.

SECURITY.md, CONTRIBUTING.md and CHANGELOG.md lie in the project's folder, where people look for
them, and are pages of the site as well.  Links are written so that they work in the files as they
lie; here they are turned to the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, *, config: Any) -> Files:
    """The files of the site, with the pages that stand in the project's folder."""
    for name in ELSEWHERE:
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's text, in which links to the pages from elsewhere lead into the site."""
    names = "|".join(map(re.escape, ELSEWHERE))
    pattern = rf"\]\((?:\.\./)?({names})(?=[#)])"
    return re.sub(pattern, lambda found: f"]({found[1].lower()}", markdown)
