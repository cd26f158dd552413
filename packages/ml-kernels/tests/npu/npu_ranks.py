"""Several simulated NPUs, one process each, whose collectives are real ones of gloo.

    from npu_ranks import communicator, run_ranks
    from npu_simulator import semantics

    @semantics("npu_mm_all_reduce_base")
    def mm_all_reduce(x1, x2, hcom, **_):
        product = x1 @ x2
        dist.all_reduce(product, group=communicator(hcom))   # CPU tensors inside semantics: gloo
        return product

    def work(scale):                     # on each rank, simulator on, default group initialised
        out = ml_kernels.matmul_all_reduce(simulated(...), simulated(...), dist.group.WORLD)
        return to_cpu(out)               # results must pickle

    def test_all_reduce():
        first, second = run_ranks(work, 2, 0.5)

Groups have both backends, gloo for CPU tensors and torch_npu's HCCL for the names of
communicators; `torch.distributed` calls on simulated tensors go to gloo as well. Ranks are forked
from a process that does nothing else than import torch_npu, once, and the test files that it is
asked for: autograd's device threads do not survive a fork, so it cannot be the one of the tests.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import npu_stubs

RANK_SECONDS = 60.0


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


class _Job(NamedTuple):
    file: str
    function: str
    world_size: int
    args: tuple[Any, ...]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` of a test file on every rank and return the results by rank.

    Raises:
        RankFailedError: A rank raised an exception, died, or hung.
    """
    file = inspect.getsourcefile(function)
    assert file is not None
    server = _server()
    server.send_bytes(pickle.dumps(_Job(file, function.__qualname__, world_size, args)._asdict()))
    results, failure = pickle.loads(server.recv_bytes())
    if failure is not None:
        raise RankFailedError(failure)
    return results


def communicator(hcom: str) -> Any:
    """Return the process group whose communicator has this name on this rank.

    Raises:
        LookupError: There is none.
    """
    import torch
    from torch.distributed import distributed_c10d as c10d

    groups = list(c10d._world.pg_map)
    names = [g._get_backend(torch.device("npu")).get_hccl_comm_name(g.rank()) for g in groups]
    if hcom not in names:
        raise LookupError(f"no communicator {hcom!r}; there are {', '.join(names)}")
    return groups[names.index(hcom)]


@cache
def _server() -> Connection:
    """Start the process that ranks are forked from; it ends with this one."""
    here, there = Pipe()
    command = [sys.executable, __file__, str(there.fileno())]
    process = subprocess.Popen(command, pass_fds=[there.fileno()])
    there.close()
    here.send_bytes(pickle.dumps(sys.path))

    def stop() -> None:
        here.close()
        process.wait()

    atexit.register(stop)
    return here


def _serve(connection: Connection) -> None:
    sys.path[:] = pickle.loads(connection.recv_bytes())
    npu_stubs.load()
    while True:
        try:
            job = _Job(**pickle.loads(connection.recv_bytes()))
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = _fork_ranks(job), None
        except RankFailedError as error:
            answer = None, str(error)
        except Exception:
            answer = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


def _fork_ranks(job: _Job) -> list[Any]:
    function = getattr(_import_file(job.file), job.function)
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, job, rank, Path(folder)))
            for rank in range(job.world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()


@cache
def _import_file(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _collect(ranks: Sequence[Any], folder: Path) -> list[Any]:
    """Wait for the results; raise at the first failure, as others may wait for that rank."""
    deadline = time.monotonic() + RANK_SECONDS
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        for rank, process in enumerate(ranks):
            alive = process.is_alive()
            if rank not in results and (file := folder / str(rank)).is_file():
                passed, results[rank] = pickle.loads(file.read_bytes())
                if not passed:
                    raise RankFailedError(f"rank {rank}: {results[rank]}")
            if rank not in results and not alive:
                raise RankFailedError(f"rank {rank}: died with exit code {process.exitcode}")
        if time.monotonic() > deadline:
            raise RankFailedError(f"only the ranks {sorted(results)} came to their end")
        time.sleep(0.01)
    return [results[rank] for rank in range(len(ranks))]


def _rank(function: Callable[..., Any], job: _Job, rank: int, folder: Path) -> None:
    import torch
    from npu_simulator import simulator

    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "cpu:gloo,npu:hccl",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=RANK_SECONDS),
        )
        with simulator():
            message = pickle.dumps((True, function(*job.args)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    draft = folder / f"draft{rank}"
    draft.write_bytes(message)
    draft.rename(folder / str(rank))
    time.sleep(RANK_SECONDS)  # other ranks may still talk to this one; the parent ends it


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
