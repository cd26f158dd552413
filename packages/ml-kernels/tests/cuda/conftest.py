"""Tests of the Triton kernels on a machine without a GPU: `hatch run triton:test`.

Triton changes what torch compiles to, so an environment of its own has it, with its interpreter
switched on; no other environment collects these tests.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
