"""Jobs whose ranks are small programs, run by the real launcher."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = """
import json, sys
from ml_train.launch import LaunchConfig, launch
rank, config, options = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.exit(launch([sys.executable, "-S", "-c", rank], LaunchConfig(**config), **options))
"""
# What a rank that trains does: on a signal it finishes its step, saves and returns 0.
TRAIN = """
import os, signal, sys, time
asked = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, _: asked.append(number))
print("pid", os.environ["RANK"], os.getpid(), flush=True)
end = time.monotonic() + 60
while not asked and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
print("saved after", *(signal.Signals(number).name for number in asked), flush=True)
"""
# A rank inside a collective whose peer is gone: signals do not end it.
HANG = """
import os, signal, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("pid", os.environ["RANK"], os.getpid(), flush=True)
time.sleep(60)
"""


def start(rank, nproc=2, options=None, environment=None, **streams):
    config = {"nproc_per_node": nproc, **(options or {}).pop("config", {})}
    script = [sys.executable, "-c", LAUNCH, rank, json.dumps(config), json.dumps(options or {})]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    environment = {**os.environ, **(environment or {})}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen(script, text=True, env=environment, start_new_session=True, **streams)


def run(rank, nproc=2, **others):
    process = start(rank, nproc, **others)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def started(process, nproc, first=0):
    """Wait until every rank has given its process id, and return them."""
    pids = {}
    while len(pids) < nproc:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if match := re.fullmatch(r"(?:\[rank \d+\] )?pid (\d+) (\d+)\n", line):
            pids[int(match[1])] = int(match[2])
    return [pids[rank] for rank in range(first, first + nproc)]


def alive(pid):
    """Tell whether a process runs; one that has ended but was not reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(pids, within):
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if alive(pid)] == []


def free_ports():
    """Return a free port whose successor is free as well, where no connection of a job comes."""
    while True:
        port = random.SystemRandom().randrange(10000, 20000)
        try:
            with socket.create_server(("", port)), socket.create_server(("", port + 1)):
                return port
        except OSError:
            continue
