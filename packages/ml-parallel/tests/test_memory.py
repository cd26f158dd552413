"""Freed tensors stay in the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys
import torch
from ml_parallel.platform.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for round in range(20):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(choice):
    command = [sys.executable, "-c", _SCRIPT, choice]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_freed_tensor_is_reused_without_page_faults():
    assert 10 * page_faults("keep") < page_faults("return")
