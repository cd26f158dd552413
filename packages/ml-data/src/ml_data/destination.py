"""The flags of every command that prepares data: where the files go, and how many write them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ml_data.workers import available_cpus


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Output."""

    output_prefix: str
    """How the names of the files begin, with their directory."""
    workers: int | None = None
    """Processes that tokenize; by default one for each processor."""
    n_subs: int = 1
    """ModelLink's parts of the input: at least so many processes; the files are the same."""
    log_interval: int = 10_000
    """Without a terminal, records between two lines of progress."""

    def __post_init__(self) -> None:
        for name in ("workers", "n_subs", "log_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        name = Path(self.output_prefix).name
        if name in ("", "..") or self.output_prefix.endswith(os.sep):
            raise ValueError(
                f"--output-prefix {self.output_prefix!r}: must end in a file name, not a directory"
            )

    @property
    def processes(self) -> int:
        """How many workers there are."""
        return max(self.workers or available_cpus(), self.n_subs)
