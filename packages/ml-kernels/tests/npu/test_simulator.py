"""The simulator itself: what the other tests here rest on."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from npu_simulator import (
    MissingDerivativeError,
    UnusedMutationError,
    fake,
    fake_npu,
    mutated,
    recorded_calls,
    semantics,
    simulated,
    to_cpu,
    vjp,
)


def rotated(input, r1, r2, rotary_mode="half"):
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat((-second, first), -1) * r2


@pytest.fixture
def rotary():
    semantics("npu_rotary_mul")(lambda input, r1, r2, rotary_mode, rotate: rotated(input, r1, r2))
    semantics("npu_rotary_mul_backward")(
        lambda grad, input, r1, r2, rotary_mode: vjp(rotated, [input, r1, r2], [grad])
    )
    return torch_npu.npu_rotary_mul


def test_values_and_gradients_go_through_torch_npus_own_formula(rotary):
    inputs = [torch.randn(2, 3, 4, 8) for _ in range(3)]
    upstream = torch.randn(2, 3, 4, 8)
    leaves = [simulated(t, requires_grad=True) for t in inputs]
    with recorded_calls() as calls:
        out = rotary(*leaves)
        out.backward(simulated(upstream))
    assert [operator for operator, _ in calls] == ["npu_rotary_mul", "npu_rotary_mul_backward"]
    assert calls[0][1]["rotary_mode"] == "half"
    assert out.device == torch.device("npu", 0)
    torch.testing.assert_close(to_cpu(out), rotated(*inputs))
    expected = vjp(rotated, inputs, [upstream])
    torch.testing.assert_close(tuple(to_cpu(t.grad) for t in leaves), expected)


def test_a_mutation_changes_the_call_and_an_unused_one_is_an_error(rotary):
    inputs = [torch.randn(2, 3, 4, 8) for _ in range(3)]
    with mutated("npu_rotary_mul", lambda arguments: {"r2": -arguments["r2"]}):
        out = rotary(*map(simulated, inputs))
    torch.testing.assert_close(to_cpu(out), rotated(inputs[0], inputs[1], -inputs[2]))
    with (
        pytest.raises(UnusedMutationError, match="npu_swiglu was never called"),
        mutated("npu_swiglu", lambda _: {}),
    ):
        rotary(*map(simulated, inputs))


def test_an_operator_without_semantics_fails_loudly():
    with pytest.raises(NotImplementedError, match=r'@semantics\("npu_gelu"\)'):
        torch_npu.npu_gelu(simulated(torch.ones(3)))


def test_torchs_own_operators_views_and_writes_work():
    x = simulated(torch.arange(6.0))
    x.view(2, 3)[1].mul_(10)
    x += torch.ones(6, device="npu")
    assert x.cpu().tolist() == [1, 2, 3, 31, 41, 51]
    assert x[3].item() == 31
    assert torch.ones(2).to("npu").device.type == "npu"
    assert (x[:2] * torch.tensor([2.0, 3.0], device="npu")).cpu().tolist() == [2, 6]
    weight = torch.nn.Parameter(x)
    (weight.double() ** 2).sum().backward()
    torch.testing.assert_close(to_cpu(weight.grad), 2 * x.cpu())


def test_a_tensor_left_on_the_cpu_is_refused():
    x = simulated(torch.ones(2, 2))
    assert (x * torch.tensor(2.0)).cpu().sum() == 8
    with pytest.raises(RuntimeError, match=r"not on the NPU like the others: \(2,\)"):
        x + torch.ones(2)


def test_fake_tensors_run_the_real_meta_kernels():
    with fake_npu(), recorded_calls() as calls:
        x = fake(4, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        out, rstd = torch_npu.npu_rms_norm(x, fake(16, dtype=torch.bfloat16))
        out.sum().backward()
    assert (out.shape, out.dtype, out.device.type) == (x.shape, torch.bfloat16, "npu")
    assert (rstd.shape, rstd.dtype) == ((4, 2, 1), torch.float32)
    assert x.grad.shape == x.shape
    assert [operator for operator, _ in calls] == ["npu_rms_norm", "npu_rms_norm_backward"]


def test_an_operator_without_a_derivative_fails_the_test():
    with fake_npu():
        x, weight = fake(4, 8, requires_grad=True), fake(2, 8, 16)
        sizes = torch.empty(2, dtype=torch.int64, device="npu")

        def multiply():
            return torch_npu.npu_grouped_matmul(
                [x], [weight], group_list=sizes, split_item=3, group_type=0, group_list_type=1
            )

        with pytest.raises(MissingDerivativeError, match="npu_grouped_matmul has no derivative"):
            multiply()
        with torch.no_grad():
            assert multiply()[0].shape == (4, 16)
