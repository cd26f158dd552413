from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from ml_train.cli import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)


def test_help_and_version_start_without_torch_and_megatron() -> None:
    script = """
import sys
from ml_train.cli import main
code = main(["--help"]) or main(["--version"])
heavy = {"torch", "megatron", "numpy"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert importlib.metadata.version("ml-train") in done.stdout


def test_the_module_runs_like_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ml_train", "pretran"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "ml-train: unknown command 'pretran'; did you mean pretrain?\n"
