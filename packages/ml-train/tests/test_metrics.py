"""A reporter on real outputs: lines, a file of metrics, TensorBoard's files."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_models import flags
from ml_parallel import platform
from ml_parallel.testing import run_ranks
from ml_train.config import PretrainConfig, check_world

platform.import_engine()

from tensorboard.backend.event_processing.event_accumulator import (  # noqa: E402
    EventAccumulator,
)

from ml_train.metrics import Reporter  # noqa: E402
from ml_train.peak import matmul_peak  # noqa: E402
from ml_train.state import Progress  # noqa: E402
from ml_train.step import StepResult  # noqa: E402

CPU = platform.Device(type="cpu", index=0)
FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 64 "
    "--vocab-size 100 --train-iters 6 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 "
    "--data-path x --lr 1e-3 --use-distributed-optimizer"
)


def reporter(
    *more: str, iteration: int = 0, active: bool = True, stream: io.StringIO | None = None
) -> Reporter:
    config = flags.parse(PretrainConfig, [*FLAGS.split(), *map(str, more)], prog="test")
    return Reporter(
        check_world(config, 2),
        CPU,
        active=active,
        world_size=2,
        padded_vocab_size=128,
        iteration=iteration,
        stream=stream,
    )


def train(reporter: Reporter, first: int, last: int, **changes: Any) -> None:
    """Report what a run from step `first` to `last` does."""
    result = {"loss": 5.0, "grad_norm": 1.5, "updated": True, "stop_requested": False}
    result |= {"filled": 1.0, "keys": 32.0}
    for iteration in range(first, last + 1):
        reporter.step(
            Progress(
                iteration=iteration,
                consumed_samples=8 * iteration,
                consumed_tokens=200 * iteration,
            ),
            StepResult(**{**result, **changes}),
            learning_rate=0.001 * iteration,
            loss_scale=1.0,
            elapsed_seconds=0.5,
        )


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_measured_from_its_size_and_its_time(tmp_path: Path) -> None:
    with reporter("--save", tmp_path, stream=io.StringIO()) as opened:
        train(opened, 1, 2, loss=float("nan"), updated=False)
    header, _, step = entries(tmp_path / "metrics.jsonl")
    # 4 h^2 of attention, 2 s h of scores, 8 h^2 of the MLP, twice; h V of logits; 6 for each token.
    flops = 6 * 8 * 32 * (2 * (12 * 64**2 + 2 * 32 * 64) + 64 * 128)
    peak = header["peak_tflops_per_device"]
    assert peak == matmul_peak(CPU.torch, torch.float32)
    assert header["model_flops_per_iteration"] == flops
    assert step == {
        "kind": "step",
        "iteration": 2,
        "train_iters": 6,
        "consumed_samples": 16,
        "consumed_tokens": 400,
        "elapsed_seconds": 0.5,
        "learning_rate": 0.002,
        "global_batch_size": 8,
        "loss": None,
        "loss_scale": 1.0,
        "grad_norm": 1.5,
        "skipped_iterations": 1,
        "nan_iterations": 1,
        "tokens_per_second_per_device": 8 * 32 / 2 / 0.5,
        "tflops_per_device": flops / 2 / 0.5 / 1e12,
        "mfu": flops / 2 / 0.5 / 1e12 / peak,
    }


def test_a_step_of_shorter_rows_is_not_counted_as_one_of_long_ones(tmp_path: Path) -> None:
    with reporter("--save", tmp_path, stream=io.StringIO()) as opened:
        train(opened, 1, 1, filled=0.75, keys=10.5)
    _, step = entries(tmp_path / "metrics.jsonl")
    flops = 6 * 8 * 24 * (2 * (12 * 64**2 + 2 * 10.5 * 64) + 64 * 128)
    assert step["tokens_per_second_per_device"] == 8 * 24 / 2 / 0.5
    assert step["tflops_per_device"] == flops / 2 / 0.5 / 1e12


def test_the_file_begins_with_what_the_run_is(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with reporter("--metrics-file", path, "--save", tmp_path / "save", stream=io.StringIO()):
        pass
    (header,) = entries(path)
    assert (header["kind"], header["iteration"], header["world_size"]) == ("run", 0, 2)
    assert header["device"] == "cpu"
    assert header["dtype"] == "float32"
    assert header["model"]["hidden_size"] == 64
    assert header["topology"]["use_distributed_optimizer"] is True
    assert {"ml-train", "megatron-core", "torch"} <= header["versions"].keys()
    assert not (tmp_path / "save").exists()


def test_lines_come_at_intervals_and_at_the_end() -> None:
    stream = io.StringIO()
    with reporter("--log-interval", "4", "--log-throughput", stream=stream) as opened:
        train(opened, 1, 3, loss=4.0)
        train(opened, 4, 4, loss=8.0)
        opened.evaluation(4, 2.0)
        opened.note("saved checkpoint x")
        train(opened, 5, 6)
    lines = stream.getvalue().splitlines()
    starts = [line.partition("|")[0].strip() for line in lines]
    assert starts == [
        "iteration        4/       6",
        "[Rank 0] (after 4 iterations) memory (MB)",
        "validation loss at iteration 4",
        "saved checkpoint x",
        "iteration        6/       6",
    ]
    assert "| lm loss: 5.000000E+00 |" in lines[0]
    assert "throughput per GPU (TFLOP/s/GPU): " in lines[0]


def test_a_resumed_run_says_each_step_once(tmp_path: Path) -> None:
    more = ("--metrics-file", tmp_path / "m", "--tensorboard-dir", tmp_path / "tb")
    with reporter(*more, stream=io.StringIO()) as opened:
        train(opened, 1, 5)
        opened.evaluation(4, 2.0)
    with reporter(*more, iteration=3, stream=io.StringIO()) as opened:
        train(opened, 4, 6, loss=3.0)
    steps = [entry for entry in entries(tmp_path / "m") if entry["kind"] == "step"]
    expected = [(1, 5.0), (2, 5.0), (3, 5.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert [(step["iteration"], step["loss"]) for step in steps] == expected
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("lm loss")] == expected
    assert board.Scalars("learning-rate")[5].value == pytest.approx(0.006)


def test_tensorboard_has_megatrons_names(tmp_path: Path) -> None:
    with reporter("--tensorboard-dir", tmp_path, stream=io.StringIO()) as opened:
        train(opened, 1, 1)
        opened.evaluation(1, 2.0)
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert {
        "lm loss",
        "learning-rate",
        "grad-norm",
        "loss-scale",
        "batch-size",
        "iteration-time",
        "throughput",
        "lm loss validation",
        "lm loss validation ppl",
    } <= set(board.Tags()["scalars"])


def test_the_other_ranks_say_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    more = ("--metrics-file", tmp_path / "m", "--tensorboard-dir", tmp_path / "tb")
    with reporter(*more, active=False, stream=stream) as opened:
        train(opened, 1, 6)
        opened.evaluation(4, 2.0)
        opened.note("text")
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_everything_is_closed_when_one_output_cannot_be_opened(tmp_path: Path) -> None:
    more = ("--metrics-file", tmp_path / "m", "--tensorboard-dir", tmp_path / "file" / "tb")
    failing = reporter(*more, stream=io.StringIO())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/tb"), failing:
        pass
    # Were the file still open, its end would be a ResourceWarning, which is an error here.
    del failing


def test_an_output_that_fails_is_given_up_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, board = tmp_path / "m", tmp_path / "tb"

    def work() -> tuple[str, list[str]]:
        stream = io.StringIO()
        more = ("--metrics-file", path, "--tensorboard-dir", board)
        with reporter(*more, stream=stream) as opened:
            train(opened, 1, 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9,) * 2)
            train(opened, 2, 3)
            opened.evaluation(3, 2.0)
        return stream.getvalue(), caplog.messages

    ((lines, said),) = run_ranks(work, 1)
    assert said == [f"{path}: File too large; the run goes on without this output"]
    assert lines.count("/       6 |") == 3
    *whole, torn = path.read_bytes().split(b"\n")
    assert [json.loads(line)["kind"] for line in whole] == ["run", "step"]
    assert len(torn) == 9
    events = EventAccumulator(str(board))
    events.Reload()
    assert [event.step for event in events.Scalars("lm loss")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("lm loss validation")] == [3]


def test_tensorboard_is_imported_only_for_those_who_ask() -> None:
    script = "import sys, ml_train.scalars; sys.exit(str('tensorboard' in sys.modules))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "False"
