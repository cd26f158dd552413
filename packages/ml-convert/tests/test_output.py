"""Results appear whole or not at all, and never in the place of something else."""

import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ml_convert import ConversionError, Request, convert, execute, sealing
from ml_convert.sealing import Sealer
from ml_parallel.manifest import read_manifest

TARGETS = {"mcore": {"target_tensor_parallel_size": 2}, "hf": {}}


def request(hf, tmp_path, save_format, **options):
    return Request(
        load_dir=hf.path,
        save_dir=tmp_path / "out",
        save_format=save_format,
        **TARGETS[save_format],
        **options,
    )


def files_of(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("save_format", TARGETS)
def test_the_result_is_listed_in_a_manifest_with_sizes_and_digests(tmp_path, make_hf, save_format):
    convert(request(make_hf(), tmp_path, save_format))
    root = tmp_path / "out" / ("release" if save_format == "mcore" else "")
    manifest = json.loads((root / "manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == files_of(root)
    for name, (size, _) in manifest["files"].items():
        assert (root / name).stat().st_size == size


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("save_format", TARGETS)
def test_files_and_directories_can_be_read_as_umask_says(tmp_path, make_hf, save_format, mask):
    old = os.umask(mask)
    try:
        convert(request(make_hf(), tmp_path, save_format))
    finally:
        os.umask(old)
    for path in (tmp_path / "out").rglob("*"):
        allowed = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == allowed & ~mask, path


@pytest.mark.parametrize("save_format", TARGETS)
def test_an_empty_directory_may_exist_and_a_full_one_stays_as_it_is(tmp_path, make_hf, save_format):
    hf = make_hf()
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ConversionError, match=r"out: is not empty \(it holds precious\)"):
            convert(request(hf, tmp_path, save_format, **options))
    assert files_of(out) == {"precious"}
    (out / "precious").unlink()
    convert(request(hf, tmp_path, save_format))
    assert "precious" not in files_of(out)


@pytest.mark.parametrize("save_format", TARGETS)
def test_only_an_earlier_output_is_replaced_and_only_when_told_to(tmp_path, make_hf, save_format):
    old, new = make_hf("old"), make_hf("new", vocab_size=50)
    convert(request(old, tmp_path, save_format))
    before = files_of(tmp_path / "out")
    with pytest.raises(ConversionError, match="replace it with --overwrite"):
        convert(request(new, tmp_path, save_format))
    convert(request(new, tmp_path, save_format, overwrite=True))
    assert files_of(tmp_path / "out") == before
    convert(request(new, tmp_path, save_format, verify_only=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]


def test_checkpoints_of_a_training_are_never_replaced(tmp_path, make_hf, make_megatron):
    hf = make_hf()
    root = make_megatron(hf, "out")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ConversionError, match="out: is not empty"):
            convert(request(hf, tmp_path, "mcore", **options))
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "5"
    shutil.rmtree(root)
    convert(request(hf, tmp_path, "mcore"))
    (root / "iter_0000001").mkdir()  # a training went on from the converted weights
    with pytest.raises(ConversionError, match="out: is not empty"):
        convert(request(hf, tmp_path, "mcore", overwrite=True))


def test_a_result_inside_its_source_is_refused(tmp_path, make_hf):
    hf = make_hf()
    for place in (hf.path, hf.path / "sub", hf.path.parent):
        with pytest.raises(ConversionError, match="lies in --load-dir, or around it"):
            convert(Request(load_dir=hf.path, save_dir=place, save_format="hf"))
    file = tmp_path / "config.json"
    file.write_text("x")
    with pytest.raises(ConversionError, match=r"config.json: is a file"):
        convert(Request(load_dir=hf.path, save_dir=file, save_format="hf"))


SLOW = """
import contextlib, sys, time
from ml_convert import cli

moment, seconds = sys.argv[1], float(sys.argv[2])

def progress(what, nbytes, total):
    if what == moment:
        print("ready", flush=True)
        time.sleep(seconds)

cli._progress_bar = lambda: contextlib.nullcontext(progress)
sys.exit(cli.main(sys.argv[3:]))
"""


def run_slowly(hf, out, save_format, *, moment, seconds):
    """Start the command; it prints a line and sleeps after each band it works on."""
    words = ["--load-dir", hf.path, "--save-dir", out, "--save-format", save_format]
    words += ["--workers", 1]
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, moment, str(seconds), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("save_format", TARGETS)
@pytest.mark.parametrize("moment", ["converting", "verifying", "hashing"])
def test_killed_at_any_moment_nothing_loadable_is_left_and_a_second_run_works(
    tmp_path, make_hf, save_format, moment
):
    hf, out = make_hf(), tmp_path / "out"
    with run_slowly(hf, out, save_format, moment=moment, seconds=60) as run:
        assert run.stdout.readline() == "ready\n"
        run.kill()
    left_over = {path for path in tmp_path.rglob("*") if ".tmp-" in path.name}
    assert left_over
    with pytest.raises(ConversionError):
        convert(Request(load_dir=out, save_dir=tmp_path / "x", save_format="hf"))
    convert(request(hf, tmp_path, save_format))
    assert not any(path.exists() for path in left_over)


@pytest.mark.parametrize("save_format", TARGETS)
def test_ctrl_c_stops_soon_and_cleans_up(tmp_path, make_hf, save_format):
    hf, out = make_hf(), tmp_path / "out"
    with run_slowly(hf, out, save_format, moment="converting", seconds=0.5) as run:
        assert run.stdout.readline() == "ready\n"
        run.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert run.wait(30) == 130
    assert time.monotonic() - started < 5  # all bands would take 15 s
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("save_format", TARGETS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, make_hf, save_format):
    hf, out = make_hf(), tmp_path / "out"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from ml_convert.cli import main; sys.exit(main())"
    )
    words = ["--load-dir", hf.path, "--save-dir", out, "--save-format", save_format]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("ml-convert: File too large: ")
    assert str(out) in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_too_little_room_is_known_before_anything_is_written(tmp_path, make_hf, monkeypatch):
    hf = make_hf()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"bytes are needed, 1,000 are free"):
        convert(request(hf, tmp_path, "mcore"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_error_in_the_middle_leaves_nothing_behind(tmp_path, make_hf):
    hf = make_hf(tie_word_embeddings=True)
    other = np.roll(hf.tensors["model.embed_tokens.weight"], 1)
    shutil.rmtree(hf.path)
    hf = make_hf(tie_word_embeddings=True, extra={"lm_head.weight": other})
    for save_format in TARGETS:
        with pytest.raises(ConversionError, match=r"lm_head.weight should repeat model.embed_tok"):
            convert(request(hf, tmp_path, save_format))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("save_format", TARGETS)
def test_what_came_to_be_there_meanwhile_stays(tmp_path, make_hf, save_format):
    hf, out = make_hf(), tmp_path / "out"

    def somebody_else(*_):
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("precious")

    with pytest.raises(ConversionError, match=r"is not empty \(it holds notes.txt\)"):
        convert(request(hf, tmp_path, save_format), progress=somebody_else)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_two_conversions_to_one_place_do_not_replace_each_other(tmp_path, make_hf):
    hf, other = make_hf(), tmp_path / "other"
    convert(Request(load_dir=hf.path, save_dir=other, save_format="hf"))

    def second(*_):
        if other.exists():
            other.rename(tmp_path / "out")

    with pytest.raises(ConversionError, match="holds an earlier output; replace it with --overwr"):
        convert(request(hf, tmp_path, "hf"), progress=second)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_the_way_back_is_written_where_it_is_found_again(tmp_path, make_hf):
    """What a kill leaves of `--verify roundtrip` lies in what the next run removes."""
    seen = set()

    def look(what, *_):
        if what == "converting back":
            seen.update(path.name for path in (tmp_path / "out").iterdir())

    convert(request(make_hf(), tmp_path, "mcore", verify="roundtrip"), progress=look)
    assert len(seen) == 1


@pytest.mark.parametrize("save_format", TARGETS)
def test_overwrite_keeps_files_of_others(tmp_path, make_hf, save_format):
    hf = make_hf()
    root = convert(request(hf, tmp_path, save_format)).path
    (root / "notes.txt").write_text("precious")
    with pytest.raises(ConversionError, match=r"is not empty \(it holds notes.txt\)"):
        convert(request(hf, tmp_path, save_format, overwrite=True))
    assert (root / "notes.txt").read_text() == "precious"
    (root / "notes.txt").unlink()
    convert(request(hf, tmp_path, save_format, overwrite=True))


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("save_format", TARGETS)
def test_a_link_is_followed(tmp_path, make_hf, save_format, exists):
    disk, hf = tmp_path / "big" / "disk", make_hf()
    disk.parent.mkdir()
    if exists:
        disk.mkdir()
    (tmp_path / "out").symlink_to(disk)
    convert(request(hf, tmp_path, save_format))
    assert (tmp_path / "out").is_symlink()
    assert files_of(disk)
    assert {path.name for path in tmp_path.iterdir()} == {"big", "out", hf.path.name}
    assert {path.name for path in disk.parent.iterdir()} == {"disk"}


def test_a_file_in_the_way_is_named(tmp_path, make_hf):
    (tmp_path / "out").write_text("a file")
    wanted = Request(load_dir=make_hf().path, save_dir=tmp_path / "out" / "x", save_format="hf")
    with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*out'$"):
        convert(wanted)


def test_a_single_file_is_summed_up_while_it_is_written(tmp_path, make_hf, monkeypatch):
    """So that several threads have something to do to the end; the sum is that of the file."""
    told = []
    sum_up = Sealer.grown

    def grown(self, name, count):
        told.append(count)
        sum_up(self, name, count)

    monkeypatch.setattr(execute, "_GROWTH", 1024)
    monkeypatch.setattr(sealing, "_WINDOW", mmap.ALLOCATIONGRANULARITY)
    monkeypatch.setattr(Sealer, "grown", grown)
    hf, out = make_hf(), tmp_path / "out"
    convert(Request(load_dir=hf.path, save_dir=out, save_format="hf", workers=1, verify="none"))
    content = (out / "model.safetensors").read_bytes()
    assert len(told) > 5
    assert max(told) > len(content) / 2
    (entry,) = (e for e in read_manifest(out).files if e.path.name == "model.safetensors")
    assert entry.sha256 == hashlib.sha256(content).hexdigest()
