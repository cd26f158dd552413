"""What a run wrote down of itself: its file of metrics (`ml_train.metrics_file`), read back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_models.architecture import Architecture
from ml_models.flags import UsageError
from ml_train.throughput import StepMetrics


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of the run, the first or a resumed one."""

    iteration: int
    """Steps that were done before."""
    facts: Mapping[str, Any]
    """What the metrics depend on: versions, device, layout, sizes."""

    @property
    def arch(self) -> Architecture:
        """The model."""
        model = self.facts["model"]
        lists = {name: tuple(value) for name, value in model.items() if isinstance(value, list)}
        return Architecture(**{**model, **lists})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on the validation data after a step."""

    iteration: int
    loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class History:
    """A run, however often it was resumed."""

    starts: tuple[Start, ...]
    steps: tuple[StepMetrics, ...]
    """Each step once, in order; a loss that was not a number is NaN."""
    evaluations: tuple[Evaluation, ...]

    @property
    def seconds(self) -> float:
        """Time of all steps together."""
        return math.fsum(step.elapsed_seconds for step in self.steps)

    @property
    def tokens_per_second_per_device(self) -> float:
        """Over the whole run."""
        tokens = [step.tokens_per_second_per_device * step.elapsed_seconds for step in self.steps]
        return math.fsum(tokens) / self.seconds

    @property
    def mfu(self) -> float:
        """Over the whole run."""
        return math.fsum(step.mfu * step.elapsed_seconds for step in self.steps) / self.seconds

    def last_loss(self, steps: int = 10) -> float:
        """Return the mean loss of the last steps that had one."""
        losses = [step.loss for step in self.steps if math.isfinite(step.loss)][-steps:]
        return math.fsum(losses) / len(losses) if losses else math.nan


def read_history(path: Path) -> History:
    """Read a file of metrics; a line torn by a kill at its end is left out.

    Raises:
        UsageError: There is no such file, or it holds something else, or no step.
    """
    starts, steps, evaluations = [], [], []
    for kind, entry in _entries(path):
        iteration = entry["iteration"]
        if kind == "run":
            starts.append(Start(iteration=iteration, facts=entry))
        elif kind == "step":
            steps.append(StepMetrics(**{name: entry[name] for name in _STEP}))
        elif kind == "evaluation":
            evaluations.append(Evaluation(**{name: entry[name] for name in _EVALUATION}))
    if not starts or not steps:
        raise UsageError(f"--metrics-file {path}: holds no step of a run yet")
    return History(starts=tuple(starts), steps=tuple(steps), evaluations=tuple(evaluations))


def holds_evaluation(path: Path, iteration: int) -> bool:
    """Tell whether the file of metrics that a run has open has the evaluation after a step."""
    # Opening it made sure that every line is an entry; most are of steps and need no reading.
    lines = (line for line in path.read_bytes().splitlines() if b'"evaluation"' in line)
    entries = [json.loads(line) for line in lines]
    return any((e["kind"], e["iteration"]) == ("evaluation", iteration) for e in entries)


_STEP = tuple(field.name for field in dataclasses.fields(StepMetrics))
_EVALUATION = tuple(field.name for field in dataclasses.fields(Evaluation))
_FACTS = (
    *("model", "topology", "world_size", "device", "dtype", "seq_length", "global_batch_size"),
    *("peak_tflops_per_device", "time", "python", "versions"),
)
_NEEDED = {"run": _FACTS, "step": _STEP, "evaluation": _EVALUATION}


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"--metrics-file {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = {name: _number(value) for name, value in json.loads(line).items()}
            kind = entry["kind"]
            _ = [entry[name] for name in ("iteration", *_NEEDED.get(kind, ()))]
        except (ValueError, AttributeError, KeyError) as error:
            lacking = f": it has no {error}" if isinstance(error, KeyError) else ""
            raise UsageError(
                f"--metrics-file {path}: line {number} is no metric of a run{lacking}"
            ) from error
        yield kind, entry


def _number(value: Any) -> Any:
    return math.nan if value is None else value
