"""Run a function on several gloo ranks, quickly: for tests, here and in other projects.

The ranks are forked from this process after its imports, so a job of four ranks starts in
milliseconds instead of four times the seconds that importing torch and megatron-core takes.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


class _Rank(NamedTuple):
    process: Any
    results: Connection


def run_ranks(
    function: Callable[..., T], world_size: int, *args: Any, timeout: float = 120.0
) -> list[T]:
    """Call `function(*args)` on `world_size` forked ranks and return their results by rank.

    In each rank the default process group is initialised (gloo), megatron-core is bound to the
    CPU, torch uses one thread, and RANK, LOCAL_RANK and WORLD_SIZE are set.

    Args:
        function: Its result must pickle.
        world_size: Number of ranks.
        args: Passed to every rank; inherited by fork, so they need not pickle.
        timeout: Seconds for the whole call.

    Raises:
        RankFailedError: A rank raised an exception, died, or was not done in time. The other
            ranks are killed.
    """
    from ml_parallel import platform

    platform.import_engine()
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(send, function, args, rank, world_size, folder, timeout)
            )
            process.start()
            send.close()
            ranks.append(_Rank(process, receive))
        try:
            return _collect(ranks, timeout)
        finally:
            for rank_ in ranks:
                rank_.process.kill()
                rank_.process.join()
                rank_.results.close()


def _inherited_groups() -> dict[str, Any]:
    """Return the process groups that megatron-core had in the parent process.

    Replacing one would destroy it, which waits for its threads: a fork has none of them.
    """
    from megatron.core import parallel_state

    return dict(vars(parallel_state))


def _run_rank(
    send: Connection,
    function: Callable[..., Any],
    args: Sequence[Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
) -> None:
    from ml_parallel import platform

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    inherited = _inherited_groups()  # noqa: F841  # alive until the process ends
    try:
        platform.activate("cpu")
        path = str(Path(folder) / "store")
        store = torch.distributed.FileStore(path, world_size)  # type: ignore[attr-defined]
        torch.distributed.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        message = pickle.dumps((True, function(*args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    send.send_bytes(message)
    send.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # The fork carries the parent's exit handlers and threads' state: leave without them.
    os._exit(0)


def _collect(ranks: Sequence[_Rank], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = monotonic() + timeout
    while len(results) < len(ranks):
        pending: dict[Any, int] = {
            rank.results: i for i, rank in enumerate(ranks) if i not in results
        }
        ready = wait(list(pending), timeout=max(0.0, deadline - monotonic()))
        if not ready:
            raise RankFailedError(f"ranks {sorted(pending.values())} not done in {timeout} s")
        for connection in ready:
            rank = pending[connection]
            results[rank] = _receive(ranks[rank], rank)
    return [results[rank] for rank in range(len(ranks))]


def _receive(rank: _Rank, number: int) -> Any:
    try:
        succeeded, value = pickle.loads(rank.results.recv_bytes())
    except EOFError:
        rank.process.join()
        raise RankFailedError(f"rank {number} died: exit code {rank.process.exitcode}") from None
    if not succeeded:
        raise RankFailedError(f"rank {number} failed:\n{value}")
    return value
