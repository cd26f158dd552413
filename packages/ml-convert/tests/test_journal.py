"""What the journal of a conversion says can be read, whatever has cut it off."""

import os
import resource

import pytest

from ml_convert.journal import JOURNAL, Journal, read
from ml_parallel.manifest import FileEntry


def entry(directory, name):
    path = directory / name
    path.write_bytes(b"content")
    return FileEntry(path=path, size=7, sha256=f"digest of {name}")


@pytest.fixture
def full_disk():
    """Let files grow to a number of bytes only: the last write is cut off."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_are_done_are_read_again(tmp_path):
    journal = Journal(tmp_path, "plan")
    entries = {name: entry(tmp_path, name) for name in ("a", "b")}
    for done in entries.values():
        journal.add(done)
    assert journal.done == read(tmp_path, "plan") == entries
    assert read(tmp_path, "another plan") is None
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 3
    (tmp_path / JOURNAL).unlink()
    assert read(tmp_path, "plan") is None


def test_all_of_a_line_is_written(tmp_path, monkeypatch):
    journal, done = Journal(tmp_path, "plan"), entry(tmp_path, "a")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    journal.add(done)
    monkeypatch.undo()
    assert read(tmp_path, "plan") == {"a": done}


@pytest.mark.parametrize("written", [1, 20])
def test_a_line_that_a_full_disk_cuts_off_is_an_error_and_spoils_no_other(
    tmp_path, full_disk, written
):
    journal = Journal(tmp_path, "plan")
    first, torn, last = (entry(tmp_path, name) for name in ("first", "torn", "last"))
    journal.add(first)
    full_disk((tmp_path / JOURNAL).stat().st_size + written)
    with pytest.raises(OSError, match=JOURNAL):
        journal.add(torn)
    full_disk(resource.RLIM_INFINITY)
    journal.add(last)
    assert read(tmp_path, "plan") == {"first": first, "last": last}


@pytest.mark.parametrize("torn", ['{"file": "mp_rank', "{"])
def test_a_torn_last_line_spoils_no_other(tmp_path, torn):
    journal, done = Journal(tmp_path, "plan"), entry(tmp_path, "a")
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(torn)
    journal.add(done)
    assert read(tmp_path, "plan") == {"a": done}
    assert Journal(tmp_path, "plan").done == {"a": done}
    assert torn not in (tmp_path / JOURNAL).read_text().splitlines()
