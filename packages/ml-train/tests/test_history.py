"""A file of metrics, read back: whatever ended a run left one that can be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from some_steps import make_step

from ml_models.architecture import Architecture
from ml_models.flags import UsageError
from ml_train.history import read_history
from ml_train.metrics_file import MetricsFile

ARCH = Architecture(
    num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=64, vocab_size=99
)

FACTS = {
    "model": vars(ARCH),
    "topology": {"tensor_model_parallel_size": 1},
    "world_size": 1,
    "device": "cpu",
    "dtype": "float32",
    "seq_length": 32,
    "global_batch_size": 16,
    "peak_tflops_per_device": 1.0,
    "time": "2026-01-01T00:00:00+0000",
    "python": "3.11",
    "versions": {"torch": "2.7"},
}


def write(path: Path, first: int, last: int, **changes: float) -> None:
    """Write what a run does that resumes after `first` and ends after `last`."""
    file = MetricsFile(path, iteration=first)
    file.write("run", iteration=first, **FACTS)
    for iteration in range(first + 1, last + 1):
        file.step(make_step(iteration, **{"loss": 10.0 - iteration, **changes}))
    file.evaluation(last, loss=2.0)
    file.close()


def test_a_resumed_run_is_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 0, 4)
    write(path, 3, 6)
    history = read_history(path)
    assert [start.iteration for start in history.starts] == [0, 3]
    assert history.starts[1].arch == ARCH
    assert history.starts[1].facts["device"] == "cpu"
    assert history.steps == tuple(make_step(i, loss=10.0 - i) for i in range(1, 7))
    (evaluation,) = history.evaluations
    assert (evaluation.iteration, evaluation.loss) == (6, 2.0)
    assert evaluation.perplexity == pytest.approx(math.exp(2.0))


def test_speed_is_that_of_all_steps_together(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 0, 3, elapsed_seconds=1.0, tokens_per_second_per_device=300.0, mfu=0.6)
    write(path, 3, 4, elapsed_seconds=3.0, tokens_per_second_per_device=100.0, mfu=0.2)
    history = read_history(path)
    assert history.seconds == 6.0
    # 4 steps of 300 tokens in 6 s
    assert history.tokens_per_second_per_device == pytest.approx(200.0)
    assert history.mfu == pytest.approx(0.4)


def test_the_last_loss_is_a_mean_without_the_steps_that_had_none(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 0, 3)
    write(path, 3, 4, loss=math.nan)
    history = read_history(path)
    assert math.isnan(history.steps[-1].loss)
    assert history.last_loss(2) == pytest.approx(7.5)
    assert history.last_loss(10) == pytest.approx(8.0)


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 0, 2)
    path.write_bytes(path.read_bytes() + b'{"kind": "st')
    assert len(read_history(path).steps) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--metrics-file .*m\.jsonl: No such file"),
        (b"", r"m\.jsonl: holds no step of a run yet"),
        (b"loss: 3\n", r"m\.jsonl: line 1 is no metric of a run"),
        (b"[1]\n", r"line 1 is no metric"),
        (b'{"kind": "run", "iteration": 0}\n', r"line 1 is no metric"),
        (
            b'{"kind": "step", "iteration": 1, "loss": 2.0}\n',
            r"line 1 is no metric of a run: it has no 'train_iters'$",
        ),
    ],
)
def test_what_is_no_file_of_metrics_is_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "m.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_history(path)


@pytest.mark.parametrize("fact", FACTS)
def test_a_start_that_lacks_what_a_report_shows_is_named(tmp_path: Path, fact: str) -> None:
    facts = {name: value for name, value in FACTS.items() if name != fact}
    file = MetricsFile(tmp_path / "m.jsonl", iteration=0)
    file.write("run", iteration=0, **facts)
    file.close()
    with pytest.raises(UsageError, match=f"line 1 is no metric of a run: it has no '{fact}'$"):
        read_history(tmp_path / "m.jsonl")
