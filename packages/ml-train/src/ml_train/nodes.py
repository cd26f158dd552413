"""What the launchers of a job on several nodes tell each other: which rank failed.

A rank whose peer on another node dies sees a closed connection, or on some devices nothing at all.
Only the launcher there knows why. So the launcher of node 0 listens, those of the other nodes
connect to it, and whatever fails first anywhere ends the job everywhere, with its name. A line is
three numbers: node, rank, and how the rank ended.

Without a connection, as behind a firewall, the job runs all the same.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_RETRY_S = 0.5
_LONGEST = 256  # bytes of what is not a line yet: whoever sends more is no launcher


@dataclass(frozen=True)
class Failure:
    """A rank that failed."""

    node: int
    rank: int
    code: int
    """How it ended, as `Popen.returncode`."""

    def encode(self) -> bytes:
        """Return the line that says it."""
        return f"{self.node} {self.rank} {self.code}\n".encode()

    @staticmethod
    def decode(line: bytes) -> Failure | None:
        """Return what a line says; None if it is no such line."""
        try:
            node, rank, code = map(int, line.split())
        except ValueError:
            return None
        return Failure(node, rank, code)


@dataclass(eq=False)
class _Peer:
    socket: socket.socket
    text: bytes = b""
    told: bool = False

    def read(self) -> bool:
        """Take what has arrived; return whether the connection still stands."""
        try:
            data = self.socket.recv(_LONGEST)
        except BlockingIOError:  # nothing yet, or still connecting
            return True
        except OSError:
            return False
        self.text += data
        return bool(data) and len(self.text) <= _LONGEST


@dataclass(kw_only=True, eq=False)
class Nodes:
    """This launcher's connections to the others, until the end of the context.

    Nothing here blocks; call `poll` often.
    """

    server: socket.socket | None = None
    """Where node 0 listens."""
    address: tuple[socket.AddressFamily, tuple[Any, ...]] | None = None
    """Where other nodes reach node 0."""
    failure: Failure | None = None
    """The first one heard of or told."""
    _peers: list[_Peer] = field(default_factory=list)
    _next_try: float = 0.0

    def __enter__(self) -> Nodes:
        if self.server is not None:
            self.server.setblocking(False)
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.socket.close()
        if self.server is not None:
            self.server.close()

    def tell(self, failure: Failure) -> None:
        """Tell the other launchers, unless they have told of a failure before."""
        self.failure = self.failure or failure
        self.poll()

    def poll(self) -> Failure | None:
        """Connect, listen and pass on; return the first failure of the job that is known."""
        self._meet()
        for peer in list(self._peers):
            stands = peer.read()
            self._hear(peer)
            if not stands or not self._pass_on(peer):
                peer.socket.close()
                self._peers.remove(peer)
        return self.failure

    def _meet(self) -> None:
        if self.server is not None:
            with suppress(OSError):  # BlockingIOError: nobody new
                while True:
                    self._add(self.server.accept()[0])
        elif self.address is not None and not self._peers and time.monotonic() > self._next_try:
            self._next_try = time.monotonic() + _RETRY_S
            family, address = self.address
            peer = self._add(socket.socket(family, socket.SOCK_STREAM))
            with suppress(BlockingIOError):
                peer.socket.connect_ex(address)

    def _add(self, connection: socket.socket) -> _Peer:
        connection.setblocking(False)
        self._peers.append(_Peer(connection))
        return self._peers[-1]

    def _hear(self, peer: _Peer) -> None:
        *lines, peer.text = peer.text.split(b"\n")
        heard: Sequence[Failure | None] = [Failure.decode(line) for line in lines]
        self.failure = self.failure or next((found for found in heard if found), None)

    def _pass_on(self, peer: _Peer) -> bool:
        """Send the failure; return whether the connection still stands."""
        if self.failure is None or peer.told:
            return True
        try:
            peer.socket.sendall(self.failure.encode())  # so short that it is sent whole or not
        except BlockingIOError:
            return True
        except OSError:
            return False
        peer.told = True
        return True
