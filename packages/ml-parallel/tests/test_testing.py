"""The helper that runs functions on ranks must itself not lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ml_parallel.testing import RankFailedError, run_ranks


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


LEFT_BEHIND = """
import tempfile

import torch

from ml_parallel import platform
from ml_parallel.groups import initialize_groups
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology

platform.activate("cpu")
from megatron.core import parallel_state

store = torch.distributed.FileStore(tempfile.mkdtemp() + "/store", 1)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
initialize_groups(Topology(), num_chunks=1)
parallel_state.destroy_model_parallel()  # forgets most groups, but not all
torch.distributed.destroy_process_group()


def job():
    return initialize_groups(Topology(), num_chunks=1).tp_rank


print(run_ranks(job, 1, timeout=20.0))
"""


def test_groups_that_the_parent_process_left_behind_do_not_stop_a_rank():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[0]\n", done.stderr
