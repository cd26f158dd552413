"""Wait for the ranks of a node, end them together, and say which one ended the job."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence

from ml_train.nodes import Failure, Nodes
from ml_train.peers import LOST
from ml_train.ranks import Rank, Signals, exit_code, how_ended

_POLL_S = 0.05


def supervise(
    ranks: Sequence[Rank],
    signals: Signals,
    grace_s: float,
    nodes: Nodes | None = None,
    *,
    node_rank: int = 0,
) -> int:
    """Wait until every rank has ended, and return the exit code of the job.

    No rank outlives the failure of another by more than `grace_s`: it may be waiting for it.

    Args:
        ranks: Those of this node, started.
        signals: What comes for the job.
        grace_s: Less than `peers.PAUSE_S`, the time for which a rank left alone is silent.
        nodes: The launchers of other nodes.
        node_rank: This node.
    """
    job = _Job(ranks, signals, grace_s, nodes or Nodes(), node_rank)
    job.watch()
    return job.conclude()


class _Job:
    def __init__(
        self, ranks: Sequence[Rank], signals: Signals, grace_s: float, nodes: Nodes, node: int
    ) -> None:
        self.ranks, self.signals, self.grace_s = ranks, signals, grace_s
        self.nodes, self.node = nodes, node
        self.failed: Rank | None = None
        self.elsewhere: Failure | None = None
        self.killed: Sequence[Rank] = ()
        self.forwarded = False
        self.deadline = float("inf")

    @property
    def cause_known(self) -> bool:
        """Whether a rank failed of itself, rather than for losing another one."""
        here = self.failed is not None and self.failed.code != LOST
        return here or self.elsewhere is not None

    # While ranks run

    def watch(self) -> None:
        """Wait until every rank has ended."""
        while running := [rank for rank in self.ranks if rank.code is None]:
            time.sleep(_POLL_S)
            self._forward(running)
            if not self.killed and (self.signals.kill or time.monotonic() > self.deadline):
                self.killed = running
                for rank in running:
                    rank.kill()
            failures = [rank for rank in running if rank.poll() and rank.code]
            if failures and not self.killed:
                self._note(failures)
            self._listen()

    def _forward(self, running: Sequence[Rank]) -> None:
        if self.signals.first is None or self.forwarded:
            return
        self.forwarded = True
        for rank in running:
            rank.process.send_signal(self.signals.first)

    def _note(self, failures: Sequence[Rank]) -> None:
        """Choose the cause: a signal is one, a lost connection never if there is another."""
        self._end_soon()
        if self.cause_known:
            return
        self.failed = min(failures, key=lambda rank: (rank.code == LOST, rank.exit_code < 128))
        if self.failed.code != LOST:
            assert self.failed.code is not None
            self.nodes.tell(Failure(self.node, self.failed.number, self.failed.code))

    def _listen(self) -> None:
        heard = self.nodes.poll()
        if heard is not None and not self.cause_known:
            self.elsewhere = heard
            self._end_soon()

    def _end_soon(self) -> None:
        self.deadline = min(self.deadline, time.monotonic() + self.grace_s)

    # When all have ended

    def conclude(self) -> int:
        """Say what ended the job, unless it is known, and return its exit code."""
        self._show_messages()
        stopped = sum(rank.code == -signal.SIGKILL for rank in self.killed)
        if self.signals.kill and stopped:
            sys.stderr.write(f"ml-train: interrupted again; killed {_count(stopped)}\n")
            return 128 + signal.SIGINT
        if self.elsewhere is not None:
            cause = self.elsewhere
            name = f"rank {cause.rank} of node {cause.node} {how_ended(cause.code)}"
            sys.stderr.write(f"ml-train: {name}{self._consequence(stopped)}\n")
            return exit_code(cause.code)
        if self.failed is None:
            return 0
        if self._ended_as_asked(self.failed):
            return self._say_stopped()
        if not self.failed.explained:
            sys.stderr.write(f"ml-train: {self.failed}{self._consequence(stopped)}\n")
        return self.failed.exit_code

    def _show_messages(self) -> None:
        """Show what ranks said before they ended, once if they all say the same.

        What rank 0 said is on the terminal already.
        """
        known = {rank.code for rank in self.ranks if not rank.outputs}
        if self.cause_known:
            known.add(LOST)
        shown = set()
        for rank in self.ranks:
            code = rank.code
            if rank in self.killed and self.failed is not None:
                code = self.failed.code  # it was slow to end after the same message
            for output in rank.outputs:
                if code not in known and output.held not in shown:
                    shown.add(output.held)
                    output.release()
            if code == LOST:
                known.add(LOST)

    def _ended_as_asked(self, rank: Rank) -> bool:
        return self.signals.first is not None and rank.exit_code == 128 + self.signals.first

    def _say_stopped(self) -> int:
        """A rank that trains handles the signal, so the one it ended had not begun."""
        if self.ranks[0].code != 0:  # else it has said so
            assert self.signals.first is not None
            name = signal.Signals(self.signals.first).name
            sys.stdout.write(f"stopped by {name} before the first step\n")
        return 0

    def _consequence(self, stopped: int) -> str:
        others = len(self.ranks) - (self.elsewhere is None)
        where = " of this node" if self.elsewhere is not None else ""
        if stopped:
            which = "the other " if stopped == others and not where else ""
            return f"; stopped {which}{_count(stopped)}{where}"
        if others and all(rank.code for rank in self.ranks):
            which = "" if where else "the other "
            return f"; {which}{_count(others)}{where} failed with it"
        return ""


def _count(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"
