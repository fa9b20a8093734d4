"""Python runs this in every process whose path has the folder: SIGUSR1 takes a worker's files away.

From outside nobody can close another process's descriptors without a debugger.
"""

import os
import signal
import sys

if "asyncagent.envs.worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, lambda number, frame: os.closerange(3, 4096))
