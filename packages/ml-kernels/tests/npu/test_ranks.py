"""Several simulated NPUs: names of communicators are torch_npu's, collectives are gloo's."""

from __future__ import annotations

import os

import pytest
import torch
import torch_npu
from npu_ranks import RankFailedError, communicator, run_ranks
from npu_simulator import semantics, simulated, to_cpu
from torch import distributed as dist


@semantics("npu_mm_all_reduce_base")
def mm_all_reduce(x1, x2, hcom, **_):
    product = x1 @ x2
    dist.all_reduce(product, group=communicator(hcom))
    return product


def multiply_in_pairs(factor):
    rank = dist.get_rank()
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    name = group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank(group))
    x = simulated(torch.full((2, 2), float(rank)), requires_grad=True)
    with torch.no_grad():
        out = torch_npu.npu_mm_all_reduce_base(x, factor * torch.eye(2, device="npu"), name)
    dist.all_reduce(out)
    (x * x).sum().backward()
    return to_cpu(out), to_cpu(x.grad)


def fail_on_one_rank():
    assert dist.get_rank() != 1, "not on this one"


def test_an_operator_meets_the_ranks_of_its_communicator():
    results = run_ranks(multiply_in_pairs, 4, 10.0)
    for rank, (out, gradient) in enumerate(results):
        assert torch.equal(out, torch.full((2, 2), 10.0 * (0 + 1 + 2 + 3) * 2))
        assert torch.equal(gradient, torch.full((2, 2), 2.0 * rank))


def test_a_rank_that_fails_fails_the_test_with_its_traceback():
    with pytest.raises(RankFailedError, match="not on this one"):
        run_ranks(fail_on_one_rank, 2)


def die_on_one_rank():
    if dist.get_rank() == 1:
        os._exit(3)


def test_a_rank_that_dies_fails_the_test():
    with pytest.raises(RankFailedError, match="rank 1: died with exit code 3"):
        run_ranks(die_on_one_rank, 2)
