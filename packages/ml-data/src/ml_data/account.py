"""What became of every record of the input: nothing is dropped silently.

`read == written + skipped + failed`, always; `summary` says it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

OnError = Literal["stop", "skip"]
"""What to do with a record that cannot be used: end the run, or count it, report it and go on."""

_SHOWN = 10


class Problem(NamedTuple):
    """A record that cannot be used."""

    place: str
    """File and line, or file and number of the item."""
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass
class Account:
    """Records by what became of them; accounts of parts of the input can be added."""

    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """By reason: they were right, but not wanted (too long, empty, duplicates)."""
    failed: int = 0
    """They were not what their format says; only with `--on-error skip`."""
    problems: list[Problem] = field(default_factory=list)
    """The first of those that failed."""

    @property
    def read(self) -> int:
        """Return how many records there were."""
        return self.written + self.skipped.total() + self.failed

    def fail(self, problem: Problem) -> None:
        """Count a record that cannot be used."""
        self.failed += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)

    def add(self, other: Account) -> None:
        """Count the records of another part of the input, a later one."""
        self.written += other.written
        self.skipped.update(other.skipped)
        self.failed += other.failed
        self.problems += other.problems[: _SHOWN - len(self.problems)]

    def summary(self) -> Iterator[str]:
        """Yield lines for people: where every record is."""
        parts = [f"{self.written:,} written"]
        parts += [f"{number:,} skipped: {reason}" for reason, number in self.skipped.items()]
        parts += [f"{self.failed:,} failed"] if self.failed else []
        yield f"{self.read:,} records read: {'; '.join(parts)}"
        yield from (f"  {problem}" for problem in self.problems)
        if self.failed > len(self.problems):
            yield f"  ... and {self.failed - len(self.problems):,} more"
