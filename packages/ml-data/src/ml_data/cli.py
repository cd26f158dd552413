"""The program `ml-data`: names of its commands, nothing that takes time to import."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ml_models import flags

COMMANDS = {
    "pretrain": flags.Command(
        summary="tokenize text files for pre-training", run="ml_data.pretrain:main"
    ),
    "inspect": flags.Command(
        summary="show what a dataset holds and check that it is whole",
        run="ml_data.inspection:main",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    description = "Text files to the token files that Megatron trains on."
    return flags.main("ml-data", description, COMMANDS, argv)
