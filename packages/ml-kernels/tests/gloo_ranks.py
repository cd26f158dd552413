"""Run a function on several gloo ranks: forked from the test, so that two of them start at once.

The ranks inherit the function and its arguments by fork: closures work, nothing is pickled but the
results. Each rank has one torch thread and the default process group, over a file.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
import warnings
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def run_ranks(function, world_size, *args, timeout=60.0):
    """Call `function(*args)` on every rank and return the results by rank.

    `torch.distributed` is initialised in the ranks; `torch.distributed.group.WORLD` is their group.
    When one fails, `RankFailedError` is raised here with its traceback, and the others are killed.
    """
    if torch.accelerator.is_available():
        # Autograd's threads for the device do not survive a fork.
        pytest.skip("ranks on gloo are forked: covered by the tests on a machine without devices")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _start(function, args, rank, world_size, str(Path(folder) / "store"), timeout)
            for rank in range(world_size)
        ]
        try:
            return _collect([results for _, results in ranks], timeout)
        finally:
            for process, results in ranks:
                process.kill()
                process.join()
                results.close()


def _start(function, args, rank, world_size, store, timeout):
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(
        target=_run_rank, args=(send, function, args, rank, world_size, store, timeout)
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of threads. The rank uses none of the parent's: it computes on one.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    send.close()
    return process, receive


def _run_rank(send, function, args, rank, world_size, store, timeout):
    torch.set_num_threads(1)  # the parent's OpenMP threads were not forked
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        message = pickle.dumps((True, function(*args)))
    except BaseException:
        message = pickle.dumps((False, f"failed:\n{traceback.format_exc()}"))
    send.send_bytes(message)
    sleep(timeout)  # other ranks may still be connecting to this one: the parent ends it
    os._exit(0)  # pytest's own exit handlers came along with the fork


def _collect(connections, timeout):
    results, failures = {}, {}
    deadline = monotonic() + timeout
    while len(results) + len(failures) < len(connections):
        pending = {
            c: rank
            for rank, c in enumerate(connections)
            if rank not in results and rank not in failures
        }
        ready = wait(list(pending), timeout=max(0.0, deadline - monotonic()))
        if not ready and not failures:
            raise RankFailedError(f"ranks {sorted(pending.values())} not done in {timeout} s")
        if not ready:
            break
        for connection in ready:
            succeeded, value = _receive(connection)
            (results if succeeded else failures)[pending[connection]] = value
        if failures:
            # Ranks fail when their peers do: give the one that was first the time to say so.
            deadline = min(deadline, monotonic() + 0.5)
    if failures:
        raise RankFailedError("\n".join(f"rank {r} {failures[r]}" for r in sorted(failures)))
    return [results[rank] for rank in range(len(connections))]


def _receive(connection):
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "died"
