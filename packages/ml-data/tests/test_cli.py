from __future__ import annotations

import subprocess
import sys

import pytest

from ml_data.cli import COMMANDS, main


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(argv):
    heavy = "{'torch', 'megatron', 'transformers', 'tokenizers', 'pyarrow', 'sentencepiece'}"
    script = (
        "import sys; from ml_data.cli import main; code = main(sys.argv[1:])\n"
        f"print('HEAVY', {heavy} & set(sys.modules))\n"
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
    for name in ("pretrain", "instruct", "preference", "merge", "inspect", "preprocess"):
        assert f"\n  {name} " in output


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_flag_of_every_command_is_explained(command, capsys):
    assert main([command, "--help"]) == 0
    help_ = capsys.readouterr().out
    options = [line for line in help_.splitlines() if line.startswith("  --")]
    assert options
    assert main([command, "--inputt", "x"]) == 2
    assert "did you mean --input?" in capsys.readouterr().err or command == "inspect"
