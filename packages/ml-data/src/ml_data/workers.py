"""Work for many processes, results in the order of the work.

A worker is a plain Python process that answers one pickled request at a time through its pipes,
driven by one thread here. So a caller's script needs no guard (`multiprocessing` runs it again in
every process), an interrupt at the terminal does not reach the workers (they end with this
process), and a worker that dies is known by its number.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar, cast

In = TypeVar("In")
Out = TypeVar("Out")


def available_cpus() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_ordered(
    make: Callable[..., Callable[[In], Out]],
    arguments: tuple[Any, ...],
    items: Iterable[In],
    *,
    workers: int,
) -> Generator[Out, None, None]:
    """Yield `make(*arguments)(item)` of each item, in order, from up to `workers` processes.

    `make` is called once in every worker. It is a function of a module, and everything can be
    pickled. Two items a worker, at most, are taken ahead of the results.

    Raises:
        ChildProcessError: a worker died.
        Exception: what `make` or its function raised for the first item for which it did.
    """
    pool = _Pool(make, arguments)
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(workers, "worker") as threads:
        try:
            for item in items:
                waiting.append(threads.submit(pool.call, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            pool.kill()


class _Worker:
    """A process that runs `serve`."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        # Modules are found where this process finds them, and never in the current directory.
        where = f"import sys; sys.path[:] = {sys.path!r}"
        program = f"{where}; from ml_data.workers import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One thread in each: there are as many workers as there should be threads.
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
        self._requests = cast("BinaryIO", self.process.stdin)
        self._replies = cast("BinaryIO", self.process.stdout)
        pickle.dump((make, arguments), self._requests)

    def call(self, item: Any) -> Any:
        try:
            pickle.dump(item, self._requests)
            self._requests.flush()
            failure, trace, result = pickle.load(self._replies)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise ChildProcessError(self._death()) from None
        if failure is None:
            return result
        raise failure from RuntimeError(f"in a worker:\n{trace}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):  # half a request was on its way
            self._requests.close()

    def _death(self) -> str:
        status, name = self.process.wait(), f"worker process {self.process.pid}"
        if status >= 0:
            return f"{name} ended with exit status {status}"
        memory = " (if memory ran out: fewer --workers need less)"
        hint = memory if -status == signal.SIGKILL else ""
        return f"{name} was killed by {signal.Signals(-status).name}{hint}"


class _Pool:
    """The workers; each thread that calls has its own."""

    def __init__(self, *task: Any) -> None:
        self._task = task
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._killed = False

    def call(self, item: Any) -> Any:
        if not hasattr(self._mine, "worker"):
            self._mine.worker = self._start()
        return self._mine.worker.call(item)

    def kill(self) -> None:
        with self._lock:
            self._killed = True
        for worker in self._workers:
            worker.kill()

    def _start(self) -> _Worker:
        with self._lock:
            if self._killed:
                raise ChildProcessError("the workers have been stopped")
            worker = _Worker(*self._task)
            self._workers.append(worker)
            return worker


def serve() -> None:
    """Answer the requests on standard input until it ends (this is the worker)."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here does not get between the replies
    function: Callable[[Any], Any] | None = None
    try:
        make, arguments = pickle.load(requests)
        while True:
            item = pickle.load(requests)
            reply: tuple[Exception | None, str, Any]
            try:
                function = function or make(*arguments)
                reply = (None, "", function(item))
            except Exception as error:
                reply = (_portable(error), traceback.format_exc(), None)
            pickle.dump(reply, replies)
            replies.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is left to answer to


def _portable(error: Exception) -> Exception:
    """Return an exception that survives the pipe."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # pickle calls code of the exception's class
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    return copy
