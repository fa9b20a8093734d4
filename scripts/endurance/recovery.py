"""A run during a fault and after it: how long frames stood still, and when all was there again."""

from __future__ import annotations

from endurance.plan import KINDS, LIMIT_S

SETTLE_S = 2.0
"""After a fault it is looked on for so long at least: what was struck may take a while to fall."""


class Recovery:
    """Is told, again and again, what there is; times are of one clock, in seconds."""

    def __init__(self, began_s: float, progress: int) -> None:
        """``progress``: frames when the fault began."""
        self._moved_s = began_s
        self._progress = progress
        self._pause_s = 0.0
        self._whole_s: float | None = None
        self._over_s: float | None = None
        self._began_s = self._seen_s = began_s
        self._moves_since_over = False

    def over(self, now_s: float, restart: bool) -> None:
        """The fault is over; ``restart``: only from now on anything could come back."""
        self._over_s = now_s
        if restart:
            self._began_s, self._whole_s = now_s, None

    def see(self, now_s: float, progress: int, whole: bool) -> None:
        """Frames until now, and whether all is there that should be."""
        self._seen_s = now_s
        if progress > self._progress:
            self._pause_s = max(self._pause_s, now_s - self._moved_s)
            self._moved_s, self._progress = now_s, progress
            self._moves_since_over = self._over_s is not None
        if not whole:
            self._whole_s = None
        elif self._whole_s is None:
            self._whole_s = now_s

    @property
    def complete(self) -> bool:
        """Whether the fault is over for long enough, frames go on and all is there."""
        settled = self._over_s is not None and self._seen_s >= self._over_s + SETTLE_S
        return settled and self._moves_since_over and self._whole_s is not None

    @property
    def pause_s(self) -> float | None:
        """Longest time without a new frame, from the fault's beginning; None: it goes on."""
        return self._pause_s if self._moves_since_over else None

    @property
    def whole_s(self) -> float | None:
        """Until all was there for good; None: it never was."""
        return None if self._whole_s is None else self._whole_s - self._began_s


def judge(
    kind: str, pause_s: float | None, whole_s: float | None, patience: float = 1.0
) -> tuple[float | None, str]:
    """Recovery in seconds, the longer of the two, and what is wrong with it.

    Args:
      pause_s: longest time without a new frame; None: they never went on.
      whole_s: until everything was there again; None: never.
      patience: the limit is so many times longer.
    """
    limit_s = patience * LIMIT_S[KINDS[kind].hits]
    if pause_s is None:
        return None, "no more frames"
    if whole_s is None:
        return None, "not everything came back"
    recovery_s = max(pause_s, whole_s)
    late = f"after {recovery_s:.1f} s, later than {limit_s:.0f}"
    return recovery_s, late if recovery_s > limit_s else ""
