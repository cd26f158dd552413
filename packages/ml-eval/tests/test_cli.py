from __future__ import annotations

import subprocess
import sys

import pytest

from ml_eval.cli import COMMANDS, main

HELP = """
import sys
from ml_eval.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "megatron", "transformers") if name in sys.modules]
sys.exit(f"exit code {code}, imported {heavy}" if code or heavy else 0)
"""


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    command = [sys.executable, "-c", HELP, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: ml-eval" in done.stdout


def test_an_unknown_command_is_one_line(capsys) -> None:
    assert main(["generat"]) == 2
    expected = "ml-eval: unknown command 'generat'; did you mean generate?\n"
    assert capsys.readouterr().err == expected


def test_a_wrong_flag_is_one_line(capsys) -> None:
    assert main(["generate", "--load-dri", "x"]) == 2
    assert capsys.readouterr().err.startswith("ml-eval generate: unknown flag --load-dri")
