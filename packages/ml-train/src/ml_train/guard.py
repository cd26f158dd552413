"""Kill the ranks of a launcher that died: the script of a process of its own, see `ml_train.ranks`.

It reads the process ids of the ranks from its standard input. While the launcher lives the input
stays open, and when the job is over the launcher kills this process; so an end of input means that
the launcher was killed and could not end its ranks itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def main(grace_s: float) -> None:
    """Wait for the launcher's death, then for the ranks' own end, then kill those still there."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ranks = [int(line) for line in sys.stdin]
    if sys.platform != "linux":  # there the kernel has told them, see ranks._tie_to_parent
        ranks = [rank for rank in ranks if _signal(rank, signal.SIGTERM)]
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(_signal(rank, 0) for rank in ranks):
        time.sleep(0.1)
    for rank in ranks:
        _signal(rank, signal.SIGKILL)


def _signal(rank: int, number: int) -> bool:
    """Send a signal to every process of a rank; return whether there is one."""
    try:
        os.killpg(rank, number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(float(sys.argv[1]))
