"""The program `ml-eval`: names of its commands, nothing that takes time to import."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ml_models import flags

COMMANDS = {
    "generate": flags.Command(
        summary="continue texts with a model, showing the words as they come",
        run="ml_eval.generate:main",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ml_eval").setLevel(logging.INFO)
    return flags.main("ml-eval", "Use and measure language models.", COMMANDS, argv)
