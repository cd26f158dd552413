"""The gradients of matrix products with a collective, whoever computes the products.

Neither the ring of `overlapped` nor an NPU's fused kernels have a derivative that autograd knows.
Each gives a product here, with the function that computes its gradients.

Shapes: `R` rows of the whole group, `tp` ranks, `I` and `O` inner and outer width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ml_kernels.collective_matmul import start_all_gather, start_reduce_scatter
from ml_kernels.derivatives import once_differentiable

Product = Callable[[torch.Tensor, torch.Tensor, dist.ProcessGroup], torch.Tensor]
"""Of x and weight; see the public functions of `collective_matmul` for the shapes."""

Gradients = tuple["torch.Tensor | None", "torch.Tensor | None"]
"""Of x and weight, None where not needed."""

Backward = Callable[
    [torch.Tensor, "torch.Tensor | None", torch.Tensor, dist.ProcessGroup, bool], Gradients
]
"""From the gradient of the product, x, weight, group, and whether the gradient of x is needed.

`x` is None where the gradient of the weight is not needed.
"""


def with_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    product: Product,
    backward: Backward,
) -> torch.Tensor:
    """Return `product(x, weight, group)`, known to autograd."""
    result: torch.Tensor = _Product.apply(x, weight, group, product, backward)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        group: dist.ProcessGroup,
        product: Product,
        backward: Backward,
    ) -> torch.Tensor:
        # Activations are not kept for a frozen weight. The weight is there anyway, and the fused
        # gather of an NPU multiplies by it for either gradient.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.gradients = group, backward
        return product(x, weight, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = ctx.gradients(gradient, *ctx.saved_tensors, ctx.group, ctx.needs_input_grad[0])
        return *found, None, None, None


def gathered_backward(
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    group: dist.ProcessGroup,
    x_needed: bool,
) -> Gradients:
    """Return the gradients of `all_gather_matmul`.

    The gather of `x` hides behind the first product, the scatter of its gradient behind the second,
    as in Megatron.
    """
    of_x = of_weight = None
    if x is not None:
        gathered, arrival = start_all_gather(x, group)
    if x_needed:
        of_x, reduction = start_reduce_scatter(gradient @ weight, group)
    if x is not None:
        arrival.wait()
        of_weight = gradient.t() @ gathered
    if x_needed:
        reduction.wait()
    return of_x, of_weight


def reduced_backward(
    gradient: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    _group: dist.ProcessGroup,
    x_needed: bool,
) -> Gradients:
    """Return the gradients of `matmul_all_reduce`: those of this rank's own product."""
    return gradient @ weight if x_needed else None, None if x is None else gradient.t() @ x
