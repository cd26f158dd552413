"""The program `ml-data`: names of its commands, nothing that takes time to import."""

from __future__ import annotations

from collections.abc import Sequence

from ml_models.commands import Command, run_command
from ml_models.commands import main as run

COMMANDS = {
    "pretrain": Command(
        summary="tokenize text files for pre-training", run="ml_data.pretrain:main"
    ),
    "instruct": Command(
        summary="conversations to tokens and labels, for instruction tuning",
        run="ml_data.instruct:main",
    ),
    "preference": Command(
        summary="chosen and rejected answers to tokens and labels, for DPO",
        run="ml_data.preference:main",
    ),
    "merge": Command(summary="join datasets to one", run="ml_data.merge:main"),
    "inspect": Command(
        summary="show what a dataset holds and check that it is whole",
        run="ml_data.inspection:main",
    ),
    "preprocess": Command(
        summary="a command line of ModelLink's preprocess_data.py", run="ml_data.preprocess:main"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_command("ml-data", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    description = "Texts, instructions and preferences to the token files that Megatron trains on."
    return run("ml-data", description, COMMANDS, argv)
