"""Tests of what we call of torch_npu, against the real one: `hatch run npu:test`.

They need the wheel of torch_npu, which breaks `import torch` on a machine without an NPU: an
environment of its own has it, and no other environment collects these tests.
"""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import npu_stubs

    npu_stubs.load()

    @pytest.fixture(autouse=True)
    def _simulated_npu():
        from npu_simulator import simulator

        with simulator():
            yield
