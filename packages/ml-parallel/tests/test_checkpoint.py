"""Checkpoints are whole or absent, whatever happens to the process that writes them."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml_parallel import checkpoint, durable
from ml_parallel.checkpoint import MANIFEST, MODEL_FILE, TRACKER, CheckpointError

RANKS = ("mp_rank_00_000", "mp_rank_00_001")


def save(root, iteration, content=b"weights", **metadata):
    """Write a checkpoint of two ranks as a training run does."""
    temporary = checkpoint.begin(root, iteration)
    entries = []
    for rank in RANKS:
        path = temporary / rank / MODEL_FILE
        path.parent.mkdir()
        path.write_bytes(content + rank.encode())
        entries.append(checkpoint.record(path))
    return checkpoint.commit(temporary, entries, **metadata)


def latest(root, **options):
    skipped = []
    found = checkpoint.latest(root, lambda path, why: skipped.append((path.name, why)), **options)
    return found and found.name, skipped


def names(root):
    return sorted(path.name for path in root.iterdir())


# Names


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({"tp_rank": 0, "pp_rank": 0, "pp_size": 1}, "mp_rank_00"),
        ({"tp_rank": 7, "pp_rank": 1, "pp_size": 2}, "mp_rank_07_001"),
        ({"tp_rank": 1, "pp_rank": 0, "pp_size": 1, "ep_rank": 3, "ep_size": 4}, "mp_rank_01_003"),
        (
            {"tp_rank": 1, "pp_rank": 11, "pp_size": 12, "ep_rank": 3, "ep_size": 4},
            "mp_rank_01_011_003",
        ),
    ],
)
def test_rank_directories_are_named_as_megatron_names_them(sizes, name):
    assert checkpoint.rank_directory(**sizes) == name


def test_iteration_directories_are_named_as_megatron_names_them():
    assert checkpoint.iteration_directory(10) == "iter_0000010"
    assert checkpoint.iteration_directory(12_345_678) == "iter_12345678"
    assert checkpoint.iteration_directory("release") == "release"
    with pytest.raises(ValueError, match="not -1"):
        checkpoint.iteration_directory(-1)


# A good checkpoint


def test_a_committed_checkpoint_is_the_latest_and_has_a_manifest(tmp_path):
    final = save(tmp_path, 10, tensor_model_parallel_size=1, sizes=(1, 2), by_rank={0: "a"})
    assert final == tmp_path / "iter_0000010"
    assert (tmp_path / TRACKER).read_text() == "10"
    assert names(tmp_path) == ["iter_0000010", TRACKER]
    assert checkpoint.verify(final) is True
    assert latest(tmp_path) == ("iter_0000010", [])
    manifest = checkpoint.read_manifest(final)
    assert manifest.iteration == 10
    assert manifest.metadata == {
        "tensor_model_parallel_size": 1,
        "sizes": [1, 2],
        "by_rank": {"0": "a"},
    }
    assert [entry.path for entry in manifest.files] == [final / rank / MODEL_FILE for rank in RANKS]
    assert {entry.size for entry in manifest.files} == {len(b"weights" + RANKS[0].encode())}


def test_a_release_checkpoint_is_written_tracked_and_found(tmp_path):
    assert save(tmp_path, "release").name == "release"
    assert (tmp_path / TRACKER).read_text() == "release"
    assert checkpoint.read_manifest(tmp_path / "release").iteration == "release"
    assert latest(tmp_path) == ("release", [])


def test_nothing_is_latest_where_nothing_was_saved(tmp_path):
    assert latest(tmp_path) == (None, [])
    assert latest(tmp_path / "absent") == (None, [])


def test_candidates_are_the_tracked_one_then_the_newest(tmp_path):
    for iteration in ("release", 9_999_999, 10_000_000, 20, 30):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("20\n")
    (tmp_path / "iter_0000099").touch()
    found = [path.name for path in checkpoint.candidates(tmp_path)]
    assert found == ["iter_0000020", "iter_10000000", "iter_9999999", "iter_0000030", "release"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_saving_an_iteration_again_replaces_it(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:  # macOS, some network file systems
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    final = save(tmp_path, 10, b"old")
    save(tmp_path, 10, b"new")
    assert (final / RANKS[0] / MODEL_FILE).read_bytes().startswith(b"new")
    assert checkpoint.verify(final)
    assert names(tmp_path) == ["iter_0000010", TRACKER]


def test_this_file_system_replaces_a_directory_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert durable._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "a").exists()


def test_everything_is_synced_before_the_name_that_shows_it(tmp_path, monkeypatch):
    steps = []

    def note(step, real, name_of):
        def noted(*arguments):
            steps.append((step, name_of(arguments[-1])))
            return real(*arguments)

        return noted

    monkeypatch.setattr(
        os, "fsync", note("sync", os.fsync, lambda fd: Path(f"/proc/self/fd/{fd}").readlink().name)
    )
    for rename in ("rename", "replace"):
        monkeypatch.setattr(os, rename, note("rename", getattr(os, rename), lambda to: to.name))
    final = save(tmp_path, 10)
    assert steps[:2] == [("sync", MODEL_FILE)] * 2
    *ranks, (_, temporary) = sorted(steps[2:5], key=lambda step: step[1], reverse=True)
    assert ranks == [("sync", RANKS[1]), ("sync", RANKS[0])]
    assert temporary.startswith("iter_0000010.tmp-")
    assert steps[5:] == [
        ("sync", durable.temporary_path(final / MANIFEST).name),
        ("rename", MANIFEST),
        ("sync", temporary),
        ("sync", durable.temporary_path(tmp_path / TRACKER).name),
        ("rename", final.name),
        ("sync", tmp_path.name),
        ("rename", TRACKER),
        ("sync", tmp_path.name),
    ]


# Damage


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "is damaged: its sha256"),
        (truncate, r"is torn: \d+ bytes instead of \d+"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(tmp_path, damage, message):
    save(tmp_path, 10)
    final = save(tmp_path, 20)
    damage(final / RANKS[1] / MODEL_FILE)
    with pytest.raises(CheckpointError, match=f"iter_0000020/{RANKS[1]}/{MODEL_FILE} {message}"):
        checkpoint.verify(final)
    found, [(skipped, why)] = latest(tmp_path)
    assert found == "iter_0000010"
    assert skipped == "iter_0000020"
    assert f"{RANKS[1]}/{MODEL_FILE}" in why


def test_every_byte_of_the_manifest_counts(tmp_path):
    final = save(tmp_path, 10, seed=1234)
    good = (final / MANIFEST).read_bytes()
    value = json.loads(good)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1
        (final / MANIFEST).write_bytes(bad)
        try:
            harmless = json.loads(bad) == value  # white space
        except ValueError:
            harmless = False
        if not harmless:
            with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
                checkpoint.verify(final)
        else:
            checkpoint.verify(final)
    (final / MANIFEST).write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        checkpoint.verify(final)


def test_without_hashes_only_sizes_are_looked_at(tmp_path):
    final = save(tmp_path, 10)
    flip_a_byte(final / RANKS[0] / MODEL_FILE)
    assert latest(tmp_path, hashes=False) == ("iter_0000010", [])
    truncate(final / RANKS[0] / MODEL_FILE)
    assert latest(tmp_path, hashes=False)[0] is None


def test_a_tracked_checkpoint_that_is_gone_is_reported(tmp_path):
    save(tmp_path, 10)
    (tmp_path / TRACKER).write_text("20")
    found, [(skipped, why)] = latest(tmp_path)
    assert (found, skipped) == ("iter_0000010", "iter_0000020")
    assert why.endswith("iter_0000020 does not exist")


@pytest.mark.parametrize("content", ["", "ten", "-1", "1" * 30, "\udcff"])
def test_a_damaged_tracker_is_reported_and_the_newest_checkpoint_used(tmp_path, content):
    for iteration in (10, 20):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="neither an iteration nor"):
        checkpoint.read_tracker(tmp_path)
    found, [(skipped, _)] = latest(tmp_path)
    assert (found, skipped) == ("iter_0000020", TRACKER)


def test_an_unreadable_file_is_reported_and_the_previous_checkpoint_used(tmp_path):
    save(tmp_path, 10)
    final = save(tmp_path, 20)
    (final / RANKS[0] / MODEL_FILE).unlink()
    (final / RANKS[0] / MODEL_FILE).symlink_to(MODEL_FILE)  # a loop: opening it is an OSError
    found, [(skipped, _)] = latest(tmp_path)
    assert (found, skipped) == ("iter_0000010", "iter_0000020")


# Checkpoints of other tools


def write_foreign(root, content):
    path = root / "iter_0000010" / "mp_rank_00" / MODEL_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (root / TRACKER).write_text("10")
    return path


ZIP = b"PK\x03\x04" + bytes(50) + b"PK\x05\x06" + bytes(18)


@pytest.mark.parametrize("content", [ZIP, b"\x80\x02 old pickle"])
def test_a_checkpoint_without_manifest_is_used_but_reported(tmp_path, content, caplog):
    write_foreign(tmp_path, content)
    assert checkpoint.verify(tmp_path / "iter_0000010") is False
    assert latest(tmp_path) == ("iter_0000010", [])
    assert "iter_0000010 has no manifest.json" in caplog.text


@pytest.mark.parametrize("content", [b"", ZIP[:-10]])
def test_a_checkpoint_without_manifest_that_is_cut_short_is_skipped(tmp_path, content):
    write_foreign(tmp_path, content)
    found, [(_, why)] = latest(tmp_path)
    assert found is None
    assert f"mp_rank_00/{MODEL_FILE} is torn" in why


def test_a_directory_without_model_files_is_no_checkpoint(tmp_path):
    path = write_foreign(tmp_path, ZIP)
    (path.parent.parent / "mp_rank_01").mkdir()
    with pytest.raises(CheckpointError, match=f"mp_rank_01/{MODEL_FILE} is missing"):
        checkpoint.verify(path.parent.parent)
    (tmp_path / "iter_0000020").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        checkpoint.verify(tmp_path / "iter_0000020")
    (tmp_path / "iter_0000020" / ".metadata").touch()  # torch_dist
    assert checkpoint.verify(tmp_path / "iter_0000020") is False


def test_a_tracker_that_finds_no_room_leaves_no_checkpoint_behind(tmp_path, monkeypatch):
    temporary = checkpoint.begin(tmp_path, 10)
    (temporary / "a").write_bytes(b"a")
    entry = checkpoint.record(temporary / "a")
    sync = durable.sync

    def full(path):
        if path.name.startswith(TRACKER):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.commit(temporary, [entry])
    assert checkpoint.candidates(tmp_path) == []
    assert not (tmp_path / "iter_0000010").exists()


# Mistakes of the caller


def test_commit_refuses_files_that_were_not_recorded(tmp_path):
    temporary = checkpoint.begin(tmp_path, 10)
    (temporary / "a").write_bytes(b"a")
    (temporary / "b").write_bytes(b"b")
    entry = checkpoint.record(temporary / "a")
    with pytest.raises(CheckpointError, match="/b was written but not recorded"):
        checkpoint.commit(temporary, [entry])
    entries = [entry, checkpoint.record(temporary / "b")]
    (temporary / "b").unlink()
    with pytest.raises(CheckpointError, match="/b is missing"):
        checkpoint.commit(temporary, entries)
    (temporary / "b").write_bytes(b"longer")
    with pytest.raises(CheckpointError, match="/b is torn: 6 bytes instead of 1"):
        checkpoint.commit(temporary, entries)
    assert checkpoint.candidates(tmp_path) == []


def test_commit_and_discard_touch_only_what_begin_made(tmp_path):
    final = save(tmp_path, 10)
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    temporary = checkpoint.begin(tmp_path, 20)
    with pytest.raises(CheckpointError, match="outside is not a file of"):
        checkpoint.commit(temporary, [checkpoint.record(outside)])
    for use in (checkpoint.discard, lambda path: checkpoint.commit(path, [])):
        with pytest.raises(CheckpointError, match="not a directory made by begin"):
            use(final)
    assert checkpoint.verify(final)
    checkpoint.discard(temporary)
    assert names(tmp_path) == ["iter_0000010", TRACKER, "outside"]


# Pruning


def test_prune_keeps_the_newest(tmp_path):
    for iteration in ("release", 10, 20, 30, 40):
        save(tmp_path, iteration)
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == ["iter_0000010", "iter_0000020"]
    assert names(tmp_path) == ["iter_0000030", "iter_0000040", TRACKER, "release"]
    assert checkpoint.prune(tmp_path, 2) == []
    assert checkpoint.prune(tmp_path / "absent", 2) == []
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.prune(tmp_path, 0)


def test_prune_keeps_the_tracked_one_and_what_is_newer(tmp_path):
    for iteration in (10, 20, 30):
        save(tmp_path, iteration)
    (tmp_path / TRACKER).write_text("10")
    assert checkpoint.prune(tmp_path, 1) == []


def test_prune_does_not_count_what_the_run_has_passed_over(tmp_path):
    for iteration in (4, 6, 8):
        save(tmp_path, iteration)
    flip_a_byte(tmp_path / "iter_0000008" / RANKS[0] / MODEL_FILE)  # its size is as it should be
    save(tmp_path, 7)  # of a run that had to continue from 6
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == ["iter_0000004"]
    (tmp_path / "iter_0000007" / MANIFEST).unlink()
    (tmp_path / "iter_0000007" / RANKS[0] / MODEL_FILE).unlink()
    assert latest(tmp_path)[0] == "iter_0000006"


def test_prune_does_not_count_damaged_checkpoints_as_kept(tmp_path):
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration)
    truncate(tmp_path / "iter_0000040" / RANKS[0] / MODEL_FILE)
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == ["iter_0000010"]
    assert latest(tmp_path)[0] == "iter_0000030"


# Left-overs


def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_left_overs_of_dead_writers_are_removed_and_those_of_live_ones_stay(tmp_path):
    host, living = durable._host(), os.getppid()
    gone = [
        f"iter_0000010.tmp-{host}-{dead_pid()}",
        f"iter_0000020.old-{host}-{dead_pid()}",
        f"release.tmp-{host}-{dead_pid()}",
        "iter_0000030.tmp-another-host-7",
        f"iter_0000010.tmp-{host}-{os.getpid()}",
        f"{TRACKER}.tmp-{host}-{dead_pid()}",
    ]
    stay = [
        "iter_0000010.tmp-another-host-1",
        f"iter_0000010.tmp-{host}-{living}",
        f"iter_0000040.tmp-{host}-{os.getpid()}",  # another save of this process, still running
        "iter_0000010.backup",
        f"notes.tmp-{host}-{dead_pid()}",
    ]
    for name in (*gone, *stay):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"x")
    (tmp_path / gone[-1] / "half").unlink()
    (tmp_path / gone[-1]).rmdir()
    (tmp_path / gone[-1]).write_bytes(b"2")  # the tracker is a file
    long_ago = time.time() - 2 * durable._UNTOUCHED_S
    for path in (tmp_path / gone[3] / "half", tmp_path / gone[3]):
        os.utime(path, (long_ago, long_ago))
    temporary = checkpoint.begin(tmp_path, 10)
    assert names(tmp_path) == sorted([*stay, temporary.name])
    assert list(temporary.iterdir()) == []


def test_checkpoints_need_neither_torch_nor_megatron():
    script = "import sys, ml_parallel.checkpoint; print({'torch', 'megatron'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout == "set()\n", run.stderr
