from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml_data.workers import available_cpus, map_ordered
from ml_models.flags import UsageError


def make_job(*_: object):
    """What the workers of these tests run; they import this file by its name, so it is a module."""
    return job


def job(item: tuple[str, object]) -> object:
    kind, value = item
    if kind == "sleep":
        time.sleep(float(value))
    if kind == "raise":
        raise UsageError(f"no good: {value}")
    if kind == "raise badly":
        raise UnpicklableError(str(value), 1)
    if kind == "die":
        os.kill(os.getpid(), int(value))
    if kind == "exit":
        os._exit(int(value))
    if kind == "print":
        os.write(1, b"noise")
        sys.stdout.write("noise\n")
    return os.getpid() if kind == "pid" else value


class UnpicklableError(Exception):
    def __init__(self, text: str, number: int) -> None:
        super().__init__(text[:number])


def make_refuser():
    raise UsageError("no tokenizer")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Let the workers import this file as the module it is here."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    for function in (make_job, make_refuser, make_marker, make_large, make_nothing):
        monkeypatch.setattr(function, "__module__", Path(__file__).stem)
    monkeypatch.setitem(sys.modules, Path(__file__).stem, sys.modules[__name__])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    items = [("sleep", 0.1 if n % 3 == 0 else 0.001 * n) for n in range(12)]
    results = list(map_ordered(make_job, (), items, workers=workers))
    assert results == [seconds for _, seconds in items]


def test_the_work_is_spread_over_processes_that_end_with_it():
    items = [("pid", None), ("sleep", 0.1)] * 6
    pids = {p for p in map_ordered(make_job, (), items, workers=2) if isinstance(p, int)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert not any(map(alive, pids))


def test_items_are_taken_only_a_little_ahead_of_results():
    taken = 0

    def items():
        nonlocal taken
        while True:
            taken += 1
            yield ("value", taken)

    results = map_ordered(make_job, (), items(), workers=2)
    assert [next(results) for _ in range(20)] == list(range(1, 21))
    assert taken <= 20 + 2 * 2
    results.close()


def test_no_more_processes_start_than_there_are_items():
    assert len(set(map_ordered(make_job, (), [("pid", 0)], workers=50))) == 1


def test_an_exception_of_the_function_arrives_as_it_is():
    results = map_ordered(make_job, (), [("value", 1), ("raise", 2), ("raise", 3)], workers=2)
    assert next(results) == 1
    with pytest.raises(UsageError, match="no good: 2") as caught:
        next(results)
    assert "in job" in str(caught.value.__cause__)


def test_an_exception_that_cannot_be_pickled_is_described():
    with pytest.raises(RuntimeError, match="UnpicklableError: x"):
        list(map_ordered(make_job, (), [("raise badly", "x")], workers=1))


def test_an_exception_while_the_function_is_made_arrives():
    with pytest.raises(UsageError, match="no tokenizer"):
        list(map_ordered(make_refuser, (), [1], workers=1))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("die", signal.SIGKILL), r"worker process \d+ was killed by SIGKILL \(if memory ran out"),
        (("die", signal.SIGSEGV), r"worker process \d+ was killed by SIGSEGV$"),
        (("exit", 3), r"worker process \d+ ended with exit status 3$"),
    ],
)
def test_the_death_of_a_worker_is_an_error_at_once(item, message):
    begin = time.monotonic()
    items = [("value", 1), item, *[("sleep", 30)] * 3]
    with pytest.raises(ChildProcessError, match=message):
        list(map_ordered(make_job, (), items, workers=2))
    assert time.monotonic() - begin < 25


def test_an_interrupt_at_the_terminal_does_not_reach_the_workers():
    results = map_ordered(make_job, (), [("pid", None), ("value", 1)], workers=1)
    assert os.getsid(next(results)) != os.getsid(0)
    results.close()


def test_what_a_worker_prints_does_not_reach_the_results(capfd):
    assert list(map_ordered(make_job, (), [("print", 1)] * 3, workers=1)) == [1, 1, 1]
    assert capfd.readouterr().out == ""


def test_stopping_early_ends_the_workers_at_once():
    begin = time.monotonic()
    results = map_ordered(make_job, (), [("pid", None), *[("sleep", 30)] * 4], workers=2)
    pid = next(results)
    results.close()
    assert not alive(pid)
    assert time.monotonic() - begin < 25


def test_workers_end_when_their_parent_is_killed():
    script = (
        "import sys; from ml_data.workers import map_ordered\n"
        "from test_workers import make_job\n"
        "items = [('pid', 0), *[('sleep', 0.5)] * 1000]\n"
        "for result in map_ordered(make_job, (), items, workers=1): print(result, flush=True)"
    )
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.kill()
    for _ in range(300):
        if not alive(worker):
            return
        time.sleep(0.1)
    pytest.fail(f"worker {worker} survived")


def test_a_script_needs_no_guard_and_files_in_its_directory_shadow_nothing(tmp_path):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    (tmp_path / "pickle.py").write_text("raise RuntimeError('the wrong pickle')")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    script = scripts / "script.py"
    script.write_text(
        "from ml_data.workers import map_ordered\n"
        "import operator\n"
        "print(list(map_ordered(operator.itemgetter, (1,), [[1, 2], [3, 4]], workers=2)))\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.stderr) == ("[2, 4]\n", "")


def test_available_cpus_are_those_this_process_may_use():
    assert available_cpus() == len(os.sched_getaffinity(0))


def make_marker(path):
    """Leave a mark for every time it is called."""
    with Path(path).open("a") as file:
        file.write("made\n")
    return job


def make_large():
    block = bytearray(os.urandom(1) * 200_000_000)
    return lambda _: (len(block), proportional_memory())[1]


def proportional_memory() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))


def test_the_function_is_made_once_for_all_workers(tmp_path):
    items = [("pid", None), ("sleep", 0.1)] * 6
    results = list(map_ordered(make_marker, (str(tmp_path / "marks"),), items, workers=3))
    # On a busy machine one of the three may get none of these short items.
    assert 1 < len({pid for pid in results if isinstance(pid, int)}) <= 3
    assert (tmp_path / "marks").read_text() == "made\n"


def test_workers_share_what_the_function_holds():
    sizes = list(map_ordered(make_large, (), range(30), workers=4))
    assert sizes[-1] < 150e6


def test_a_worker_that_dies_is_not_asked_again_and_the_others_end_too():
    items = [("pid", None), ("pid", None), ("sleep", 0.2), ("die", signal.SIGKILL)]
    results = map_ordered(make_job, (), [*items, *[("sleep", 0.1)] * 20], workers=2)
    pids = []
    with pytest.raises(ChildProcessError, match="was killed by SIGKILL"):
        pids.extend(result for result in results if isinstance(result, int))
    assert pids
    assert not any(map(alive, pids))


def test_the_death_of_the_process_that_workers_are_copies_of_is_an_error():
    with pytest.raises(ChildProcessError, match="ended with exit status 3"):
        list(map_ordered(make_nothing, (), [1], workers=1))


def make_nothing():
    os._exit(3)


def test_no_process_is_left_behind():
    before = set(Path("/proc").glob("[0-9]*"))
    results = map_ordered(make_job, (), [("pid", None)] * 9, workers=3)
    next(results)
    results.close()
    new = set(Path("/proc").glob("[0-9]*")) - before
    assert [path for path in new if parent_of(path) == os.getpid()] == []


def parent_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_items_and_results_of_any_size_pass():
    items = [("value", bytes(size)) for size in (0, 1, 1 << 16, 1 << 24)] * 2
    assert list(map_ordered(make_job, (), items, workers=2)) == [value for _, value in items]
