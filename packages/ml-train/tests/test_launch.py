"""The ranks of a job start, speak and end together, whatever ends them."""

import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from launched import HANG, TRAIN, alive, assert_gone, free_ports, run, start, started

from ml_models.flags import UsageError
from ml_train import launch as launching
from ml_train.launch import LaunchConfig, launch, launched_world_size, under_launcher

# Starting


def test_a_job_returns_0_when_every_rank_does():
    assert run("pass", nproc=3) == (0, "", "")


SHOW = """
import json, os
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
         "MASTER_PORT", "OMP_NUM_THREADS", "OTHER")
print(json.dumps({name: os.environ.get(name) for name in names}))
"""


def shown(output):
    """Return the environments that ranks have shown, by rank."""
    found = [json.loads(line[line.index("{") :]) for line in output.splitlines()]
    return sorted(found, key=lambda environment: environment["RANK"])


def test_ranks_find_each_other_through_the_environment():
    environment = {"OTHER": "kept", "OMP_NUM_THREADS": "7", "RANK": "5"}
    code, output, _ = run(SHOW, environment=environment)
    assert code == 0
    first, second = shown(output)
    port = int(first["MASTER_PORT"])
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "7",
        "OTHER": "kept",
    }
    assert first == {"RANK": "0", "LOCAL_RANK": "0", **common}
    assert second == {"RANK": "1", "LOCAL_RANK": "1", **common}
    with socket.create_server(("", port)):  # it was free for the ranks
        pass


def test_the_port_of_one_node_is_none_that_the_system_gives_to_connections(monkeypatch):
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(launching._FREE_PORTS) < low
    port = free_ports()
    monkeypatch.setattr(launching, "_FREE_PORTS", range(port, port + 2))
    with socket.create_server(("", port)):
        assert launch(["sh", "-c", f"exit $((MASTER_PORT - {port}))"], LaunchConfig()) == 1
        with (
            socket.create_server(("", port + 1)),
            pytest.raises(UsageError, match=rf"no port from {port} to {port + 1} can be listened"),
        ):
            launch(["true"], LaunchConfig())


