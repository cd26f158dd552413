"""A rank whose peer is gone: tell that from a bug, and end without a traceback.

A rank that dies closes its connections, and every collective of the others fails. The cause is said
elsewhere: by the rank that failed, or by the launcher, which knows what killed it.
"""

from __future__ import annotations

import os
import re
import sys
import time

LOST = 75
"""Exit code of a rank whose peer is gone, never the cause of a job's end; as EX_TEMPFAIL of
sysexits.h, trying again may help."""
PAUSE_S = 5.0
"""Longer than a launcher lets ranks live after the failure of another one: it ends this one before
it speaks, unless nobody knows the cause."""

_REASONS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|timed? ?out|pair closure",
    re.IGNORECASE,
)
_BACKENDS = re.compile(r"gloo|hccl|nccl", re.IGNORECASE)


def is_lost(error: BaseException) -> bool:
    """Tell whether a collective failed because another rank is gone, or does not answer."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    text = str(error)
    return (
        isinstance(error, RuntimeError)
        and _BACKENDS.search(text) is not None
        and _REASONS.search(text) is not None
    )


def wants_traceback() -> bool:
    """Tell whether the environment asks for the traceback of what is no bug of ours."""
    return os.environ.get("ML_TRAIN_TRACEBACK", "") not in ("", "0")


def say_lost(error: BaseException, prog: str) -> int:
    """Say that another rank is gone, unless ended meanwhile; return the exit code."""
    time.sleep(PAUSE_S)
    reason = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()[0].partition(". ")[0]
    sys.stderr.write(
        f"{prog}: lost contact with another rank: {reason} (ML_TRAIN_TRACEBACK=1 shows where)\n"
    )
    return LOST
