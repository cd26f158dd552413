"""The shared storage of float32 and bfloat16 on an NPU: only torch's operators and views."""

from __future__ import annotations

import torch
from npu_simulator import fake, fake_npu, simulated, to_cpu

from ml_kernels import join_float32, split_float32


def test_split_and_join_on_an_npu_give_every_bit_back():
    bits = torch.randint(-(2**31), 2**31, (10_001,), generator=torch.Generator().manual_seed(0))
    numbers = bits.to(torch.int32).view(torch.float32)
    expected = split_float32(numbers.clone())
    buffer = simulated(numbers)
    for found, part in zip(split_float32(buffer), expected, strict=True):
        assert torch.equal(to_cpu(found).view(torch.int16), part.view(torch.int16))
    join_float32(buffer)
    assert torch.equal(to_cpu(buffer).view(torch.int32), numbers.view(torch.int32))


def test_the_parts_are_views_on_the_npu():
    with fake_npu():
        buffer = fake(10_001)
        weights, residual = split_float32(buffer)
        join_float32(buffer)
    assert (weights.shape, weights.dtype, weights.device.type) == ((10_001,), torch.bfloat16, "npu")
    assert (residual.shape, residual.dtype) == ((10_001,), torch.int16)
    assert weights.untyped_storage()._cdata == buffer.untyped_storage()._cdata
