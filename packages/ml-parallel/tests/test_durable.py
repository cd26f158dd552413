"""Whatever becomes of a writer, there is the old checkpoint or the new one, and one writer only."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml_parallel import checkpoint, durable
from ml_parallel.checkpoint import MANIFEST, MODEL_FILE, TRACKER, CheckpointError


def save(root, iteration, content=b"weights"):
    """Write a checkpoint of two ranks as a training run does."""
    temporary = checkpoint.begin(root, iteration)
    entries = []
    for rank in (0, 1):
        path = temporary / f"mp_rank_00_00{rank}" / MODEL_FILE
        path.parent.mkdir()
        path.write_bytes(content + bytes([rank]))
        entries.append(checkpoint.record(path))
    return checkpoint.commit(temporary, entries)


def latest(root):
    skipped = []
    found = checkpoint.latest(root, lambda *why: skipped.append(why))
    return found and found.name, skipped


def names(root):
    return sorted(path.name for path in root.iterdir())


# A kill


# Forks a child for every step that touches the file system; it dies just before that step.
DIE_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from test_durable import save
from ml_parallel import checkpoint

root, keep = Path(sys.argv[1]), int(sys.argv[2])
STEPS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.unlink", "os.scandir",
         "os.listdir", "os.truncate", "ctypes.dlsym"}

def save_and_die(step):
    count = 0
    def die(event, _):
        nonlocal count
        count += event in STEPS
        if count > step:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    save(root, 20, b"new")
    checkpoint.prune(root, keep)
    os._exit(0)

step = 0
while True:
    pid = os.fork()
    if pid == 0:
        save_and_die(step)
    _, status = os.waitpid(pid, 0)
    skipped = []
    found = checkpoint.latest(root, lambda *why: skipped.append(why))
    for path in checkpoint.candidates(root):
        assert checkpoint.verify(path), (step, path)
    assert not skipped, (step, skipped)
    content = (found / "mp_rank_00_000" / checkpoint.MODEL_FILE).read_bytes()
    print(step, found.name, content[:3].decode(), flush=True)
    if status == 0:
        break
    step += 1
left = sorted(path.name for path in root.iterdir())
save(root, 30)
print(*left)
"""


def die_at_every_step(root, keep):
    script = [sys.executable, "-c", DIE_AT_EVERY_STEP, str(root), str(keep)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
    *steps, left = run.stdout.splitlines()
    return [step.split()[1:] for step in steps], left.split()


def test_a_writer_killed_at_any_step_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    for iteration in (5, 10):
        save(tmp_path, iteration, b"old")
    seen, left = die_at_every_step(tmp_path, keep=1)
    switch = seen.index(["iter_0000020", "new"])
    assert switch > 15  # many steps before the tracker moves, some after it
    assert len(seen) - switch > 5
    assert seen[:switch] == [["iter_0000010", "old"]] * switch
    assert seen[switch:] == [["iter_0000020", "new"]] * (len(seen) - switch)
    assert left == ["iter_0000020", TRACKER]


def test_a_writer_killed_while_it_replaces_a_checkpoint_leaves_the_old_or_the_new_one(tmp_path):
    save(tmp_path, 20, b"old")
    seen, left = die_at_every_step(tmp_path, keep=1)
    switch = seen.index(["iter_0000020", "new"])
    assert seen[:switch] == [["iter_0000020", "old"]] * switch
    assert left == ["iter_0000020", TRACKER]


SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from test_durable import save
from ml_parallel import checkpoint

for iteration in itertools.count(int(sys.argv[2])):
    save(Path(sys.argv[1]), iteration, bytes(1 << 20))
    checkpoint.prune(Path(sys.argv[1]), 2)
    print(iteration, flush=True)
"""


def test_a_writer_killed_at_random_moments_never_loses_what_it_reported(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    iteration = 0
    for life in range(8):
        script = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(iteration + 1)]
        process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=environment)
        reported = int(process.stdout.readline())
        time.sleep(0.013 * life)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split("\n")[:-1]
        reported = int(rest[-1]) if rest else reported
        found, skipped = latest(tmp_path)
        assert skipped == []
        iteration = int(found.removeprefix("iter_"))
        assert iteration >= reported
    save(tmp_path, iteration + 1)
    assert [name for name in names(tmp_path) if "tmp" in name or "old" in name] == []


# A full disk, simulated by the largest size a file may have


FULL_DISK = """
import resource, sys
from pathlib import Path
from test_durable import save

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save(Path(sys.argv[1]), 20, bytes(int(sys.argv[3])))
except OSError as error:
    print(error.strerror, Path(error.filename or "").name)
"""


@pytest.mark.parametrize(
    ("limit", "content", "named"),
    [(1000, 2000, ""), (300, 100, MANIFEST), (0, 0, "")],  # the test's own write names nothing
    ids=["model file", "manifest", "first byte"],
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, limit, content, named):
    save(tmp_path, 10)
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit), str(content)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    run = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=60)
    assert run.stdout == f"File too large {named}\n", run.stderr
    assert latest(tmp_path) == ("iter_0000010", [])
    assert checkpoint.read_tracker(tmp_path) == 10
    assert len(checkpoint.candidates(tmp_path)) == 1


def test_a_full_disk_at_the_last_moment_leaves_the_old_tracker(tmp_path):
    save(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            durable.write(tmp_path / TRACKER, b"20")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read_tracker(tmp_path) == 10
    assert names(tmp_path) == ["iter_0000010", TRACKER]


# One writer


CLAIM = """
import sys
from pathlib import Path
from ml_parallel import checkpoint

with checkpoint.claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_until_the_first_one_ends(tmp_path):
    root = tmp_path / "deep" / "checkpoints"
    script = [sys.executable, "-c", CLAIM, str(root)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        where = f"{root}: another run writes its checkpoints there (process {first.pid} on "
        with pytest.raises(CheckpointError, match=re.escape(where)), checkpoint.claimed(root):
            pass
        first.send_signal(signal.SIGKILL)  # as good as any end
        first.wait()
    with checkpoint.claimed(root):
        assert names(root) == [checkpoint.LOCK]
    assert names(root) == []


def test_claiming_a_place_that_cannot_be_written_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), checkpoint.claimed(tmp_path / "file" / "checkpoints"):
        pass
