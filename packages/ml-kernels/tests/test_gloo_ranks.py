"""The helper that runs functions on ranks must itself not lie."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest
import torch
from gloo_ranks import RankFailedError, run_ranks


def sum_of_ranks(offset):
    value = torch.tensor([float(torch.distributed.get_rank() + offset)])
    torch.distributed.all_reduce(value)
    return value


def on_rank_one(do):
    if torch.distributed.get_rank() == 1:
        do()
    else:
        torch.distributed.barrier()


def test_ranks_communicate_and_their_results_come_back():
    assert run_ranks(sum_of_ranks, 3, 10) == [torch.tensor([33.0])] * 3
    assert run_ranks(torch.distributed.get_rank, 2) == [0, 1]


def test_a_failing_rank_is_reported_with_its_traceback_while_others_wait():
    def boom():
        raise ValueError("boom")

    with pytest.raises(RankFailedError, match=r"rank 1 failed:(.|\n)*in boom(.|\n)*ValueError"):
        run_ranks(on_rank_one, 2, boom)


def test_a_dead_rank_is_reported():
    with pytest.raises(RankFailedError, match="rank 1 died"):
        run_ranks(on_rank_one, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_rank_that_hangs_is_named():
    with pytest.raises(RankFailedError, match=r"ranks \[0, 1\] not done in 1\.0 s"):
        run_ranks(on_rank_one, 2, lambda: time.sleep(60), timeout=1.0)


def test_a_rank_outlives_its_function_until_all_are_done():
    """Gloo fails on a rank that still connects to one that is gone."""

    def has_ended():
        ranks = [None, None]
        torch.distributed.all_gather_object(ranks, os.getpid())
        if torch.distributed.get_rank() == 0:
            return False
        return bool(select.select([os.pidfd_open(ranks[0])], [], [], 0.3)[0])

    assert run_ranks(has_ended, 2) == [False, False]
