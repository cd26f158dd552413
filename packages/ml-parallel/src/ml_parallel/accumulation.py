"""Adding the gradients of a micro-batch to the float32 buffer, on a CPU.

megatron-core does it with `main_grad.add_(grad)`. For a gradient in bfloat16 torch on a CPU first
writes all of it in float32 and then reads that again: for a table of words half of the time of the
addition. In blocks, what lies between stays in the cache.
"""

from __future__ import annotations

from typing import Any

import torch

_BLOCK = 1 << 18
"""Elements added at a time: 1 MiB in float32."""


def accumulate_in_blocks(module: torch.nn.Module) -> None:
    """Let the gradients of parameters on a CPU be added in blocks, where they are converted.

    Args:
        module: Already wrapped by megatron-core's `DistributedDataParallel`, which then finds
            `grad_added_to_main_grad` set and does not add them again.
    """
    for parameter in module.parameters():
        main = getattr(parameter, "main_grad", None)
        if main is None or parameter.device.type != "cpu" or parameter.dtype == main.dtype:
            continue
        # megatron-core asks for this where an embedding is also the output layer, for its fused
        # kernel, whose gradients hold nothing. There is none on a CPU, and gradients that are
        # added here would be added again.
        parameter.zero_out_wgrad = False  # type: ignore[attr-defined]
        parameter.register_post_accumulate_grad_hook(_add)  # type: ignore[no-untyped-call]


def _add(parameter: Any) -> None:
    """Add the gradient of a micro-batch, which is whole: of all uses of the parameter."""
    main, gradient = parameter.main_grad, parameter.grad
    flat = (main.view(-1), gradient.reshape(-1))
    for total, block in zip(*(torch.split(x, _BLOCK) for x in flat), strict=True):
        total.add_(block)
    parameter.grad_added_to_main_grad = True
