"""The program `ml-eval`: names of its commands, nothing that takes time to import."""

from __future__ import annotations

from collections.abc import Sequence

from ml_models.commands import Command, run_command
from ml_models.commands import main as run

COMMANDS = {
    "generate": Command(
        summary="continue texts with a model, showing the words as they come",
        run="ml_eval.generate:main",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_command("ml-eval", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("ml_eval").setLevel(logging.INFO)
    return run("ml-eval", "Use and measure language models.", COMMANDS, argv)
