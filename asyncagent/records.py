"""What a run leaves for its curves: metrics.jsonl."""

from __future__ import annotations

import os
from pathlib import Path

from asyncagent.files import GrowingFile, parse_json, write_beside
from asyncagent.metrics import Report


class MetricsFile:
    """metrics.jsonl: one JSON object per report, written line by line."""

    def __init__(self, path: Path, resume_frames: int) -> None:
        """Keeps the lines up to ``resume_frames``; later ones belong to work that was lost."""
        self._path = path
        self._frames = resume_frames
        self._file = GrowingFile(path, prepare=self._trim)
        self._file.append(b"")

    def write(self, report: Report) -> None:
        """Append one report; a warning, and another try with the next, where that fails."""
        self._frames = max(self._frames, report.frames)
        self._file.append((report.to_json() + "\n").encode())

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        self._file.close()

    def _trim(self) -> None:
        if not self._path.exists():
            return
        size = good = 0
        with self._path.open("rb") as file:
            for line in file:
                if not self._stays(line):
                    size += len(line)
                    continue
                if size > good:
                    break  # something to drop stands before something to keep
                good = size = size + len(line)
            else:
                os.truncate(self._path, good)  # needs no space
                return
            file.seek(0)
            write_beside(self._path, (line for line in file if self._stays(line)))

    def _stays(self, line: bytes) -> bool:
        try:
            frames = parse_json(line.decode())["frames"]
            return line.endswith(b"\n") and 0 <= frames <= self._frames
        except (ValueError, KeyError, TypeError):
            return False  # cut off by a crash, or damaged
