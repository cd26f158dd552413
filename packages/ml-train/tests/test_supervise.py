"""One failing rank ends the others, and one line says why."""

import contextlib
import os
import re
import signal
import socket
import time

import pytest
from launched import HANG, assert_gone, free_ports, run, start, started

from ml_models.flags import UsageError
from ml_train import ranks, supervise
from ml_train.launch import LaunchConfig, launch
from ml_train.nodes import Failure, Nodes
from ml_train.peers import LOST, PAUSE_S


def test_a_killed_rank_ends_the_job_within_seconds():
    process = start(HANG, nproc=4)
    pids = started(process, 4)
    os.kill(pids[1], signal.SIGKILL)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    assert process.returncode == 128 + 9
    assert errors == (
        f"ml-train: rank 1 (pid {pids[1]}) was killed by signal 9 (SIGKILL); "
        f"stopped the other 3 ranks\n"
    )
    assert_gone(pids, within=0)


def test_the_others_may_fail_by_themselves_and_the_first_one_counts():
    fail = """
import os, sys, time
rank = int(os.environ["RANK"])
if rank == 2:
    os.kill(os.getpid(), 11)
time.sleep(0.3 + rank / 10)
sys.exit(f"connection closed by peer")
"""
    code, output, errors = run(fail, nproc=3)
    assert code == 128 + 11
    assert output == ""
    first, second, report = sorted(errors.splitlines(), key=lambda line: line.startswith("ml-"))
    assert {first, second} == {"connection closed by peer", "[rank 1] connection closed by peer"}
    assert re.fullmatch(
        r"ml-train: rank 2 \(pid \d+\) was killed by signal 11 \(SIGSEGV\); "
        r"the other 2 ranks failed with it",
        report,
    )


@pytest.mark.parametrize(
    ("ends", "code"),
    [(("exit 1", "kill -9 $$"), 128 + 9), ((f"exit {LOST}", "exit 7"), 7)],
    ids=["killed", "not lost"],
)
def test_of_two_ranks_found_dead_the_likelier_cause_is_named(capfd, ends, code):
    pair = [
        ranks.start(["sh", "-c", end], {**os.environ, "RANK": str(rank)})
        for rank, end in enumerate(ends)
    ]
    for rank in pair:
        os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOWAIT)
    assert supervise.supervise(pair, ranks.Signals(), grace_s=0.0) == code
    assert "rank 1 (pid " in capfd.readouterr().err


def test_the_exit_code_is_that_of_the_rank_that_failed():
    fail = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    code, _, errors = run(fail, options={"grace_s": 0.2})
    assert code == 7
    assert re.fullmatch(
        r"ml-train: rank 1 \(pid \d+\) failed with exit code 7; stopped the other 1 rank\n", errors
    )


def test_a_rank_that_has_ended_well_is_no_failure():
    fail = "import os, sys, time; time.sleep(0.3 * (os.environ['RANK'] == '1'))"
    assert run(fail, options={"grace_s": 0.0}) == (0, "", "")


def test_a_lone_rank_that_says_why_it_failed_needs_no_other_line():
    assert run("import sys; sys.exit('disk full')", nproc=1) == (1, "", "disk full\n")
    code, _, errors = run("import os; os.kill(os.getpid(), 9)", nproc=1)
    assert code == 128 + 9
    assert errors.startswith("ml-train: rank 0 (pid ")


MISTAKE = r"""
import os, sys, time
time.sleep(0.2 * int(os.environ["RANK"]))
sys.stderr.write("warning\n")
sys.stderr.write("ml-train pretrain: --lr -1: must be positive\n")
sys.exit(2)
"""


def test_a_mistake_that_every_rank_finds_is_shown_once():
    code, output, errors = run(MISTAKE, nproc=3)
    assert (code, output) == (2, "")
    assert errors.count("ml-train pretrain: --lr -1: must be positive\n") == 1
    assert "[rank 1] warning\n" in errors
    assert "exit code" not in errors


def test_a_mistake_that_other_ranks_find_is_shown_once():
    others = "import os, sys\nif os.environ['RANK'] == '0': sys.exit()\n" + MISTAKE
    code, output, errors = run(others, nproc=3)
    assert (code, output) == (2, "")
    assert errors.count("ml-train pretrain: --lr -1: must be positive\n") == 1


def test_different_mistakes_are_all_shown():
    others = "import os, sys\nif os.environ['RANK'] == '0': sys.exit()\n" + MISTAKE
    _, _, errors = run(
        others.replace("-1", "{os.environ['RANK']}").replace('"ml-', 'f"ml-'), nproc=3
    )
    assert "[rank 1] ml-train pretrain: --lr 1: must be positive\n" in errors
    assert "[rank 2] ml-train pretrain: --lr 2: must be positive\n" in errors


# What several ranks say

FULL = r"""
import os, sys
sys.stderr.write("ml-train pretrain: cannot write the checkpoint (rank 0): disk full: f\n")
sys.exit(1)
"""


def test_a_failure_that_every_rank_has_is_one_line():
    line = "ml-train pretrain: cannot write the checkpoint (rank 0): disk full: f\n"
    assert run(FULL, nproc=3) == (1, "", line)


