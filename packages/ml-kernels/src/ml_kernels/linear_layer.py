"""The linear layer: a matrix product with the transpose of its weight.

Shapes: `...` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ml_kernels.checks import check_floating, check_same_device, check_same_dtype, require
from ml_kernels.dispatch import Backend, implementation


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    main_grad: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, as `torch.nn.functional.linear`; under autocast in its dtype.

    Args:
        x: `(..., I)`, any floating dtype.
        weight: `(O, I)` in the dtype of `x`.
        bias: `(O,)` in the dtype of `x`.
        main_grad: `(O, I)` float32, such as Megatron's DDP keeps for each weight. Backward adds the
            gradient of the weight to it, a few rows at a time while they are in the cache, and
            what autograd gets as that gradient is memory without a meaning (Megatron's
            "gradient accumulation fusion").
        backend: Force an implementation by name.

    Returns:
        `(..., O)` in the dtype of `x`.

    Raises:
        ValueError: Shapes or devices do not fit together.
        TypeError: The dtypes differ, or are not floating point.
    """
    x, weight = as_autocast_has(x), as_autocast_has(weight)
    bias = None if bias is None else as_autocast_has(bias)
    check_floating("linear", "x", x)
    require(
        weight.dim() == 2 and x.dim() > 0 and weight.shape[1] == x.shape[-1],
        "linear",
        "weight",
        tuple(weight.shape),
        f"must be (outputs, inputs) for x {tuple(x.shape)}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_same_device("linear", name, tensor, x)
            check_same_dtype("linear", name, tensor, x)
    if bias is not None:
        require(
            bias.shape == weight.shape[:1],
            "linear",
            "bias",
            tuple(bias.shape),
            f"must be ({weight.shape[0]},), the outputs of the weight",
        )
    if main_grad is None:
        return implementation("linear", x, backend)(x, weight, bias)
    require(
        main_grad.shape == weight.shape and main_grad.dtype == torch.float32,
        "linear",
        "main_grad",
        (tuple(main_grad.shape), main_grad.dtype),
        f"must be float32 {tuple(weight.shape)}, as the weight",
    )
    check_same_device("linear", "main_grad", main_grad, x)
    rows = x.reshape(-1, x.shape[-1])
    out: torch.Tensor = _Accumulating.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, main_grad, backend
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Torch's own."""
    return F.linear(x, weight, bias)


_CHUNK_ELEMENTS = 1 << 19
"""Elements of a weight whose gradient is made and added at a time, on a CPU."""


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        main_grad: torch.Tensor,
        backend: Backend | None,
    ) -> torch.Tensor:
        """Return `(T, O)` from x `(T, I)`."""
        ctx.save_for_backward(x, weight)
        ctx.main_grad, ctx.backend = main_grad, backend
        return implementation("linear", x, backend)(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        product = implementation("linear", x, ctx.backend)
        if of_weight:
            on_cpu = weight.device.type == "cpu"
            step = max(1, _CHUNK_ELEMENTS // weight.shape[1]) if on_cpu else weight.shape[0]
            for start in range(0, weight.shape[0], step):
                rows = slice(start, start + step)
                ctx.main_grad[rows].add_(product(gradient[:, rows].T, x.T, None))
        return (
            product(gradient, weight.T, None) if of_x else None,
            torch.empty_like(weight) if of_weight else None,
            gradient.sum(0) if of_bias else None,
            None,
            None,
        )


def as_autocast_has(tensor: torch.Tensor) -> torch.Tensor:
    """Cast a factor of a product as autocast does: all but float64."""
    if not isinstance(tensor, torch.Tensor):
        return tensor  # and refuse it later
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensor
    narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if narrow else tensor
