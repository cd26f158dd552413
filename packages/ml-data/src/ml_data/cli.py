"""The program `ml-data`: names of its commands, nothing that takes time to import."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ml_models import flags

COMMANDS = {
    "pretrain": flags.Command(
        summary="tokenize text files for pre-training", run="ml_data.pretrain:main"
    ),
    "instruct": flags.Command(
        summary="conversations to tokens and labels, for instruction tuning",
        run="ml_data.instruct:main",
    ),
    "preference": flags.Command(
        summary="chosen and rejected answers to tokens and labels, for DPO",
        run="ml_data.preference:main",
    ),
    "merge": flags.Command(summary="join datasets to one", run="ml_data.merge:main"),
    "inspect": flags.Command(
        summary="show what a dataset holds and check that it is whole",
        run="ml_data.inspection:main",
    ),
    "preprocess": flags.Command(
        summary="a command line of ModelLink's preprocess_data.py", run="ml_data.preprocess:main"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    description = "Texts, instructions and preferences to the token files that Megatron trains on."
    return flags.main("ml-data", description, COMMANDS, argv)