def test_ranks_share_the_cores():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    cores = len(os.sched_getaffinity(0))
    for nproc in (1, 3):
        _, output, _ = run(SHOW, nproc, options={"environment": environment})
        threads = {environment["OMP_NUM_THREADS"] for environment in shown(output)}
        assert threads == {str(max(1, cores // nproc))}


def test_ranks_are_numbered_through_the_nodes():
    config = {"nnodes": 2, "master_addr": "localhost", "master_port": free_ports()}
    found = []
    for node_rank in (1, 0):
        _, output, _ = run(SHOW, options={"config": {**config, "node_rank": node_rank}})
        found = shown(output) + found
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        assert len({environment[name] for environment in found}) == 1
    assert found[0]["WORLD_SIZE"] == "4"
    assert found[0]["MASTER_ADDR"] == "localhost"
    assert found[0]["MASTER_PORT"] == str(config["master_port"])
    assert [environment["RANK"] for environment in found] == ["0", "1", "2", "3"]
    assert [environment["LOCAL_RANK"] for environment in found] == ["0", "1", "0", "1"]
    assert [environment["GROUP_RANK"] for environment in found] == ["0", "0", "1", "1"]


def test_a_rank_knows_that_it_was_launched():
    show = "import sys; from ml_train.launch import *; sys.exit(9 if under_launcher() else 1)"
    assert run(f"import sys; sys.path[:] = {sys.path}; {show}", nproc=1)[0] == 9
    assert not under_launcher({"RANK": "0"})
    assert under_launcher({"RANK": "0", "WORLD_SIZE": "1"})


def test_flags_that_ask_for_other_ranks_than_a_launcher_has_started_are_refused():
    environment = {"RANK": "1", "WORLD_SIZE": "4"}
    two_nodes = LaunchConfig(nproc_per_node=2, nnodes=2, master_addr="localhost")
    assert launched_world_size(two_nodes, environment) == 4
    assert launched_world_size(LaunchConfig(), environment) == 4
    with pytest.raises(UsageError) as caught:
        launched_world_size(LaunchConfig(nproc_per_node=2), environment)
    assert str(caught.value) == (
        "--nproc-per-node 2 with --nnodes 1: are 2 ranks, but by WORLD_SIZE=4 in the environment "
        "a launcher has started 4, this one among them; unset RANK and WORLD_SIZE, or leave the "
        "flags out"
    )


def test_launching_needs_neither_torch_nor_megatron():
    script = "import sys, ml_train.launch; print({'torch', 'megatron'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "set()\n", found.stderr


# Mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nproc_per_node": 0}, "--nproc-per-node 0: must be at least 1"),
        ({"nnodes": 0}, "--nnodes 0: must be at least 1"),
        ({"node_rank": 1}, "--node-rank 1: must be from 0 to 0 with --nnodes 1"),
        ({"nnodes": 2}, "--nnodes 2: needs --master-addr, the address of node 0"),
        ({"master_port": 65536}, "--master-port 65536: must be from 1 to 65535"),
        (
            {"master_port": 65535, "nnodes": 2, "master_addr": "localhost"},
            "--master-port 65535: must be at most 65534 with several nodes",
        ),
        (
            {"rendezvous_timeout_minutes": 0.0},
            "--rendezvous-timeout-minutes 0.0: must be more than 0, and at most 10080",
        ),
    ],
)
def test_an_impossible_launch_is_refused(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared in full
        LaunchConfig(**fields)
    assert str(error.value) == message


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_port_in_use_is_named_before_any_rank_starts(address, tmp_path):
    command = ["touch", str(tmp_path / "started")]
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        for others in ({}, {"nnodes": 2, "master_addr": "localhost"}):
            with pytest.raises(UsageError, match=rf"--master-port {port}: cannot be listened on"):
                launch(command, LaunchConfig(master_port=port, **others))
        assert list(tmp_path.iterdir()) == []
        # Another node only connects to it.
        other_node = LaunchConfig(
            master_port=port, nnodes=2, node_rank=1, master_addr="localhost", nproc_per_node=2
        )
        assert launch(command, other_node) == 0
    assert launch(command, LaunchConfig(master_port=port)) == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_a_command_that_does_not_exist_is_an_error():
    with pytest.raises(FileNotFoundError):
        launch(["/nonexistent/program"], LaunchConfig(nproc_per_node=2))


# Output


def test_lines_of_other_ranks_are_shown_with_their_number():
    speak = r"""
import os, sys, time
if os.environ["RANK"] == "0":
    sys.exit()
sys.stdout.write("one\nhalf")
time.sleep(0.1)
sys.stdout.write(" and half\nno end of line")
sys.stderr.write("error\nlast \u00e9\n")
"""
    code, output, errors = run(speak, environment={"PYTHONIOENCODING": "utf-8"})
    assert code == 0
    assert output == "[rank 1] one\n[rank 1] half and half\n[rank 1] no end of line\n"
    assert errors == "[rank 1] error\n[rank 1] last \u00e9\n"


def test_lines_are_shown_while_the_ranks_run():
    process = start(TRAIN.replace("flush=True", "flush=os.environ['RANK'] == '0'"), nproc=3)
    started(process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].count("saved after SIGTERM") == 3


def test_much_output_is_shown_whole():
    speak = (
        "import os\nfor number in range(20_000 * int(os.environ['RANK'])): print('line', number)"
    )
    code, output, _ = run(speak)
    assert code == 0
    assert output.splitlines() == [f"[rank 1] line {number}" for number in range(20_000)]


def test_rank_0_has_the_terminal_itself():
    ask = "import os, sys; print(os.environ['RANK'], sys.stdout.isatty(), sys.stderr.isatty())"
    terminal, inside = pty.openpty()
    process = start(ask, stdout=inside, stderr=inside)
    os.close(inside)
    assert process.wait(timeout=60) == 0
    output = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert sorted(output.splitlines()) == ["0 True True", "[rank 1] 1 False False"]


# Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_ranks_save(number):
    process = start(TRAIN)
    pids = started(process, 2)
    process.send_signal(number)
    time.sleep(0.02)
    process.send_signal(number)  # a wrapper passes it on as well, or the scheduler repeats it
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == [
        f"[rank 1] saved after {number.name}",
        f"saved after {number.name}",
    ]
    assert errors == ""
    assert_gone(pids, within=0)


def test_ctrl_c_in_a_terminal_reaches_the_ranks_once():
    terminal, inside = pty.openpty()
    process = start(
        TRAIN,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its Ctrl-C is this session's
    )
    os.close(inside)
    output = b""
    while output.count(b"pid ") < 2:
        output += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    assert process.wait(timeout=60) == 0
    output = os.read(terminal, 10_000)
    os.close(terminal)
    assert output.count(b"saved after SIGINT\r\n") == 2


def test_a_second_ctrl_c_kills():
    process = start(HANG, nproc=3)
    pids = started(process, 3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.6)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "ml-train: interrupted again; killed 3 ranks\n"
    assert_gone(pids, within=0)


def test_ranks_that_a_signal_ends_had_nothing_to_save():
    process = start(
        "import os, time; print('pid', os.environ['RANK'], os.getpid(), flush=True); time.sleep(60)"
    )
    started(process, 2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""
    assert output == "stopped by SIGTERM before the first step\n"


def test_nohup_is_respected():
    process = start(
        TRAIN.replace(", signal.SIGHUP", ""),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    started(process, 2)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].count("saved after SIGINT") == 2


# No orphans


def test_ranks_save_and_end_when_the_parent_is_killed():
    process = start(TRAIN)
    pids = started(process, 2)
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert output == "saved after SIGTERM\n"  # of rank 0; nobody shows what the others say
    assert_gone(pids, within=30)


def test_ranks_that_hang_are_killed_when_the_parent_is_killed():
    process = start(HANG, options={"orphan_grace_s": 0.5})
    pids = started(process, 2)
    guard = guard_of(process)
    process.kill()
    assert_gone([*pids, guard], within=30)
    process.communicate()


def test_ranks_end_when_the_parent_and_its_guard_are_killed():
    process = start(TRAIN)
    pids = started(process, 2)
    os.kill(guard_of(process), signal.SIGKILL)
    time.sleep(0.2)
    assert all(map(alive, pids))  # without a guard the job still runs
    process.kill()
    assert_gone(pids, within=30)
    process.communicate()


def test_processes_that_ranks_have_started_end_with_them():
    parent = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
print("pid", os.environ["RANK"], child.pid, flush=True)
time.sleep(60 if os.environ["RANK"] == "1" else 0.2)
sys.exit(3 if os.environ["RANK"] == "0" else 0)
"""
    process = start(parent, options={"grace_s": 0.2})
    children = started(process, 2)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert_gone(children, within=30)


def test_no_guard_stays_behind():
    process = start(TRAIN)
    started(process, 2)
    guard = guard_of(process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert_gone([guard], within=0)


def guard_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (guard,) = (pid for pid in children if "guard.py" in Path(f"/proc/{pid}/cmdline").read_text())
    return int(guard)
