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


def _bound() -> object:
    platform = sys.modules.get("ml_parallel.platform")
    return platform and platform._active


@pytest.fixture(autouse=True)
def _only_jobs_bind_a_process_to_a_device() -> Iterator[None]:
    """Binding replaces parts of torch for good, for every test that comes after in this process."""
    before = _bound()
    yield
    bound = _bound()
    assert bound == before, f"the test bound its own process to {bound}: jobs do that (run_ranks)"
