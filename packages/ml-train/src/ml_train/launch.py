"""Start the ranks of a job on this node, and end with them.

`ml-train` starts its own ranks, so a job on one machine needs no launcher: the parent runs the same
command once per rank, with the environment that torch.distributed reads (RANK, WORLD_SIZE,
MASTER_ADDR, ...), as torchrun would. It lives without torch, and whatever ends it ends the ranks:

| what happens | what follows |
|---|---|
| a rank fails | the others may fail by themselves, else are killed; one line says which it was |
| a rank of another node fails | the same: the launchers tell each other (`ml_train.nodes`) |
| SIGINT, SIGTERM, SIGHUP | passed on to the ranks once; they finish the step and save |
| Ctrl-C again | the ranks are killed |
| the parent is killed | the ranks get SIGTERM, and are killed if that does not end them |

Rank 0 has the terminal for itself; lines of the others are shown as `[rank 1] ...`.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ml_models.flags import UsageError
from ml_parallel.environment import rank_and_world_size
from ml_train.nodes import Nodes
from ml_train.ranks import Rank, Signals, guarded, start, stop
from ml_train.supervise import supervise

_PORT_OF_SEVERAL_NODES = 6000
_FREE_PORTS = range(20000, 30000)
"""Where a free port is looked for. Seconds pass until rank 0 listens on it: a port that the system
gives out by itself, from 32768 on, may have gone to a connection of another job by then."""
_LONGEST_WAIT = 7 * 24 * 60


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Launch."""

    nproc_per_node: int = 1
    """Ranks to start on this node, one per device."""
    nnodes: int = 1
    """Nodes of the job; the command is started once on each."""
    node_rank: int = 0
    """Which of them this one is, from 0."""
    master_addr: str | None = None
    """Address of node 0, as the other nodes reach it; needed with several nodes."""
    master_port: int | None = None
    """Port on which node 0 listens; default 6000, with one node any free one. With several nodes
    the launchers use the next one."""
    rendezvous_timeout_minutes: float = 10.0
    """How long the ranks wait at the start until all have come."""

    def __post_init__(self) -> None:
        if self.nproc_per_node < 1:
            raise ValueError(f"--nproc-per-node {self.nproc_per_node}: must be at least 1")
        if self.nnodes < 1:
            raise ValueError(f"--nnodes {self.nnodes}: must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"--node-rank {self.node_rank}: must be from 0 to {self.nnodes - 1} "
                f"with --nnodes {self.nnodes}"
            )
        if self.nnodes > 1 and self.master_addr is None:
            raise ValueError(f"--nnodes {self.nnodes}: needs --master-addr, the address of node 0")
        if self.master_port is not None and not 0 < self.master_port < 65536:
            raise ValueError(f"--master-port {self.master_port}: must be from 1 to 65535")
        if self.nnodes > 1 and self.master_port == 65535:
            raise ValueError("--master-port 65535: must be at most 65534 with several nodes")
        if not 0 < self.rendezvous_timeout_minutes <= _LONGEST_WAIT:
            raise ValueError(
                f"--rendezvous-timeout-minutes {self.rendezvous_timeout_minutes}: must be more "
                f"than 0, and at most {_LONGEST_WAIT}"
            )

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nnodes * self.nproc_per_node


def under_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is a rank already, started by `launch` or by torchrun."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def launched_world_size(config: LaunchConfig, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks the launcher of this one has started.

    Raises:
        UsageError: The environment makes no sense, or the flags ask for another number.
    """
    try:
        _, world_size = rank_and_world_size(environment)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.world_size not in (1, world_size):  # 1 is what no flag asks for
        raise UsageError(
            f"--nproc-per-node {config.nproc_per_node} with --nnodes {config.nnodes}: are "
            f"{config.world_size} ranks, but by WORLD_SIZE={world_size} in the environment a "
            f"launcher has started {world_size}, this one among them; unset RANK and WORLD_SIZE, "
            "or leave the flags out"
        )
    return world_size


def launch(
    command: Sequence[str],
    config: LaunchConfig,
    *,
    environment: Mapping[str, str] = os.environ,
    grace_s: float = 2.0,
    orphan_grace_s: float = 30.0,
) -> int:
    """Run `command` once per rank of this node and return the exit code of the job.

    Call it from the main thread.

    Args:
        command: What a rank runs, program first.
        config: How many ranks, and where they meet.
        environment: What the ranks inherit.
        grace_s: Seconds that the other ranks get to fail by themselves after one has failed.
        orphan_grace_s: Seconds that ranks get to save and end after this process was killed.

    Returns:
        0 if every rank returned 0, else the exit code of the rank that failed first, 128 + N if
        signal N killed it.

    Raises:
        UsageError: The port is taken, or the address of node 0 unknown.
    """
    port = _port(config)
    with Signals() as signals, _nodes(config, port) as nodes, guarded(orphan_grace_s) as watch:
        ranks: list[Rank] = []
        try:
            for local_rank in range(config.nproc_per_node):
                variables = _rank_environment(config, local_rank, port, environment)
                ranks.append(start(command, variables))
                watch(ranks[-1])
            return supervise(ranks, signals, grace_s, nodes, node_rank=config.node_rank)
        finally:
            stop(ranks)


def _rank_environment(
    config: LaunchConfig, local_rank: int, port: int, environment: Mapping[str, str]
) -> dict[str, str]:
    threads = max(1, _cores() // config.nproc_per_node)
    return {
        "OMP_NUM_THREADS": str(threads),  # ranks that all use every core are several times slower
        **environment,
        "RANK": str(config.node_rank * config.nproc_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_WORLD_SIZE": str(config.nproc_per_node),
        "GROUP_RANK": str(config.node_rank),
        "MASTER_ADDR": config.master_addr or "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _port(config: LaunchConfig) -> int:
    """Return the port where the ranks meet, which on node 0 nobody else may be using."""
    if config.nnodes == 1 and config.master_port is None:
        return _free_port()
    port = config.master_port or _PORT_OF_SEVERAL_NODES
    if config.node_rank == 0:
        _listen(port).close()
    return port


def _free_port() -> int:
    # Of its own: two jobs whose seeds are the same look in different places.
    for port in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        with suppress(UsageError):
            _listen(port).close()
            return port
    raise UsageError(
        f"--master-port is not given, and no port from {_FREE_PORTS.start} to "
        f"{_FREE_PORTS.stop - 1} can be listened on; give one that can"
    )


def _nodes(config: LaunchConfig, port: int) -> Nodes:
    """Return what connects this launcher to the others."""
    if config.nnodes == 1:
        return Nodes()
    assert config.master_addr is not None
    try:
        found = socket.getaddrinfo(config.master_addr, port + 1, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"--master-addr {config.master_addr}: is no address known here ({error.strerror}); "
            f"give the one of node 0"
        ) from error
    if config.node_rank == 0:
        return Nodes(server=_listen(port + 1, beside=port))
    family, _, _, _, address = found[0]
    return Nodes(address=(family, address))


def _listen(port: int, *, beside: int | None = None) -> socket.socket:
    """Listen on every address, as torch's store will."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        which = f"--master-port {beside or port}: "
        which += f"port {port}, which the launchers use, " if beside else ""
        raise UsageError(
            f"{which}cannot be listened on ({error.strerror}); end the program that does (another "
            f"ml-train?) or choose another port"
        ) from error
