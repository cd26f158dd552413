"""Where the ranks of a job meet: the store of rank 0, at the address that the launcher gives.

torch waits there without saying for whom, and ends with a page of C++ frames. Here a rank first
waits until rank 0 listens, and what goes wrong is one line.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ml_parallel.environment import master_port, rank_and_world_size

_RETRY_S = 0.2


def join(backend: str, *, timeout: timedelta, patience: timedelta) -> None:
    """Join the process group of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        backend: Of the group.
        timeout: How long its collectives wait for a missing rank.
        patience: How long to wait for the other ranks now.

    Raises:
        ConnectionError: Rank 0 cannot be reached, or not all ranks came.
        ValueError: A variable is missing, or makes no sense.
    """
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not _value(name)]
    if missing:
        raise ValueError(
            f"RANK is set, so this process is one of several, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: set all that torchrun sets, or none"
        )
    rank, _ = rank_and_world_size()
    address = _value("MASTER_ADDR"), master_port()
    place = f"{address[0]} port {address[1]}"
    if rank != 0:
        _await_rank_0(address, place, patience)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=patience))
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"the ranks did not meet at {place}: {reason}") from error


def _value(name: str) -> str:
    return os.environ.get(name, "")


def _await_rank_0(address: tuple[str, int], place: str, patience: timedelta) -> None:
    end = time.monotonic() + patience.total_seconds()
    while True:
        try:
            socket.create_connection(address, timeout=max(0.1, end - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() >= end:
                minutes = patience.total_seconds() / 60
                raise ConnectionError(
                    f"--master-addr {place}: rank 0 did not answer within {minutes:g} minutes "
                    f"({error.strerror or error}); is the job started on node 0, and is that its "
                    f"address?"
                ) from error
            time.sleep(_RETRY_S)
        else:
            return
