"""AdamW over lists of tensors, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ml_kernels.checks import (
    check_finite,
    check_floating,
    check_integer,
    check_same_device,
    check_tensor,
    require,
)
from ml_kernels.dispatch import Backend, implementation


def adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    backend: Backend | None = None,
) -> None:
    """Take one step of Adam with decoupled weight decay (arXiv:1412.6980, arXiv:1711.05101).

    The same update as `torch.optim.AdamW`:
    `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    `p = p - lr * wd * p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`.

    Args:
        params: Updated in place; float32, as the main parameters of mixed precision, or any other
            floating dtype, which is then computed in float32 and rounded once.
        grads: One for each parameter, with its shape and device; of its dtype or float32.
        exp_avgs: The running means `m`, likewise; zeros before the first step. Updated in place.
        exp_avg_sqs: The running means of squares `v`, likewise. Updated in place.
        step: Number `t` of this step, 1 at the first.
        lr: Learning rate.
        beta1: Decay of `m`.
        beta2: Decay of `v`.
        eps: Added to the denominator.
        weight_decay: Decoupled decay, multiplied by the learning rate.
        backend: Force an implementation by name.

    Raises:
        ValueError: The lists differ in length, shapes or devices, or a number is out of range.
        TypeError: The dtypes do not fit, or something has another type.
    """
    _check_numbers(step, lr, beta1, beta2, eps, weight_decay)
    _check_lists(params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if not params:
        return
    with torch.no_grad():
        implementation("adamw", params[0], backend)(
            params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay
        )


def adamw_reference(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The formula, one tensor after the other."""
    for param, *state in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        dtype = torch.promote_types(param.dtype, torch.float32)
        p, g, m, v = (tensor.to(dtype) for tensor in (param, *state))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        param.copy_(p * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m / denominator)
        state[1].copy_(m)
        state[2].copy_(v)


def _check_numbers(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    check_integer("adamw", "step", step)
    require(step >= 1, "adamw", "step", step, "must be 1 at the first step, then 2, ...")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        require(0 <= beta < 1, "adamw", name, beta, "must be in [0, 1)")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        require(value >= 0, "adamw", name, value, "must not be negative")
        check_finite("adamw", **{name: value})


def _check_lists(params: Sequence[torch.Tensor], **others: Sequence[torch.Tensor]) -> None:
    for name, tensors in {"params": params, **others}.items():
        if isinstance(tensors, torch.Tensor):
            raise TypeError(f"adamw: {name} is a Tensor: must be a list of tensors")
        rule = f"must be {len(params)}, like params"
        require(len(tensors) == len(params), "adamw", f"{name} of length", len(tensors), rule)
    for i, param in enumerate(params):
        check_floating("adamw", f"params[{i}]", param)
        check_same_device("adamw", f"params[{i}]", param, params[0])
        for name, tensors in others.items():
            _check_like(name, i, tensors[i], param)


def _check_like(name: str, i: int, tensor: torch.Tensor, param: torch.Tensor) -> None:
    check_tensor("adamw", f"{name}[{i}]", tensor)
    if tensor.dtype not in (param.dtype, torch.float32):
        rule = f"must be {param.dtype} like params[{i}], or torch.float32"
        raise TypeError(f"adamw: {name}[{i}] is {tensor.dtype}: {rule}")
    if tensor.shape != param.shape or tensor.device != param.device:
        raise ValueError(
            f"adamw: {name}[{i}] is {tuple(tensor.shape)} on {tensor.device}: must be "
            f"{tuple(param.shape)} on {param.device} like params[{i}]"
        )
