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


@pytest.mark.slow
def test_operators_are_compared_with_eager_and_hugging_face() -> None:
    printed = run("kernels.py", "rms_norm", "linear_cross_entropy")
    table, memory = printed.split("| linear + cross entropy")
    assert re.search(r"^\| operator \| dtype \| ours \| / eager \| / Hugging Face \|$", table, re.M)
    speed = r"^\| rms_norm \| (float32|bfloat16) \| [\d.]+ ms \| [\d.]+x \| [\d.]+x \|$"
    assert re.findall(speed, table, re.M) == ["float32", "bfloat16"]
    assert list(rows(memory))[-3:] == ["full logits", "torch, chunked", "ours"]


@pytest.mark.slow
def test_conversion_is_compared_with_copying_and_with_transformers() -> None:
    printed = run("convert.py", "--models", "1B")
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 1B")]
    assert [line[1].partition(",")[0] for line in lines] == [
        *["to Megatron"] * 2,
        *["to Hugging Face"] * 2,
        "transformers",
    ]
    ours, theirs = ([float(line[6].strip(" |").replace(",", "")) for line in part]
                    for part in (lines[:4], lines[4:]))  # fmt: skip
    assert 10 < min(ours) <= max(ours) < 200 < min(theirs)  # MiB
    assert re.search(r"^`ml-convert --help` takes 0\.\d+ CPU seconds", printed, re.M)


@pytest.mark.slow
def test_preparing_data_is_compared_with_the_tokenizer_alone() -> None:
    printed = run("data.py")
    found = rows(printed)
    for backend in ("`tokenizers`", "`gigatoken`"):
        _, ratio, _, first_token, memory = found[backend]
        assert float(ratio) > 0
        assert 0 < float(first_token) < 60  # seconds
        assert 100 < float(memory) < 500  # MB, of all processes
    assert "All backends wrote the same files." in printed
    assert list(found)[-3:] == ["pre-training", "instruction", "instruction, packed"]


def test_an_operator_that_is_not_timed_is_refused() -> None:
    command = [sys.executable, BENCH / "kernels.py", "rmsnorm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no operator rmsnorm; there are add_rms_norm, " in done.stderr
