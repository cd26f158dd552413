"""Bind megatron-core to a device: once, explicitly, at the start of a process that trains.

megatron-core says `torch.cuda` wherever it means "the accelerator". On CUDA that is true; on NPU
torch_npu's own adapter answers those calls; on CPU `platform.cpu` does. Above this module the same
code runs everywhere.

    device = platform.activate("auto")
    platform.initialize_process_group(device)
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version

import torch

from ml_kernels.device import COLLECTIVES, DeviceChoice, DeviceType, resolve
from ml_parallel.platform import cpu, meeting, memory, patches
from ml_parallel.platform.patches import EngineMismatchError, Patch

__all__ = [
    "Device",
    "EngineMismatchError",
    "Patch",
    "activate",
    "active_patches",
    "import_engine",
    "initialize_process_group",
]

logger = logging.getLogger(__name__)

ENGINE_VERSION = "0.16"
"""The megatron-core release line that the patches were written for."""

_ENGINE_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer.optimizer_config",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel.random",
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that megatron-core is bound to."""

    type: DeviceType
    index: int
    """Which device of its kind this process uses: its local rank; 0 on CPU."""

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device("cpu") if self.type == "cpu" else torch.device(self.type, self.index)

    @property
    def collectives(self) -> str:
        """The torch.distributed backend of this device."""
        return COLLECTIVES[self.type]


_active: Device | None = None


def import_engine() -> None:
    """Import megatron-core without its warnings that Transformer Engine and Apex are missing.

    Raises:
        EngineMismatchError: The installed megatron-core is of another release line.
    """
    found = version("megatron-core")
    if not found.startswith(ENGINE_VERSION + "."):
        raise EngineMismatchError(
            f"megatron-core {found} is installed; this version of ml-parallel is written for "
            f"{ENGINE_VERSION}.x: pip install 'megatron-core=={ENGINE_VERSION}.*'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _ENGINE_MODULES:
            import_module(module)


def activate(choice: DeviceChoice = "auto", *, index: int | None = None) -> Device:
    """Bind megatron-core to a device for the rest of this process; a second call must agree.

    Args:
        choice: "auto" prefers an NPU, then a GPU, then the CPU.
        index: Which device of its kind; the environment's LOCAL_RANK when None.

    Raises:
        ValueError: The device cannot be used; the message says why.
        EngineMismatchError: megatron-core is not the one the patches were written for.
        RuntimeError: The process is bound to another device already.
    """
    global _active
    kind = resolve(choice)
    index = int(os.environ.get("LOCAL_RANK", "0")) if index is None else index
    device = Device(type=kind, index=0 if kind == "cpu" else index)
    # megatron-core's deprecation notes, and torch's about what it calls, speak to its maintainers.
    # Also when bound already: this may be a fork whose parent has other filters by now.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if _active is not None:
        if _active != device:
            raise RuntimeError(f"this process is bound to {_active}; it cannot change to {device}")
        return _active
    if kind == "npu":
        from ml_kernels.npu import runtime

        runtime.answer_cuda_calls()
    import_engine()
    patches.apply(active_patches(kind))
    if kind == "cpu":
        memory.keep_freed_memory()
    else:
        _check_index(kind, index)
        torch.cuda.set_device(index)
    _active = device
    return device


def _check_index(kind: DeviceType, index: int) -> None:
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(
            f"--nproc-per-node {index + 1} or more: this node has {count} devices of type {kind}"
        )


def active_patches(kind: DeviceType) -> tuple[Patch, ...]:
    """List every name that `activate` replaces on a device, with the reason."""
    return (*patches.EVERYWHERE, *cpu.PATCHES) if kind == "cpu" else patches.EVERYWHERE


def initialize_process_group(
    device: Device, *, timeout_minutes: float = 45.0, join_minutes: float = 10.0
) -> None:
    """Join the process group that the launcher describes in the environment.

    Without RANK and WORLD_SIZE the group has this one process.

    Args:
        device: Decides the backend: hccl, nccl or gloo.
        timeout_minutes: How long a collective waits for a missing rank.
        join_minutes: How long to wait here until all ranks have come.

    Raises:
        ConnectionError: Node 0 cannot be reached, or not all ranks came.
        ValueError: The environment does not say where the ranks meet.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        meeting.join(device.collectives, timeout=timeout, patience=timedelta(minutes=join_minutes))
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        device.collectives, store=store, rank=0, world_size=1, timeout=timeout
    )
