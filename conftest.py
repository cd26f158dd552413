"""What every test of the repository starts from."""

import signal
import sys
from collections.abc import Iterator

import pytest

# A shell starts background jobs with SIGINT ignored, nohup ignores SIGHUP, and children inherit
# both; tests that send these to a process mean one started in the foreground.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


_known: object = None
"""What the process is bound to by a test that was told so."""


@pytest.fixture(autouse=True)
def _only_jobs_bind_a_process_to_a_device() -> Iterator[None]:
    """Binding replaces parts of torch for good, for every test that comes after in this process."""
    global _known
    yield
    platform = sys.modules.get("ml_parallel.platform")
    before, _known = _known, platform and platform._active
    assert before == _known, f"the test bound its own process to {_known}: jobs do (run_ranks)"
