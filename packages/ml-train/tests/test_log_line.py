"""Lines of the log are spelled as Megatron's, and those who parse Megatron's read them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from some_steps import make_step

from ml_train.log_line import evaluation_line, step_line


def test_a_line_is_megatrons_to_the_letter() -> None:
    assert step_line(make_step(), log_throughput=False) == (
        " iteration        7/     100 | consumed samples:          112 | "
        "elapsed time per iteration (ms): 250.0 | learning rate: 3.000000E-04 | "
        "global batch size:    16 | lm loss: 8.500000E+00 | loss scale: 1.0 | grad norm: 2.346 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 | "
        "tokens per second per device: 16384.0 | MFU: 45.7% |"
    )


def test_throughput_stands_where_megatron_has_it() -> None:
    line = step_line(make_step(), log_throughput=True)
    assert "(ms): 250.0 | throughput per GPU (TFLOP/s/GPU): 12.3 | learning rate: 3." in line
    slow = step_line(make_step(tflops_per_device=0.01234), log_throughput=True)
    assert "throughput per GPU (TFLOP/s/GPU): 0.0123 | " in slow


def test_a_parser_of_megatrons_log_reads_it() -> None:
    step = make_step(1234, loss=float("nan"), nan_iterations=1, grad_norm=float("inf"))
    line = step_line(step, log_throughput=True)
    head = re.match(r"\s*iteration\s+(\d+)\s*/\s*(\d+)\s*\|(.+)", line)
    assert head is not None
    pairs = re.findall(r"\s*([^|:]+?)\s*:\s*([^|]+?)\s*\|", head[3])
    numbers = {key: float(value) for key, value in pairs if key != "MFU"}
    assert (int(head[1]), int(head[2])) == (1234, 100)
    assert [*numbers] == [
        "consumed samples",
        "elapsed time per iteration (ms)",
        "throughput per GPU (TFLOP/s/GPU)",
        "learning rate",
        "global batch size",
        "lm loss",
        "loss scale",
        "grad norm",
        "number of skipped iterations",
        "number of nan iterations",
        "tokens per second per device",
    ]
    assert numbers["number of nan iterations"] == 1
    assert str(numbers["lm loss"]) == "nan"


def test_an_evaluation_says_loss_and_perplexity() -> None:
    assert evaluation_line(20, 2.0) == (
        " validation loss at iteration 20 | lm loss value: 2.000000E+00 | "
        "lm loss PPL: 7.389056E+00 | "
    )
    assert "PPL: 4.851652E+08" in evaluation_line(20, 900.0)  # e^20, as in Megatron


MEASURE = """
import json

import torch

from ml_train.log_line import memory_line


def read():
    return memory_line(torch.device("cpu"), rank=3, iteration=1)


torch.ones(2**20)
lines = [read()]
block = torch.ones(256 * 2**20 // 4)
lines.append(read())
del block
lines.append(read())
print(json.dumps(lines))
"""


def test_the_memory_of_a_cpu_is_that_of_its_process() -> None:
    """In a process of its own: in this one, earlier tests leave memory to be given back."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True
    )
    allocated, peak = [], []
    for line in json.loads(result.stdout):
        found = re.fullmatch(
            r"\[Rank 3\] \(after 1 iterations\) memory \(MB\)"
            r" \| allocated: ([\d.]+) \| max allocated: ([\d.]+)",
            line,
        )
        assert found is not None, line
        allocated.append(float(found[1]))
        peak.append(float(found[2]))
    assert 250 < allocated[1] - allocated[0] < 300
    assert peak[1] >= allocated[1] - 1
    assert allocated[2] < allocated[1] - 200
    assert peak[2] >= allocated[1] - 1
