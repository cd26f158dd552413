"""The machine and the versions that a benchmark ran on, as Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch


def machine(*packages: str) -> Iterator[str]:
    """Describe the machine, and the versions of these packages."""
    if torch.cuda.is_available():
        yield f"- {torch.cuda.get_device_name()}"
    yield f"- {_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    yield "- " + ", ".join(f"{name} {version(name)}" for name in packages)
    yield f"- Python {platform.python_version()}"


def _cpu() -> str:
    """Return the name of the CPU model as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "CPU")
