"""The Ascend runtime: whether it is there, and making it answer torch's CUDA interface."""

from __future__ import annotations

import warnings


def why_unavailable() -> str | None:
    """Say why no NPU can be used, or None when one can. Imports torch_npu."""
    try:
        import torch_npu
    except (ImportError, RuntimeError) as error:
        # Without CANN the import stops at a missing libhccl.so or libascendcl.so.
        return f"torch_npu does not load ({error})"
    return None if torch_npu.npu.is_available() else "torch_npu finds no NPU"


def answer_cuda_calls() -> None:
    """Make `torch.cuda.*`, "cuda" devices and "nccl" mean the NPU, for the whole process.

    This is torch_npu's own adapter; importing it is what activates it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces every name it replaces
        import torch_npu
        from torch_npu.contrib import transfer_to_npu

    assert torch_npu is not None
    assert transfer_to_npu is not None
