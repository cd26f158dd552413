"""Processes whose standard streams end before they do."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

SCRIPT = """
import logging, sys
from ml_train.streams import lasting_streams
with lasting_streams():
    logging.basicConfig(format="test: %(message)s")
    for _ in range(2):
        sys.stdout.write("a line\\n")
        sys.stdout.buffer.write(b"bytes\\n")
        sys.stdout.flush()
        sys.stderr.write("an error\\n")
sys.exit(3)
"""
COMMAND = [sys.executable, "-c", SCRIPT]


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def pipe_without_a_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


LOST = [
    (full_disk, "No space left on device"),
    (pipe_without_a_reader, "Broken pipe"),
    (closed_terminal, "Input/output error"),
]


def test_a_stream_that_takes_everything_is_left_as_it_is() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stdout == "a line\nbytes\n" * 2
    assert done.stderr == "an error\n" * 2


@pytest.mark.parametrize(("lost", "reason"), LOST)
def test_the_loss_of_standard_output_is_said_once(lost, reason) -> None:
    descriptor = lost()
    done = subprocess.run(COMMAND, stdout=descriptor, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(descriptor)
    said = f"test: standard output: {reason}; the run goes on without it\n"
    assert (done.returncode, done.stderr) == (3, f"{said}an error\nan error\n")


@pytest.mark.parametrize(("lost", "_"), LOST)
def test_the_loss_of_both_changes_nothing(lost, _) -> None:
    descriptor = lost()
    done = subprocess.run(COMMAND, stdout=descriptor, stderr=descriptor, timeout=60)
    os.close(descriptor)
    assert done.returncode == 3


def test_a_process_may_have_no_streams() -> None:
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *COMMAND], timeout=60)
    assert done.returncode == 3
