"""The rank processes of a node: starting them, showing what they say, and ending them together.

Every rank is a session of its own, so a terminal's Ctrl-C reaches only the parent, which passes it
on once, and a rank is killed together with the processes it started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from ml_train.peers import LOST

_HOLD_S = 2.0
_HOLD_MESSAGE_S = 30.0  # a rank takes long to end where there are more ranks than cores
EXPLAINED = (1, 2, LOST)
"""Exit codes of a rank that has said itself why it ended; see `ml_models.commands`."""
_AGAIN_S = 0.5  # a wrapper may pass on a Ctrl-C that the terminal has sent here already


class Output:
    """One stream of a rank, copied line by line under the rank's name.

    With `hold`, the last line waits a moment: it may be what every rank says before it ends.
    """

    def __init__(self, source: IO[bytes], sink: Any, rank: int, *, hold: bool) -> None:
        os.set_blocking(source.fileno(), False)
        self.held: bytes | None = None
        self._since = 0.0
        self._source, self._sink, self._hold = source, sink, hold
        self._prefix = f"[rank {rank}] ".encode()
        self._partial = b""

    def pump(self) -> None:
        """Copy the lines that have arrived."""
        for _ in range(16):  # then it is another stream's turn
            try:
                data = os.read(self._source.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            *lines, self._partial = (self._partial + data).split(b"\n")
            for line in lines:
                self._take(line)
        if time.monotonic() > self._since + (_HOLD_MESSAGE_S if self.holds_message else _HOLD_S):
            self.release()

    def finish(self) -> None:
        """Copy what is left of a rank that has ended, but for the line held back."""
        self.pump()
        if self._partial:
            self._take(self._partial)
        self.close()

    def close(self) -> None:
        """Stop reading."""
        self._source.close()

    @property
    def holds_message(self) -> bool:
        """Whether the line held back is a message of ours, rather than the end of a traceback."""
        return self.held is not None and self.held.startswith(b"ml-train")

    def release(self) -> None:
        """Show the line held back."""
        if self.held is not None:
            self._show(self.held)
            self.held = None

    def _take(self, line: bytes) -> None:
        self.release()
        if self._hold:
            self.held, self._since = line, time.monotonic()
        else:
            self._show(line)

    def _show(self, line: bytes) -> None:
        self._sink.buffer.write(self._prefix + line + b"\n")
        self._sink.flush()


@dataclass(kw_only=True, eq=False)
class Rank:
    """A rank's process."""

    number: int
    """Rank in the whole job."""
    process: subprocess.Popen[bytes]
    """Leader of its own session."""
    outputs: tuple[Output, ...]
    """What is shown for it; none for rank 0, which has the terminal itself."""
    code: int | None = None
    """How it ended, as `Popen.returncode`."""

    def poll(self) -> bool:
        """Show what it says; tell whether it has ended just now."""
        ended = self.process.poll() is not None
        for output in self.outputs:
            output.finish() if ended else output.pump()
        if not ended:
            return False
        self.code = self.process.returncode
        for output in self.outputs:
            # A rank that was slow to end after its message may have been killed.
            spoke = self.explained or self.code == -signal.SIGKILL
            if not (spoke and output.holds_message):
                output.release()
        return True

    @property
    def explained(self) -> bool:
        """Whether it has said itself why it ended, as others may have."""
        return self.code in EXPLAINED

    def kill(self) -> None:
        """Kill it with every process it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def exit_code(self) -> int:
        """How it ended, as a shell says it: 128 + N if signal N killed it."""
        assert self.code is not None
        return exit_code(self.code)

    def __str__(self) -> str:
        assert self.code is not None
        return f"rank {self.number} (pid {self.process.pid}) {how_ended(self.code)}"


def exit_code(code: int) -> int:
    """Return what a shell says of a `Popen.returncode`: 128 + N if signal N killed it."""
    return code if code >= 0 else 128 - code


def how_ended(code: int) -> str:
    """Say what a `Popen.returncode` means."""
    if code >= 0:
        return f"failed with exit code {code}"
    names = {number.value: f" ({number.name})" for number in signal.Signals}
    return f"was killed by signal {-code}{names.get(-code, '')}"


class Signals:
    """The signals that come for the job while this context lasts."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.kill = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.first is None:
            self.first, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._since + _AGAIN_S:
            self.kill = True


def start(command: Sequence[str], environment: Mapping[str, str]) -> Rank:
    """Start the rank that `environment` describes."""
    sys.stdout.flush()  # rank 0 writes to the same file
    number = int(environment["RANK"])
    pipe = None if number == 0 else subprocess.PIPE
    if pipe is not None:
        environment = {"PYTHONUNBUFFERED": "1", **environment}  # a pipe would hold lines back
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
        preexec_fn=_tie_to_parent() if sys.platform == "linux" else None,
    )
    if process.stdout is None or process.stderr is None:
        return Rank(number=number, process=process, outputs=())
    outputs = (
        Output(process.stdout, sys.stdout, number, hold=False),
        Output(process.stderr, sys.stderr, number, hold=True),
    )
    return Rank(number=number, process=process, outputs=outputs)


def _tie_to_parent() -> Callable[[], None]:
    """Return what a child runs first, so that it gets SIGTERM when this process dies."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return prepare


@contextmanager
def guarded(grace_s: float) -> Iterator[Callable[[Rank], None]]:
    """Keep a second process that kills the ranks it is told of `grace_s` after this one died."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", Path(__file__).with_name("guard.py"), str(grace_s)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    pipe = process.stdin

    def watch(rank: Rank) -> None:
        with suppress(BrokenPipeError):  # without a guard the job still runs
            pipe.write(b"%d\n" % rank.process.pid)

    try:
        yield watch
    finally:
        process.kill()
        process.wait()
        pipe.close()


def stop(ranks: Sequence[Rank]) -> None:
    """Kill whatever still runs."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.process.wait()
        for output in rank.outputs:
            output.close()
