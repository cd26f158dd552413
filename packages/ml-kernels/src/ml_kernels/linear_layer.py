"""The linear layer: a matrix product with the transpose of its weight.

Shapes: `...` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ml_kernels.autocast import as_autocast_has
from ml_kernels.checks import check_floating, check_same_device, check_same_dtype, require
from ml_kernels.dispatch import Backend, implementation


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return `x @ weight.T + bias`, as `torch.nn.functional.linear`; under autocast in its dtype.

    Args:
        x: `(..., I)`, any floating dtype.
        weight: `(O, I)` in the dtype of `x`.
        bias: `(O,)` in the dtype of `x`.
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
    return implementation("linear", x, backend)(x, weight, bias)


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Torch's own."""
    return F.linear(x, weight, bias)
