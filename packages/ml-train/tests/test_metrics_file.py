"""The file of metrics holds each step once, whatever became of the runs that wrote it."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from some_steps import make_step

from ml_models.flags import UsageError
from ml_parallel import testing
from ml_train.metrics_file import MetricsFile


def run(path: Path, first: int, last: int) -> None:
    """Write what a run does that resumes after `first` and ends after `last`."""
    file = MetricsFile(path, iteration=first)
    file.write("run", iteration=first, started_at=first)
    for iteration in range(first + 1, last + 1):
        file.step(make_step(iteration, loss=10.0 * last + iteration))
        if iteration % 2 == 0:
            file.evaluation(iteration, loss=1.0)
    file.close()


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(path: Path) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["iteration"]) for entry in entries(path)]


def test_a_line_is_in_the_file_when_the_step_is_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    file = MetricsFile(path, iteration=0)
    file.step(make_step(1))
    (line,) = entries(path)
    assert line["kind"] == "step"
    assert line["tokens_per_second_per_device"] == 16384.0
    file.evaluation(1, loss=0.0)
    assert entries(path)[1] == {
        "kind": "evaluation",
        "iteration": 1,
        "loss": 0.0,
        "perplexity": 1.0,
    }
    file.close()


def test_a_resumed_run_replaces_what_was_said_of_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 5)
    run(path, 3, 6)
    assert kinds(path) == [
        ("run", 0),
        ("step", 1),
        ("step", 2),
        ("evaluation", 2),
        ("step", 3),
        ("run", 3),
        ("step", 4),
        ("evaluation", 4),
        ("step", 5),
        ("step", 6),
        ("evaluation", 6),
    ]
    losses = [entry["loss"] for entry in entries(path) if entry["kind"] == "step"]
    assert losses == [51.0, 52.0, 53.0, 64.0, 65.0, 66.0]


def test_starts_that_came_to_nothing_leave_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 3)
    run(path, 2, 2)
    run(path, 2, 3)
    assert [kind for kind in kinds(path) if kind[0] == "run"] == [("run", 0), ("run", 2)]
    run(path, 1, 2)
    assert kinds(path) == [("run", 0), ("step", 1), ("run", 1), ("step", 2), ("evaluation", 2)]


def test_a_run_from_the_beginning_starts_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 5)
    run(path, 0, 1)
    assert kinds(path) == [("run", 0), ("step", 1)]


def test_the_file_of_another_run_is_set_aside_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 5)
    contents = [path.read_bytes()]
    for number in (1, 2):
        file = MetricsFile(path, iteration=0, set_aside=True)
        aside = tmp_path / f"metrics.jsonl.{number}"
        assert [aside.read_bytes(), path.read_bytes()] == [contents[-1], b""]
        assert caplog.messages[-1] == (
            f"{path} held the metrics of another run, which are in {aside} now"
        )
        file.step(make_step(1))
        file.close()
        contents.append(path.read_bytes())
    MetricsFile(path, iteration=1, set_aside=True).close()  # it continues this one
    assert path.read_bytes() == contents[-1]


def test_a_start_without_a_step_is_no_run_to_keep(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 0)
    MetricsFile(path, iteration=0, set_aside=True).close()
    assert [name.name for name in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert path.read_bytes() == b""


@pytest.mark.parametrize("size", range(1, 300, 23))
def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path, size: int) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 2)
    content = path.read_bytes()
    path.write_bytes(content[:-size])
    run(path, 1, 2)
    assert kinds(path) == [("run", 0), ("step", 1), ("run", 1), ("step", 2), ("evaluation", 2)]


def test_numbers_that_json_has_not_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, iteration=0)
    file.step(make_step(1, loss=float("nan"), grad_norm=float("inf")))
    file.write("run", iteration=0, nested={"list": (1, float("-inf")), "path": Path("a")})
    file.close()
    step, header = entries(path)
    assert (step["loss"], step["grad_norm"]) == (None, None)
    assert header["nested"] == {"list": [1, None], "path": "a"}


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"loss": 1}\n', '{"kind": "run"}\nx\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes"
    path.write_text(content)
    with pytest.raises(UsageError, match="is no metric of a run; --metrics-file names another"):
        MetricsFile(path, iteration=0)
    assert path.read_text() == content


def test_a_full_disk_names_the_file_and_tears_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def work() -> None:
        file = MetricsFile(path, iteration=0)
        file.step(make_step(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9,) * 2)
        with pytest.raises(OSError, match="File too large") as caught:
            file.step(make_step(2))
        assert caught.value.filename == str(path)
        with pytest.raises(OSError, match="File too large") as caught:
            file.close()
        assert caught.value.filename == str(path)

    testing.run_ranks(work, 1)
    run(path, 1, 2)
    assert kinds(path) == [("step", 1), ("run", 1), ("step", 2), ("evaluation", 2)]
