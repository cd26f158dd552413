"""The file of metrics: one JSON object a line, each step once, however often the run was resumed.

    {"kind": "run", "iteration": 0, "model": {...}, "versions": {...}, ...}    at every start
    {"kind": "step", "iteration": 1, "loss": 9.1, ...}                        every step
    {"kind": "evaluation", "iteration": 10, "loss": 8.7, "perplexity": 6002.9}

A number that is NaN or infinite is null, which every JSON reader understands.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ml_data.atomic import naming
from ml_models.flags import UsageError
from ml_parallel import durable
from ml_train.log_line import perplexity
from ml_train.throughput import StepMetrics


class MetricsFile:
    """The file, open for a run that continues after `iteration`.

    What it says of later steps is removed first: they are trained again. A line torn by a kill goes
    with them.

    Raises:
        UsageError: The file holds something else.
    """

    def __init__(self, path: Path, *, iteration: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            kept = _kept(path, content, iteration)
            if kept != content:
                durable.write(path, kept)
        self._file = path.open("ab")

    def write(self, kind: str, **values: Any) -> None:
        """Append a line; it is in the file when this returns."""
        line = json.dumps({"kind": kind, **_finite(values)}, allow_nan=False)
        with naming(self._path):
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
        self._file.close()


def _kept(path: Path, content: bytes, iteration: int) -> bytes:
    *lines, _torn = content.split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            # A start is worth a line only if steps of it remain.
            end = entry["iteration"] + (entry["kind"] == "run")
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{path}: line {number} is no metric of a run; --metrics-file names another file"
            ) from error
        if end <= iteration:
            kept.append(line + b"\n")
    return b"".join(kept)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
