"""AdamW on an NPU: torch's own fused operator, which torch_npu implements.

torch_npu has a second one, `npu_apply_adam_w`, documented for Atlas A2. CANN lists its kernel,
aclnnApplyAdamW, for Ascend 950 only, and its own test runs nowhere else; torch's operator goes
through aclnnApplyAdamWV2, which A2 and A3 have. So the latter it is.
"""

from __future__ import annotations

import pytest
import torch
from npu_simulator import fake, fake_npu, mutated, simulated

import ml_kernels

SETTINGS = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.3}


def state(shapes=((3, 5), (7,)), dtypes=(torch.float32,) * 4):
    """Return parameters, gradients and both moments."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(s, generator=generator).to(d) for s in shapes] for d in dtypes]
    return [*lists[:3], [t.square() for t in lists[3]]]


def assert_like_reference(given):
    on_npu = [[simulated(t) for t in tensors] for tensors in given]
    for step in (1, 2, 3):
        ml_kernels.adamw(*given, step=step, **SETTINGS, backend="reference")
        ml_kernels.adamw(*on_npu, step=step, **SETTINGS)
    found = [[t.cpu() for t in tensors] for tensors in on_npu]
    torch.testing.assert_close(found, given, rtol=1e-5, atol=1e-6)


def test_torch_npu_implements_torchs_fused_operator():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1")


def test_three_steps_agree_with_the_reference():
    assert_like_reference(state())


def test_half_precision_parameters_with_float32_moments_agree_with_the_reference():
    half, wide = torch.bfloat16, torch.float32
    assert_like_reference(state(dtypes=(half, half, wide, wide)))


def test_transposed_and_empty_parameters_are_accepted():
    assert_like_reference([[t.t() for t in tensors] for tensors in state(shapes=((3, 5), (0, 2)))])


@pytest.mark.parametrize(
    "change",
    [
        lambda call: {"lr": 0.02},
        lambda call: {"beta1": call["beta2"]},
        lambda call: {"eps": 1e-8},
        lambda call: {"weight_decay": 0.0},
        lambda call: {"maximize": True},
        lambda call: {"state_steps": [step - 1 for step in call["state_steps"]]},
        lambda call: {"exp_avgs": call["exp_avg_sqs"], "exp_avg_sqs": call["exp_avgs"]},
    ],
)
def test_a_wrong_call_is_noticed(change):
    with mutated("aten::_fused_adamw_", change), pytest.raises(AssertionError):
        assert_like_reference(state())


def test_the_call_is_accepted_on_fake_tensors():
    with fake_npu():
        tensors = [[fake(3, 5), fake(7)] for _ in range(4)]
        ml_kernels.adamw(*tensors, step=1, **SETTINGS)
    assert tensors[0][0].device.type == "npu"