def test_a_rank_that_is_slow_to_end_after_the_same_message_adds_no_line():
    slow = FULL.replace(
        "sys.exit", "import time\ntime.sleep(60 * int(os.environ['RANK']))\nsys.exit"
    )
    code, _, errors = run(slow, options={"grace_s": 0.5})
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("ml-train pretrain: cannot write")


def test_a_failure_of_another_rank_alone_is_shown_with_its_number():
    code, _, errors = run("import os, time\nif os.environ['RANK'] == '0': time.sleep(60)\n" + FULL)
    assert code == 1
    assert errors.startswith("[rank 1] ml-train pretrain: cannot write")
    assert errors.count("\n") == 1


def test_a_traceback_is_shown_whole():
    code, _, errors = run("import sys\nraise RuntimeError('a bug')")
    assert code == 1
    assert "\nRuntimeError: a bug\n" in errors
    assert "[rank 1] RuntimeError: a bug\n" in errors


LEFT = f"""
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(0.5)
    sys.stderr.write("ml-train pretrain: file too large: metrics.jsonl\\n")
    sys.exit(1)
sys.stderr.write("ml-train pretrain: lost contact with another rank\\n")
sys.exit({LOST})
"""


def test_a_rank_that_lost_another_one_is_never_the_cause():
    code, _, errors = run(LEFT, nproc=3)
    assert (code, errors) == (1, "ml-train pretrain: file too large: metrics.jsonl\n")


def test_a_lost_rank_speaks_if_nobody_knows_the_cause():
    code, _, errors = run(LEFT.replace('"0"', '"none"'), nproc=3)
    assert (code, errors) == (LOST, "ml-train pretrain: lost contact with another rank\n")


def test_a_lost_rank_is_silent_for_longer_than_the_launcher_lets_it_live():
    process = start(f"""
import os, sys, time
print("pid", os.environ["RANK"], os.getpid(), flush=True)
time.sleep({PAUSE_S})
sys.exit({LOST})
""")
    pids = started(process, 2)
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + 9
    assert errors.endswith("(SIGKILL); stopped the other 1 rank\n")


# Other nodes


def on_two_nodes(rank, nproc=1, **options):
    """Start the launchers of a job on two nodes, which both are this machine."""
    config = {"nnodes": 2, "master_addr": "localhost", "master_port": free_ports()}
    return [
        start(rank, nproc, options={"config": {**config, "node_rank": node}, **options})
        for node in range(2)
    ]


@pytest.mark.parametrize("node", [0, 1])
def test_both_nodes_end_and_name_the_rank_that_was_killed(node):
    launchers = on_two_nodes(HANG, nproc=2)
    pids = [started(launcher, 2, first=2 * number) for number, launcher in enumerate(launchers)]
    os.kill(pids[node][1], signal.SIGKILL)
    begin = time.monotonic()
    errors = [launcher.communicate(timeout=60)[1] for launcher in launchers]
    assert time.monotonic() - begin < 10
    assert [launcher.returncode for launcher in launchers] == [128 + 9] * 2
    rank = 2 * node + 1
    assert errors[node] == (
        f"ml-train: rank {rank} (pid {pids[node][1]}) was killed by signal 9 (SIGKILL); "
        f"stopped the other 1 rank\n"
    )
    assert errors[1 - node] == (
        f"ml-train: rank {rank} of node {node} was killed by signal 9 (SIGKILL); "
        f"stopped 2 ranks of this node\n"
    )
    assert_gone([*pids[0], *pids[1]], within=0)


def test_a_third_node_hears_of_the_second_one_from_the_first():
    server = socket.create_server(("127.0.0.1", 0))
    address = (socket.AF_INET, server.getsockname())
    with Nodes(server=server) as first, Nodes(address=address) as second:
        second.tell(Failure(1, 5, -9))
        with Nodes(address=address) as third:
            end = time.monotonic() + 30
            while third.poll() is None and time.monotonic() < end:
                second.poll()
                first.poll()
            assert third.poll() == first.poll() == Failure(1, 5, -9)


def test_what_is_no_launcher_is_not_listened_to():
    server = socket.create_server(("127.0.0.1", 0))
    with Nodes(server=server) as first, socket.create_connection(server.getsockname()) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n\n1 2\n" + b"x" * 300)
        stranger.settimeout(0.01)
        closed = False
        while not closed:
            assert first.poll() is None
            with contextlib.suppress(TimeoutError):
                try:
                    closed = stranger.recv(1) == b""
                except ConnectionResetError:
                    closed = True


def test_an_unknown_address_is_refused_before_any_rank_starts(tmp_path):
    config = LaunchConfig(nnodes=2, node_rank=1, master_addr="no.such.host.invalid")
    with pytest.raises(UsageError, match=r"--master-addr no\.such\.host\.invalid: is no address"):
        launch(["touch", str(tmp_path / "started")], config)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_of_the_launchers_is_named():
    port = free_ports()
    config = LaunchConfig(nnodes=2, master_addr="localhost", master_port=port)
    taken = rf"--master-port {port}: port {port + 1}, which the launchers use, cannot be listened"
    with socket.create_server(("", port + 1)), pytest.raises(UsageError, match=taken):
        launch(["true"], config)
