from __future__ import annotations

import subprocess
import sys

import pytest

from ml_data.cli import main


@pytest.mark.parametrize("argv", [["--help"], ["pretrain", "--help"], ["inspect", "--help"]])
def test_help_imports_nothing_heavy(argv):
    script = (
        "import sys; from ml_data.cli import main; code = main(sys.argv[1:])\n"
        "print('HEAVY', {'torch', 'megatron', 'transformers', 'tokenizers'} & set(sys.modules))\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: ml-data" in done.stdout
    assert done.stdout.endswith("HEAVY set()\n")


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "ml_data", "pretrian"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "ml-data: unknown command 'pretrian'; did you mean pretrain?\n"


def test_the_overview_names_the_commands(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "pretrain" in output
    assert "inspect" in output
