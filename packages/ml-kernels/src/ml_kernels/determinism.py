"""The same bits from the same run: what `--use-deter-comp` means on each device.

Random seeds are the caller's. This is about kernels and collectives that add numbers in an order
that changes from run to run, and about libraries that choose a kernel by measuring.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # cuBLAS: one workspace for every stream
    "HCCL_DETERMINISTIC": ("true", "strict"),  # collectives of Ascend's HCCL
    "LCCL_DETERMINISTIC": ("1",),  # and of its LCCL, between cards of a server
    "CLOSE_MATMUL_K_SHIFT": ("1",),  # products: no rotation of where the sum begins
    "ATB_MATMUL_SHUFFLE_K_ENABLE": ("0",),  # the same in the Ascend Transformer Boost library
    "ATB_LLM_LCOC_ENABLE": ("0",),  # its overlap of products with collectives
}
"""Variables and their values that mean deterministic, in lower case; the first one is set.

Libraries read them when they create handles and communicators, so not after the first use of a
device. Those of other devices do nothing.
"""


_INDUCTOR = "torch._inductor.config"


@dataclass(frozen=True)
class _Settings:
    """Everything that `deterministic` changes."""

    algorithms: bool
    warn_only: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    inductor: bool
    environment: dict[str, str | None]

    @classmethod
    def current(cls) -> _Settings:
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            bool(getattr(sys.modules.get(_INDUCTOR), "deterministic", False)),
            {name: os.environ.get(name) for name in ENVIRONMENT},
        )

    @classmethod
    def deterministic(cls) -> _Settings:
        chosen: dict[str, str | None] = {}
        for name, values in ENVIRONMENT.items():
            given = os.environ.get(name)
            chosen[name] = given if given is not None and given.lower() in values else values[0]
        return cls(True, False, True, False, True, chosen)

    def apply(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        inductor: Any = sys.modules.get(_INDUCTOR)
        if hasattr(inductor, "deterministic"):  # torch sets it along, and cannot tell what it was
            inductor.deterministic = self.inductor
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Undo:
    """Puts the settings before a call of `deterministic` back at the end of a `with` block."""

    def __init__(self) -> None:
        self._settings, self._before = _Settings.current(), _before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _before
        self._settings.apply()
        _before = self._before


_before: _Settings | None = None  # what the first `deterministic(True)` found


def deterministic(enabled: bool = True) -> _Undo:
    """Make torch and the libraries below it compute the same bits every time, or no longer.

    An operation that has no deterministic version raises a RuntimeError of torch from then on. Call
    it before the first use of a device, in every process: `deterministic()`, or
    `with deterministic(): ...` for a part of a program.

    Args:
        enabled: False brings back the settings from before the first call; without one, nothing.

    Returns:
        A context manager that undoes the call; it need not be used.
    """
    global _before
    undo = _Undo()
    if enabled:
        _before = _before or _Settings.current()
        _Settings.deterministic().apply()
    elif _before is not None:
        _before.apply()
        _before = None
    return undo
