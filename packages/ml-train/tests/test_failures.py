"""What can happen to `ml-train pretrain` while it starts and runs, and the one line it says."""

from __future__ import annotations

import fcntl
import os
import pty
import resource
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from launched import free_ports
from pretrain_job import (
    assert_one_line,
    command,
    flags,
    predictable_corpus,
    run,
    started,
    steps,
    wait_for_step,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return predictable_corpus(tmp_path_factory.mktemp("data"))


def ranks_of(launcher):
    """Return the processes of a launcher's ranks, by rank, as soon as there are two."""
    found = {}
    while len(found) < 2:
        assert launcher.poll() is None, launcher.stderr.read()
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for pid in children:
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(pid)
        time.sleep(0.01)
    return found


# A rank dies


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_within_seconds_and_is_named(corpus):
    words = flags(corpus, nproc_per_node=2, pipeline_model_parallel_size=2, train_iters=100_000)
    with started(words) as process:
        wait_for_step(process, 3)
        ranks = ranks_of(process)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=120)
    assert time.monotonic() - killed < 20
    assert process.returncode == 128 + signal.SIGKILL
    assert_one_line(errors, f"rank 1 (pid {ranks[1]}) was killed by signal 9 (SIGKILL)")
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_rank_killed_on_another_node_is_named_on_this_one(corpus):
    nodes = {"nnodes": 2, "master_addr": "localhost", "master_port": free_ports()}
    words = flags(corpus, tensor_model_parallel_size=2, train_iters=100_000, **nodes)
    with started([*words, "--node-rank", "1"]) as other, started(words) as first:
        wait_for_step(first, 3)
        (victim,) = (
            pid
            for pid in Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
            if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(int(victim), signal.SIGKILL)
        errors = [process.communicate(timeout=120)[1] for process in (first, other)]
    assert (first.returncode, other.returncode) == (137, 137)
    assert_one_line(errors[0], "ml-train: rank 1 of node 1 was killed by signal 9 (SIGKILL)")
    assert_one_line(errors[1], f"ml-train: rank 1 (pid {victim}) was killed by signal 9 (SIGKILL)")


# The ranks do not meet


@pytest.mark.slow
def test_ranks_that_do_not_meet_say_who_is_missing(corpus):
    layout = {"nnodes": 2, "master_addr": "localhost", "rendezvous_timeout_minutes": 0.02}
    for node, part in ((0, "1/2 clients joined"), (1, "rank 0 did not answer")):
        words = flags(corpus, node_rank=node, master_port=free_ports(), **layout)
        process = run(words)
        assert process.returncode == 1
        assert_one_line(process.stderr, "localhost port ", part)


# A signal comes early


def handles_sigterm(pid):
    """Tell whether a process has a handler for SIGTERM by now."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("moment", ["alone", "ranks start", "a rank runs"])
def test_a_signal_before_the_first_step_ends_the_run_well(corpus, tmp_path, moment):
    nproc = 1 if moment == "alone" else 2
    metrics = tmp_path / "metrics.jsonl"
    words = flags(corpus, nproc_per_node=nproc, metrics_file=metrics, train_iters=100_000)
    with started(words) as process:
        watched = process.pid if moment == "alone" else ranks_of(process)[0]
        while moment != "ranks start" and not handles_sigterm(watched):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output == "stopped by SIGTERM before the first step\n"
    assert not metrics.exists()


# The terminal goes away


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_saves_when_its_terminal_is_closed(corpus, tmp_path, nproc):
    words = flags(corpus, nproc_per_node=nproc, save=tmp_path, train_iters=100_000)
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        command(words),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that its end is a SIGHUP
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(inside)
    output = b""
    while b"iteration        3/" not in output:
        output += os.read(terminal, 10_000)
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    (saved,) = tmp_path.glob("iter_*")
    assert [step["iteration"] for step in steps(tmp_path / "metrics.jsonl")] == [
        *range(1, int(saved.name[5:]) + 1)
    ]


# All ranks fail together


@pytest.mark.slow
def test_a_run_that_only_makes_nans_gives_up_with_one_message(corpus):
    changes = {"lr": 1e30, "max_skipped_iterations": 3, "train_iters": 50, "nproc_per_node": 2}
    process = run(flags(corpus, **changes))
    assert process.returncode == 1
    assert_one_line(process.stderr, "3 steps in a row were skipped", "--lr")


@pytest.fixture
def saved(corpus, tmp_path):
    """Return the flags of a run on two ranks that has saved step 2, and where."""
    layout = {"nproc_per_node": 2, "tensor_model_parallel_size": 2}
    words = flags(corpus, save=tmp_path, load=tmp_path, train_iters=2, lr_decay_iters=4, **layout)
    assert run(words).returncode == 0
    return words, tmp_path


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_keeps_the_last_checkpoint(saved):
    words, save = saved

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    process = run([*words, "--train-iters", "4"], preexec_fn=limit)
    assert process.returncode == 1
    assert_one_line(process.stderr, "cannot write the checkpoint", ".pt")
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000002"]


@pytest.mark.slow
def test_a_failure_of_rank_0_alone_is_not_blamed_on_another_rank(corpus, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "note", "iteration": 0}\n' * 500)  # there is no room for more
    words = flags(corpus, nproc_per_node=2, metrics_file=metrics, train_iters=60)
    process = run(words, preexec_fn=limit)
    assert process.returncode == 1
    assert_one_line(process.stderr, str(metrics))
