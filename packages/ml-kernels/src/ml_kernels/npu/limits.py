"""What torch_npu's kernels document that they cannot do, refused before they run.

Their own checks let most of it through. Empty tensors reach no kernel: where the documentation does
not promise that they work, the caller leaves them to torch.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ml_kernels.dispatch import BackendUnavailableError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuse(operator: str, argument: str, value: object, rule: str) -> NoReturn:
    """Say what the NPU's kernel needs, and what to do without it.

    Raises:
        BackendUnavailableError: Always.
    """
    raise BackendUnavailableError(
        f"{operator}: {argument} {value}: on an NPU {rule}; use backend='reference'"
    )


def check_dtype(operator: str, argument: str, tensor: torch.Tensor) -> None:
    """Refuse what is not float32, float16 or bfloat16.

    Raises:
        BackendUnavailableError: Another dtype.
    """
    if tensor.dtype not in DTYPES:
        refuse(operator, argument, tensor.dtype, "must be float32, float16 or bfloat16")
