"""Lines on a stream, and above a live line on a real terminal."""

from __future__ import annotations

import io
import os
import pty
import re
from collections.abc import Iterator
from typing import TextIO

import pytest
from some_steps import make_step

from ml_train.display import Display, LiveDisplay, open_display

LINE = " iteration        7/     100 | [not markup] :smile: 1.5 | " + "x" * 200


class Terminal:
    """A terminal; what was written to it can be read."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")

    def read(self) -> str:
        self.stream.flush()
        os.set_blocking(self.master, False)
        content = b""
        while True:
            try:
                content += os.read(self.master, 65536)
            except BlockingIOError:
                return content.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    yield terminal
    terminal.stream.close()
    os.close(terminal.master)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_file_gets_lines_and_nothing_else() -> None:
    stream = io.StringIO()
    display = open_display(stream, iteration=0, train_iters=100)
    assert type(display) is Display
    display.line(LINE)
    display.progress(make_step())
    display.line("end")
    display.close()
    assert stream.getvalue() == f"{LINE}\nend\n"


def test_a_terminal_shows_where_the_run_is_below_its_lines(terminal: Terminal) -> None:
    display = open_display(terminal.stream, iteration=5, train_iters=100)
    assert isinstance(display, LiveDisplay)
    assert "iteration 5/100" in plain(terminal.read())
    display.line(LINE)
    display.progress(make_step(7))
    shown = plain(terminal.read())
    assert LINE in shown.replace("\r\n", "\n")
    assert shown.rindex(LINE[-20:]) < shown.rindex("iteration 7/100")
    assert "loss 8.5000  16,384 tokens/s/device" in shown
    display.close()


def test_the_time_left_is_shown_after_a_few_steps(terminal: Terminal) -> None:
    display = LiveDisplay(terminal.stream, iteration=0, train_iters=1000)
    for iteration in range(1, 20):
        display._refreshed = 0.0
        display.progress(make_step(iteration))
    assert re.search(r"time left 0:00:0\d", plain(terminal.read()))
    display.close()


def test_a_closed_display_leaves_the_lines_only(terminal: Terminal) -> None:
    display = open_display(terminal.stream, iteration=0, train_iters=100)
    display.progress(make_step(7))
    display.line("a line")
    display.progress(make_step(100))
    display.close()
    shown = terminal.read()
    assert shown.endswith(("\x1b[2K", "\x1b[2K\x1b[?25h"))  # the last line is erased
    assert "a line" in shown


def test_fast_steps_are_not_all_drawn(terminal: Terminal) -> None:
    display = open_display(terminal.stream, iteration=0, train_iters=100)
    for iteration in range(1, 100):
        display.progress(make_step(iteration))
    drawn = plain(terminal.read()).count("tokens/s/device")
    assert drawn < 20
    display.progress(make_step(100))
    assert "iteration 100/100" in plain(terminal.read())
    display.close()
