"""Who of the hosts still lives: heartbeats and the news of the first failure, over one small connection a host.

Every host holds a connection to the chief, and says each second which phase it is in. The chief decides who failed
first: the first to say so, or whose connection breaks (the kernel closes those of a process that is killed), or who is
silent for too long (stopped, or cut off). It tells the others. A host that learns of a failure raises it from its next
call of the coordinator; one that is too busy to notice is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tpuspec.errors import HostFailureError
from tpuspec.spec.phase import current_phase

GRACE_SECONDS = 10.0
CLOSING_SECONDS = 15.0
_LONGEST_LINE = 1 << 16
_SILENCE_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The first failure of a run: of which host, in which phase, and what it was."""

    host: int
    name: str
    phase: str
    error: str

    def describe(self, num_hosts: int) -> str:
        """Returns the failure in one line."""
        return f"host {self.host} of {num_hosts} ({self.name}) failed in {self.phase}: {self.error}"


@dataclass(slots=True)
class _Peer:
    """The other end of a connection; `host` is -1 until it has said who it is."""

    connection: socket.socket
    last_seconds: float
    host: int = -1
    name: str = "?"
    phase: str = "start"
    received: bytes = b""
    has_left: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Health:
    """This host's end of the connections; its thread runs until `close`.

    Args:
      host_index: this host.
      num_hosts: all hosts.
      heartbeat_seconds: silence after which a host has failed.
      listener: on the chief, a listening socket.
      chief: on the others, the connection to the chief.
      token: what a host says to be let in.
    """

    def __init__(self, *, host_index: int, num_hosts: int, heartbeat_seconds: float, token: str,
                 listener: socket.socket | None = None, chief: socket.socket | None = None) -> None:
        own_end = chief or listener
        assert own_end is not None, "the chief listens, the others are connected to it"
        self.own_address: str = own_end.getsockname()[0]
        self.failure: Failure | None = None
        self.left: set[int] = set()
        self._host, self._num_hosts, self._token = host_index, num_hosts, token
        self._silence_seconds = heartbeat_seconds * _SILENCE_SHARE
        self._tick_seconds = min(1.0, heartbeat_seconds / 8)
        self._name = f"{socket.gethostname()}, pid {os.getpid()}"
        self._failed = threading.Event()
        self._closed = threading.Event()
        self._noticed = False
        self._lock = threading.Lock()
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        if chief is not None:
            peer = self._add(chief, host=0)
            self._send(peer, {"hello": host_index, "name": self._name, "token": token})
        self._thread = threading.Thread(target=self._run, name="tpuspec-health", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=self._forget)

    # Called by the loop's thread.

    def check(self) -> None:
        """Raises the failure, if one is known.

        Raises:
          HostFailureError: another host failed.
        """
        if self.failure is not None:
            raise self.error()

    def error(self) -> HostFailureError:
        """Returns the error that says who failed; this process ends by it, and is not ended by force."""
        assert self.failure is not None
        self._noticed = True
        return HostFailureError(self.failure.describe(self._num_hosts))

    def explain(self, error: Exception, what: str) -> HostFailureError:
        """Returns why a collective failed: the failure that is known, or will be within the silence that is allowed."""
        self._failed.wait(self._silence_seconds + 2 * self._tick_seconds if not self.left else 2.0)
        if self.failure is not None:
            return self.error()
        self._noticed = True
        gone = f"host {min(self.left)} has ended its program, and this one went on to {what}" if self.left else what
        return HostFailureError(f"the hosts cannot reach one another: {gone}: {str(error).splitlines()[0]}")

    def report(self, phase: str, error: str) -> None:
        """Tells the others that this host fails; nothing, if another failed before."""
        if self.failure is not None:
            return
        self._noticed = True
        self._set_failure(Failure(host=self._host, name=self._name, phase=phase, error=error))

    def close(self) -> None:
        """Says goodbye, and ends the thread."""
        if self._closed.is_set():
            return
        self._closed.set()
        for peer in list(self._peers):
            self._send(peer, {"bye": self._host})
        self._thread.join(5.0)
        self._close_sockets()

    @property
    def has_failed(self) -> bool:
        """Whether a failure is known."""
        return self.failure is not None

    def _forget(self) -> None:
        # A forked child (a DataLoader's worker) would keep the connections of a parent that is killed.
        self._closed.set()
        self._close_sockets()

    def _close_sockets(self) -> None:
        for end in [*(peer.connection for peer in self._peers), *([self._listener] if self._listener else [])]:
            with contextlib.suppress(OSError):
                end.close()

    # Called by its own thread.

    def _run(self) -> None:
        next_beat, failed_at = 0.0, None
        while not self._closed.is_set():
            for key, _ in self._selector.select(self._tick_seconds / 4):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._tick_seconds
                for peer in list(self._peers):
                    self._send(peer, {"beat": current_phase()})
                self._look_for_silence(now)
            if self.failure is not None:
                failed_at = failed_at or now
                # One that has noticed may wait for devices all the same, and those for a process that is gone.
                grace = CLOSING_SECONDS if self._noticed else GRACE_SECONDS
                if now - failed_at > grace and not (self._noticed and self.failure.host == self._host):
                    self._end_process()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            self._add(connection)

    def _add(self, connection: socket.socket, host: int = -1) -> _Peer:
        connection.settimeout(5.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = _Peer(connection, time.monotonic(), host=host)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _drop(self, peer: _Peer) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        with contextlib.suppress(ValueError):
            self._peers.remove(peer)
        with contextlib.suppress(OSError):
            peer.connection.close()

    def _send(self, peer: _Peer, message: dict[str, Any]) -> None:
        with peer.lock, contextlib.suppress(OSError):  # a broken connection shows when it is read
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(_LONGEST_LINE)
        except OSError:
            data = b""
        if not data or len(peer.received) > _LONGEST_LINE:
            self._drop(peer)
            if not peer.has_left and peer.host >= 0:
                self._lost(peer, "it ended without a word (killed, or its machine went down)")
            return
        peer.last_seconds = time.monotonic()
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                self._take(peer, message)
            except (ValueError, TypeError, KeyError):
                self._drop(peer)
                return

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "hello" in message:
            if message["token"] != self._token:
                raise ValueError("a stranger")
            peer.host, peer.name = int(message["hello"]), str(message["name"])
            self._send(peer, {"chief": self._name})
            if self.failure is not None:
                self._send(peer, {"failed": asdict(self.failure)})
        elif peer.host < 0:
            raise ValueError("no hello")
        elif "chief" in message:
            peer.name = str(message["chief"])
        elif "beat" in message:
            peer.phase = str(message["beat"])
        elif "failed" in message:
            self._set_failure(Failure(**message["failed"]))
        elif "bye" in message or "left" in message:
            host = int(message["bye"] if "bye" in message else message["left"])
            peer.has_left = peer.has_left or "bye" in message
            self.left.add(host)
            if self._host == 0:
                for other in list(self._peers):
                    if other is not peer:
                        self._send(other, {"left": host})

    def _look_for_silence(self, now: float) -> None:
        for peer in list(self._peers):
            if now - peer.last_seconds > self._silence_seconds and not peer.has_left:
                self._drop(peer)
                if peer.host >= 0:
                    self._lost(peer, f"it has been silent for {now - peer.last_seconds:.1f} s (stopped, hung, or cut "
                                     "off from the network)")

    def _lost(self, peer: _Peer, how: str) -> None:
        self._set_failure(Failure(host=peer.host, name=peer.name, phase=peer.phase, error=how))

    def _set_failure(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        for peer in list(self._peers):
            if self._host == 0 or failure.host == self._host:
                self._send(peer, {"failed": asdict(failure)})
        self._failed.set()

    def _end_process(self) -> None:
        assert self.failure is not None
        # A thread hangs in something that cannot be interrupted.
        os.write(sys.stderr.fileno(), f"error: {self.failure.describe(self._num_hosts)}\n".encode())
        os._exit(1)
