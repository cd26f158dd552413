"""The helper that runs functions on ranks must itself not lie."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from ml_parallel.testing import RankFailedError, free_port, run_ranks


def test_results_come_back_by_rank_with_their_arguments():
    results = run_ranks(lambda a: (int(os.environ["RANK"]), a), 3, "x")
    assert results == [(0, "x"), (1, "x"), (2, "x")]


def fail_on(rank):
    if torch.distributed.get_rank() == rank:
        raise ValueError(f"boom on {rank}")
    torch.distributed.barrier()


def test_a_failing_rank_is_reported_with_its_traceback_while_others_wait():
    started = time.monotonic()
    with pytest.raises(RankFailedError, match=r"rank 1 failed:(.|\n)*boom on 1"):
        run_ranks(fail_on, 2, 1, timeout=30)
    assert time.monotonic() - started < 15


def die(rank):
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankFailedError, match="rank 1 died: exit code -9"):
        run_ranks(die, 2, 1, timeout=30)


def test_ranks_that_hang_are_named_and_killed():
    with pytest.raises(RankFailedError, match=r"ranks \[1\] not done in 1\.0 s"):
        run_ranks(hang, 2, timeout=1.0)


def hang():
    if torch.distributed.get_rank() == 1:
        time.sleep(60)


def test_a_free_port_can_be_bound():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
