"""Several processes that divide independent work: who is there at the start, and how each ended.

Nothing is computed together, so JAX's own service is not started: it would abort every process when one dies or does
not arrive. Its detection of clusters (TPU pods, Slurm, Kubernetes, MPI) says who is who; the rest is one connection
from each process to process 0, which lasts as long as the process.
"""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from rfjax.errors import UserError

Item = TypeVar("Item")
_DONE = "done"
_REPLY_SECONDS = 30.0
"""How much longer than process 0 the others wait, for its word about who is missing."""
_WITHDRAW_SECONDS = 10.0
"""How long a process that cannot take part tries to say so: process 0 may not listen yet, or not any more."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job, seen from one of them."""

    address: str = ""
    """`HOST:PORT` where process 0 listens."""
    count: int = 1
    index: int = 0
    """Number of this process."""

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's part of what is to be done: every `count`-th item."""
        return list(items[self.index :: self.count])


ALONE = Processes()


def detect(timeout: float) -> Processes:
    """Find the processes of a TPU pod slice, a Slurm job or another cluster that JAX knows, or JAX's own variables.

    Raises:
        UserError: there is no such cluster.
    """
    from jax._src.clusters import ClusterEnv  # the public initialize() would also connect, and abort where one lacks

    given = os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, [0], None, int(timeout)
    try:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(*given)
    except Exception as error:  # each cluster's own
        raise UserError(f"--processes auto failed: {' '.join(str(error).split())}") from None
    if address is None or count is None or index is None:
        raise UserError(
            "--processes auto found no cluster, such as a TPU pod slice or Slurm; give HOST:PORT,COUNT,INDEX instead"
        )
    return Processes(address, count, index)


