"""Gradients added in blocks are those that megatron-core adds, once each."""

from __future__ import annotations

import pytest
import torch

from ml_parallel.testing import run_ranks

WIDTH = 700  # its square is more than one block, and no multiple of one


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_gradients_of_micro_batches_add_up_in_float32(tied, dtype):
    run_ranks(_check_sum, 1, tied, dtype)


def _check_sum(tied, dtype):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ml_parallel.groups import initialize_groups
    from ml_parallel.optimizer import distribute
    from ml_parallel.topology import Topology

    topology = Topology()
    initialize_groups(topology)
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(2))
    if tied:
        second.weight = first.weight
        second.weight.zero_out_wgrad = True  # as megatron-core marks an embedding that is shared
    module = torch.nn.Sequential(first, second)
    config = TransformerConfig(num_layers=1, hidden_size=WIDTH, num_attention_heads=1)
    batches = [torch.randn(5, WIDTH, dtype=dtype) for _ in range(3)]
    expected = {}
    for parameter in {*module.parameters()}:
        gradients = [torch.autograd.grad(module(x).sum(), parameter)[0] for x in batches]
        expected[parameter] = sum(g.float() for g in gradients)
    (chunk,) = distribute([module], config, topology)
    for x in batches:
        chunk(x).sum().backward()
    for parameter, total in expected.items():
        torch.testing.assert_close(parameter.main_grad, total, rtol=0, atol=0)
        assert parameter.grad is None
        # In float32 nothing is converted, and megatron-core's own addition is as good.
        assert parameter.grad_added_to_main_grad == (dtype == torch.bfloat16)
