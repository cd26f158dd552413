"""The Triton kernels as machine code for an H100, which needs no GPU to be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = (
    "activation.backward",
    "activation.forward",
    "loss.backward",
    "loss.forward",
    "loss.lose",
    "norm.backward",
    "norm.forward",
    "rotary.rotate",
)


def test_every_kernel_compiles_and_moves_16_bytes_at_a_time(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, Path(__file__).with_name("hopper.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = [line.split() for line in printed.splitlines()]
    dtypes = ("bfloat16", "float32")
    assert sorted(row[:2] for row in rows) == [[k, d] for k in KERNELS for d in dtypes]
    # 128 bits are the widest access there is. The statistics of a loss are a number a row.
    narrow = [row for row in rows if row[2] != "128" or row[3] != "128"]
    assert [row[0] for row in narrow] == ["loss.forward"] * len(dtypes)
    assert all(row[2] == "128" for row in narrow)