class RollCall:
    """A context that begins when all processes are there and ends, for all of them alike, when all have ended.

    A process that leaves it with an exception reports that; one that dies is noticed by its connection. If one failed,
    all do, so that whatever has started them starts all again.
    """

    def __init__(self, processes: Processes, timeout: float = 300.0, before: Callable[[], None] = lambda: None):
        """Prepare.

        Args:
            processes: who takes part.
            timeout: seconds to wait for all.
            before: what process 0 does when all are there, before any of them begins.
        """
        self.processes = processes
        self._timeout = timeout
        self._before = before
        self._deadline = 0.0
        self._peers: dict[int, socket.socket] = {}
        self._ends: dict[int, str] | None = None
        """How the others ended, on process 0."""

    def __enter__(self) -> "RollCall":
        """Wait for all.

        Raises:
            UserError: some did not arrive, or cannot take part; the message has their numbers.
        """
        self._deadline = time.monotonic() + self._timeout
        if self.processes.index:
            self._connect()
            return self
        try:
            self._gather()
            self._before()
        except BaseException as error:
            self._tell(_reason(error))
            raise
        self._tell("go\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Tell the others how this process ended, and wait for them unless it failed.

        Raises:
            UserError: this process has done its part, but process 0 says that another has failed, or has died.
        """
        try:
            if not self.processes.index and kind is None:
                self.failures()
            word = _DONE if error is None else _reason(error)
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # it may have ended before
                    peer.sendall(word.encode())
                    peer.shutdown(socket.SHUT_WR)
            if self.processes.index and kind is None and (verdict := _read_all(self._peers[0])) != _DONE:
                raise UserError(verdict or "process 0 has died; this one has done its part")
        finally:
            self._close()

    def withdraw(self, reason: str) -> None:
        """Say that this process cannot take part, so that nobody waits for it: to process 0, which tells the others."""
        self._deadline = time.monotonic() + min(self._timeout, _WITHDRAW_SECONDS)
        reason = " ".join(reason.split()) or "its program has failed"
        with contextlib.suppress(UserError, OSError):
            if self.processes.index:
                with self._reach() as peer:
                    peer.sendall(f"{self.processes.index} {self.processes.count} {reason}\n".encode())
            elif self.processes.count > 1:
                self._send_away(f"process 0 cannot take part: {reason}")

    def failures(self) -> dict[int, str]:
        """Wait, on process 0, for the others to end; return what went wrong by the number of the process."""
        if self._ends is None:
            self._ends = {index: _read_all(peer) for index, peer in sorted(self._peers.items())}
        return {index: end or "it died" for index, end in self._ends.items() if end != _DONE}

    def _gather(self) -> None:
        """Let the others connect."""
        if self.processes.count == 1:
            return
        with self._listen() as listener:
            while missing := self._missing():
                try:
                    peer = self._accept(listener)
                except TimeoutError:
                    raise UserError(self._word(missing)) from None
                self._admit(peer)

    def _send_away(self, word: str) -> None:
        """Say something to each of the others that comes in time."""
        with self._listen() as listener:
            for _ in range(1, self.processes.count):
                with self._accept(listener) as peer:
                    peer.settimeout(5)
                    peer.recv(4096)
                    peer.sendall(word.encode())

    def _listen(self) -> socket.socket:
        port = int(self.processes.address.rpartition(":")[2])
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as error:
            raise UserError(f"process 0 cannot listen at port {port}: {error.strerror or error}") from None

    def _accept(self, listener: socket.socket) -> socket.socket:
        """Wait for the next to connect; `TimeoutError` where none does in time."""
        listener.settimeout(max(self._deadline - time.monotonic(), 0.001))
        return listener.accept()[0]

    def _admit(self, peer: socket.socket) -> None:
        peer.settimeout(5)
        try:
            number, total, *reason = peer.recv(4096).decode(errors="replace").split(maxsplit=2)
            index, count = int(number), int(total)
        except (OSError, ValueError):  # a stranger
            peer.close()
            return
        missing = self._missing()
        if count == self.processes.count and index in missing and reason:
            peer.close()
            raise UserError(f"process {index} cannot take part: {reason[0].strip()}")
        if count == self.processes.count and index in missing:
            peer.settimeout(None)
            _notice_lost_hosts(peer)
            if index in self._peers:  # it was started again
                self._peers[index].close()
            self._peers[index] = peer
            return
        with peer, contextlib.suppress(OSError):
            peer.sendall(f"process {index} of {count} is there already, or no part of {self.processes.count}".encode())

    def _missing(self) -> list[int]:
        """Return who has not come yet, or is gone again and may be started again."""
        there = {index for index, peer in self._peers.items() if not _has_ended(peer)}
        return [index for index in range(1, self.processes.count) if index not in there]

    def _word(self, missing: list[int]) -> str:
        names = ", ".join(map(str, missing))
        return (
            f"{len(missing)} of {self.processes.count} processes did not arrive at {self.processes.address} within "
            f"{self._timeout:g} s: {names}; start them, or ask for fewer"
        )

    def _tell(self, word: str) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # its end is noticed later
                peer.sendall(word.encode())
                if word != "go\n":
                    peer.close()

    def _connect(self) -> None:
        """Report to process 0 and wait for its word."""
        peer = self._reach()
        self._peers[0] = peer
        try:
            peer.sendall(f"{self.processes.index} {self.processes.count}\n".encode())
            peer.settimeout(max(self._deadline - time.monotonic(), 0) + _REPLY_SECONDS)
            word = _read_line(peer)
            peer.settimeout(None)
            _notice_lost_hosts(peer)
        except OSError:
            word = ""
        if word != "go\n":
            self._close()
            raise UserError(word or f"process 0 at {self.processes.address} ended before all had arrived")

    def _reach(self) -> socket.socket:
        host, _, port = self.processes.address.rpartition(":")
        while True:
            try:
                return socket.create_connection((host.strip("[]"), int(port)), timeout=5)
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise UserError(
                        f"process 0 did not arrive at {self.processes.address} within {self._timeout:g} s "
                        f"({error.strerror or error}); start it, or check the address"
                    ) from None
            time.sleep(0.2)

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


def _notice_lost_hosts(peer: socket.socket) -> None:
    """End the connection two minutes after the other host has lost its power; by default that takes two hours."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):  # not on every system
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _reason(error: BaseException) -> str:
    """Say in a line why a process ends."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"interrupted{text}" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__} {text}".strip()


def _read_line(peer: socket.socket) -> str:
    """Read up to the end of a line or of what is said: what comes after it is for later."""
    line = b""
    while not line.endswith(b"\n") and (byte := peer.recv(1)):
        line += byte
    return line.decode(errors="replace")


def _has_ended(peer: socket.socket) -> bool:
    """Whether the process at the other end is gone; one that is there has nothing to say yet."""
    try:
        return not peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _read_all(peer: socket.socket) -> str:
    parts: list[bytes] = []
    with contextlib.suppress(OSError):
        while part := peer.recv(4096):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")
