"""``python -m asyncagent.bench.leash MODULE ARGUMENTS``: ``python -m MODULE``, while stdin is open.

However its parent goes, a run that nobody measures any more does not keep the cores.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _hold() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_hold, name="leash", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
