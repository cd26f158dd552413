"""The file of metrics: one JSON object a line, each step once, however often the run was resumed.

    {"kind": "run", "iteration": 0, "model": {...}, "versions": {...}, ...}    at every start
    {"kind": "step", "iteration": 1, "loss": 9.1, ...}                        every step
    {"kind": "evaluation", "iteration": 10, "loss": 8.7, "perplexity": 6002.9}

A number that is NaN or infinite is null, which every JSON reader understands.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_models.flags import UsageError
from ml_parallel import durable
from ml_train.log_line import perplexity
from ml_train.throughput import StepMetrics

logger = logging.getLogger(__name__)


class MetricsFile:
    """The file, open for a run that continues after `iteration`.

    What it says of later steps is removed first: they are trained again. A line torn by a kill goes
    with them. With `set_aside`, the steps that a run from the beginning finds are those of another
    run, and stay under another name.

    Raises:
        UsageError: The file holds something else.
    """

    def __init__(self, path: Path, *, iteration: int, set_aside: bool = False) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            kept = _kept(path, content, iteration)
            if set_aside and iteration == 0 and _holds_steps(path, content):
                _set_aside(path)
            elif kept != content:
                durable.write(path, kept)
        self._file = path.open("ab")

    def write(self, kind: str, **values: Any) -> None:
        """Append a line; it is in the file when this returns."""
        line = json.dumps({"kind": kind, **_finite(values)}, allow_nan=False)
        with durable.naming(self._path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def step(self, step: StepMetrics) -> None:
        """Append a step."""
        self.write("step", **dataclasses.asdict(step))

    def evaluation(self, iteration: int, loss: float) -> None:
        """Append an evaluation."""
        self.write("evaluation", iteration=iteration, loss=loss, perplexity=perplexity(loss))

    def close(self) -> None:
        """Close the file."""
        with durable.naming(self._path):  # what a full disk did not take is tried once more
            self._file.close()


def _set_aside(path: Path) -> None:
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    free = next(name for name in numbered if not name.exists())
    path.rename(free)
    logger.warning("%s held the metrics of another run, which are in %s now", path, free)


def _holds_steps(path: Path, content: bytes) -> bool:
    return any(kind == "step" for _, kind, _ in _entries(path, content))


def _kept(path: Path, content: bytes, iteration: int) -> bytes:
    return b"".join(
        line + b"\n"
        for line, kind, step in _entries(path, content)
        if step + (kind == "run") <= iteration  # a start counts only if steps of it remain
    )


def _entries(path: Path, content: bytes) -> Iterator[tuple[bytes, str, int]]:
    """Yield every line with its kind and step, but for the end of a torn one."""
    *lines, _torn = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            yield line, entry["kind"], int(entry["iteration"])
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path}: line {number} is no metric of a run; --metrics-file names another file"
            ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
