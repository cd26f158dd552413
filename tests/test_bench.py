"""The benchmarks run and print their tables; what the tables say is not a test's business."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench"


def run(script: str, *flags: str) -> str:
    command = [sys.executable, BENCH / script, "--quick", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of every table row by its first cell."""
    lines = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


@pytest.mark.slow
def test_training_is_compared_with_the_hugging_face_trainer() -> None:
    printed = run("train.py", "--dtype", "bf16")
    assert re.search(r"torch \S+, megatron-core 0\.16", printed)
    found = rows(printed)
    theirs, ours = (found[name] for name in ("Hugging Face Trainer", "ml-train pretrain"))
    assert theirs[1] == "1.00"
    tokens = [float(side[0].replace(",", "")) for side in (theirs, ours)]
    assert float(ours[1]) == pytest.approx(tokens[1] / tokens[0], rel=0.05, abs=0.01)
    assert 0 < float(ours[2]) < 1  # MFU
