"""`ml-train`: training of language models. A command's module is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from ml_models.commands import Command
from ml_models.commands import main as run

COMMANDS = {
    "pretrain": Command(
        summary="train a model on token files, from one CPU process to a cluster",
        run="ml_train.pretrain:main",
    ),
    "report": Command(
        summary="show a run on one page: loss curve, speed, layout",
        run="ml_train.report:main",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ml-train` with `argv`, by default the process's; return the exit code."""
    return run("ml-train", "Train large language models.", COMMANDS, argv)
