"""Ctrl-C ends every program without a traceback, also while it is still importing."""

import subprocess
import sys

import pytest

# The first import of anything but the command itself is where the user loses patience.
INTERRUPTED = """
import importlib.abc, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("logging", "argparse", "dataclasses", "numpy"):
            raise KeyboardInterrupt

sys.argv = ["{program}", "{command}", "--help"]
for name in ("logging", "argparse", "dataclasses"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Interrupt())
from {package}.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("ml-convert", "--load-dir"),
        ("ml-data", "pretrain"),
        ("ml-eval", "generate"),
        ("ml-train", "pretrain"),
    ],
)
def test_ctrl_c_while_a_program_starts_is_no_traceback(program, command):
    code = INTERRUPTED.format(program=program, command=command, package=program.replace("-", "_"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
