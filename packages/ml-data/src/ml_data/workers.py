"""Work for many processes, results in the order of the work.

One process is started that makes the function (loads a tokenizer, say); workers are copies of it
(`fork`), which share its memory and begin at once. Each answers one pickled request at a time
through its socket, driven by one thread here. The process that is copied is a plain Python process
without threads, so copying it is safe, a caller's script needs no guard (`multiprocessing` runs it
again in every process), an interrupt at the terminal does not reach the workers (they end with this
process), and a worker that dies is known by its number.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

In = TypeVar("In")
Out = TypeVar("Out")

# One thread in each: there are as many workers as there should be threads, and a process with
# threads must not be copied.
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}
_START, _WAIT = b"s", b"w"
_GONE = (EOFError, ConnectionError, pickle.UnpicklingError)
_BUFFER = 1 << 18


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

    `make` is called once, in the process that the workers are copies of: it must start no threads.
    It is a function of a module, and everything can be pickled. Two items a worker, at most, are
    taken ahead of the results.

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


# This side.


class _Original:
    """The process that workers are copies of: it runs `serve`."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            # Modules are found where this process finds them, and never in the current directory.
            where = f"import sys; sys.path[:] = {sys.path!r}"
            program = f"{where}; from ml_data.workers import serve; serve({theirs.fileno()})"
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,
            )
        self._answers = self._control.makefile("rb")
        with contextlib.suppress(BrokenPipeError), cast("BinaryIO", self.process.stdin) as stdin:
            pickle.dump((make, arguments), stdin)

    def copy(self) -> _Worker:
        """Start a worker.

        Raises:
            ChildProcessError: this process died.
            Exception: what `make` raised.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [_START], [theirs.fileno()])
                failure, trace, pid = pickle.load(self._answers)
            except _GONE:
                ours.close()
                raise ChildProcessError(_death(self.process.pid, self.process.wait())) from None
        if failure is not None:
            ours.close()
            raise failure from RuntimeError(f"in a worker:\n{trace}")
        return _Worker(pid, ours)

    def status_of(self, worker: _Worker) -> int | None:
        """Return the exit status of a worker that has ended; None if nobody knows it any more."""
        try:
            self._control.sendall(_WAIT + worker.pid.to_bytes(8, "little"))
            return cast("int | None", pickle.load(self._answers))
        except _GONE:
            return None

    def kill(self) -> None:
        """End it and its workers at once; whoever waits for an answer gets an error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, workers: Sequence[_Worker]) -> None:
        """End it and its workers, and leave no trace of them."""
        if self.process.poll() is None:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            self._control.shutdown(socket.SHUT_WR)  # it collects its children and ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10 if workers else 0)
        self.kill()
        self.process.wait()

    def close(self) -> None:
        self._answers.close()
        self._control.close()


class _Worker:
    """A copy, and this end of its socket."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._connection = connection
        self._requests = connection.makefile("wb", buffering=_BUFFER)
        self._replies = connection.makefile("rb", buffering=_BUFFER)

    def call(self, item: Any) -> tuple[Exception | None, str, Any]:
        """Return what the function raised, where, and what it returned.

        Raises:
            EOFError, ConnectionError, UnpicklingError: the worker died.
        """
        pickle.dump(item, self._requests, pickle.HIGHEST_PROTOCOL)
        self._requests.flush()
        return cast("tuple[Exception | None, str, Any]", pickle.load(self._replies))

    def close(self) -> None:
        for part in (self._requests, self._replies, self._connection):
            with contextlib.suppress(OSError):  # half a request was on its way
                part.close()


class _Pool:
    """The workers; each thread that calls has its own."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._task = make, arguments
        self._original: _Original | None = None
        self._mine = threading.local()
        self._asking = threading.Lock()
        """One question to the original at a time."""
        self._workers: list[_Worker] = []
        self._killed = False

    def call(self, item: Any) -> Any:
        if not hasattr(self._mine, "worker"):
            self._mine.worker = self._start()
        worker: _Worker = self._mine.worker
        try:
            failure, trace, result = worker.call(item)
        except _GONE:
            with self._asking:
                original = None if self._killed else self._original
                status = original.status_of(worker) if original else None
            raise ChildProcessError(_death(worker.pid, status)) from None
        if failure is not None:
            raise failure from RuntimeError(f"in a worker:\n{trace}")
        return result

    def kill(self) -> None:
        """End all processes; threads that wait for one get an error."""
        self._killed = True
        while not self._asking.acquire(timeout=0.05):
            if self._original is not None:  # it is making its function, or somebody would not wait
                self._original.kill()
        self._asking.release()
        if self._original is not None:
            self._original.end(self._workers)
            self._original.close()
        for worker in self._workers:
            worker.close()

    def _start(self) -> _Worker:
        with self._asking:
            if self._killed:
                raise ChildProcessError("the workers have been stopped")
            # In a thread, which no signal interrupts: whatever is started is known.
            self._original = self._original or _Original(*self._task)
            worker = self._original.copy()
            self._workers.append(worker)
            return worker


def _death(pid: int, status: int | None) -> str:
    name = f"worker process {pid}"
    if status is None:
        return f"{name} ended"
    if status >= 0:
        return f"{name} ended with exit status {status}"
    memory = " (if memory ran out: fewer --workers need less)"
    hint = memory if -status == signal.SIGKILL else ""
    return f"{name} was killed by {signal.Signals(-status).name}{hint}"


# The other side.


def serve(descriptor: int) -> None:
    """Copy this process whenever it is asked for on a socket, until that ends."""
    os.dup2(2, 1)  # what is printed here is no result
    with contextlib.suppress(*_GONE), socket.socket(fileno=descriptor) as control:
        make, arguments = pickle.load(sys.stdin.buffer)
        _answer(control, make, arguments)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _answer(control: socket.socket, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function: Callable[[Any], Any] | None = None
    while (question := socket.recv_fds(control, 1, 1))[0]:
        kind, descriptors = question[:2]
        answer: Any
        if kind == _WAIT:
            pid = int.from_bytes(control.recv(8, socket.MSG_WAITALL), "little")
            answer = None  # it has been asked before
            with contextlib.suppress(ChildProcessError):
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            connection = socket.socket(fileno=descriptors[0])
            try:
                function = function or _made(make, arguments)
            except Exception as error:
                answer = (_portable(error), traceback.format_exc(), None)
            else:
                answer = (None, "", os.fork())
                if not answer[2]:
                    control.close()
                    _work(function, connection)
            connection.close()
        control.sendall(pickle.dumps(answer))


def _made(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    gc.disable()  # a vocabulary is many objects and no garbage
    function: Callable[[Any], Any] = make(*arguments)
    gc.freeze()  # else every copy's collections write to all objects, and so copy their pages
    gc.enable()
    return function


def _work(function: Callable[[Any], Any], connection: socket.socket) -> NoReturn:
    """Answer requests until nobody is left to answer to (this is a worker)."""
    requests = connection.makefile("rb", buffering=_BUFFER)
    replies = connection.makefile("wb", buffering=_BUFFER)
    status = 1
    try:
        while True:
            item = pickle.load(requests)
            reply: tuple[Exception | None, str, Any]
            try:
                reply = (None, "", function(item))
            except Exception as error:
                reply = (_portable(error), traceback.format_exc(), None)
            pickle.dump(reply, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
    except _GONE:
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # the rest of the stack is the original's


def _portable(error: Exception) -> Exception:
    """Return an exception that survives the socket."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:  # pickle calls code of the exception's class
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    return copy
