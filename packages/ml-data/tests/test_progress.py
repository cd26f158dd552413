from __future__ import annotations

import io
import logging
import sys

from ml_data.progress import Done, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_comes_every_log_interval(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    with show_progress(total=1000, log_interval=10) as progress:
        for _ in range(7):
            progress(Done(consumed=100, documents=4, text_bytes=500_000))
    counts = [message.split()[1] for message in caplog.messages]
    assert counts == ["12", "20"]
    assert caplog.messages[0].startswith("Processed 12 documents (")
    assert caplog.messages[0].endswith(" MB/s)")


def test_on_a_terminal_a_bar_shows_documents_and_speed(monkeypatch, caplog):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress(total=400, log_interval=1) as progress:
        progress(Done(consumed=100, documents=1234, text_bytes=500_000))
        progress(Done(consumed=100, documents=1, text_bytes=500_000))
    shown = terminal.getvalue()
    assert "1,235 documents" in shown
    assert "MB/s" in shown
    assert "50%" in shown
    assert caplog.messages == []
