"""When one rank fails, all end, and one line names it and the reason.

Every rank keeps a socket open to rank 0. A rank that fails reports its reason there; the socket of
a process that was killed closes at once, without a report. Rank 0 prints one line and tells all
others to end. So nobody waits in a collective call for a rank that is gone. TCP keep-alive detects
a machine that lost power.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch as th
import torch.distributed as dist

from guided_diffusion.runtime.errors import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    UserError,
    as_user_error,
)
from guided_diffusion.runtime.storage import run_lock

EXIT_FAILED = 1

# Seconds to collect further reports after the first: what one rank reports, others may report a
# moment later, such as the same error in a file that all read, or a collective call that timed out
# on all ranks but the one that hangs.
COLLECT_S = 1.0
# Seconds to wait for the report of the rank that failed first, of whose death this rank's error may
# be only the consequence.
ECHO_S = 3.0
# Seconds that the main thread may still run after the decision to end, to finish writing a file,
# say.
GRACE_S = 5.0
CONNECT_S = 60.0

GREETING_BYTES = 64
DIED = "exited without reporting an error (killed, out of memory, or its node lost?)"


@dataclass(frozen=True)
class Failure:
    """Why a rank ends: one line of text, and the exit code."""

    text: str
    code: int
    timed_out: bool = False  # in a collective call, waiting for another rank


def describe(error: BaseException) -> Failure:
    """The one line and the exit code of an error."""
    known = as_user_error(error)
    text = " ".join(str(known or error).split())
    if known is not None:
        return Failure(text, EXIT_USER_ERROR)
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted", EXIT_INTERRUPTED)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        return Failure(f"called sys.exit({error.code!r})", code)
    return Failure(f"{type(error).__name__}: {text}"[:500], EXIT_FAILED)


def leave(code: int) -> None:
    """End this process immediately: no exit handler may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    run_lock.release_all()
    os._exit(code)


def _print_error(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def _location(error: BaseException) -> str:
    """Where an error was raised, as far as possible outside torch."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(os.path.dirname(th.__file__))
    ]
    return f" ({frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno})" if frames else ""


class _Connection:
    """A socket that carries messages, one JSON object per line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._incomplete = b""
        # A worker process of a data loader must not keep the socket of a killed rank open.
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=connection.close)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; does nothing if the other side is gone."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for messages; None once the other side is gone."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._incomplete = (self._incomplete + data).split(b"\n")
        return [json.loads(line) for line in lines]


class _Hub(threading.Thread):
    """On rank 0: listens to all ranks (itself too), decides what failed, and ends all."""

    def __init__(self, connections: Mapping[int, _Connection], hosts: Sequence[str]) -> None:
        super().__init__(name="failure-hub", daemon=True)
        self.hosts = hosts
        self.connections = connections
        self.running = set(connections)  # ranks that have not finished
        self.failures: dict[int, Failure] = {}  # in the order of their arrival
        self.decide_at: float | None = None
        self.all_left = threading.Event()
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        for rank, connection in self.connections.items():
            self._selector.register(connection.socket, selectors.EVENT_READ, rank)
        while self.running:
            wait = None if self.decide_at is None else self.decide_at - time.monotonic()
            if wait is not None and wait <= 0:
                self._end_all()
                return
            for rank, messages in self._receive(wait):
                if messages is None and rank in self.running:
                    self._add(rank, Failure(DIED, EXIT_FAILED))
                for message in messages or ():
                    if "bye" in message:
                        self.running.discard(rank)
                    else:
                        self._add(rank, Failure(**message))
            if not self.running - {0}:
                self.all_left.set()

    def _receive(self, wait: float | None) -> Iterator[tuple[int, list[dict[str, Any]] | None]]:
        for key, _ in self._selector.select(wait):
            messages = self.connections[key.data].receive()
            if messages is None:
                self._selector.unregister(key.fileobj)
            yield key.data, messages

    def _add(self, rank: int, failure: Failure) -> None:
        """Record a rank's first failure, and set when to decide."""
        if rank in self.failures:
            return
        self.failures[rank] = failure
        # A death is unambiguous, and the launcher may be about to kill this rank because of it.
        if failure.text == DIED or len(self.failures) == len(self.connections):
            self.decide_at = time.monotonic()
        elif self.decide_at is None:
            self.decide_at = time.monotonic() + COLLECT_S

    def _summary(self) -> str:
        """The line that names the cause."""
        rank, first = next(iter(self.failures.items()))
        silent = sorted(self.running - set(self.failures))
        if first.timed_out and silent:
            who = ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in silent)
            return f"timed out waiting for {who}, which neither answered nor failed: {first.text}"
        if len(self.failures) == len(self.connections) and all(
            failure.text == first.text for failure in self.failures.values()
        ):
            return first.text  # common to all ranks
        return f"rank {rank} ({self.hosts[rank]}): {first.text}"

    def _end_all(self) -> None:
        _print_error(self._summary())
        end = {"end": True, "code": next(iter(self.failures.values())).code}
        for rank in self.connections:
            if rank:
                self.connections[rank].send(end)
        # Rank 0 ends last, once the others have received it.
        deadline = time.monotonic() + COLLECT_S
        while self.running - {0} and time.monotonic() < deadline:
            for rank, messages in self._receive(0.1):
                if messages is None or any("bye" in message for message in messages):
                    self.running.discard(rank)
        self.connections[0].send(end)


class Watch:
    """This rank's connection to rank 0. Ends the process when rank 0 says so or is gone."""

    def __init__(
        self, store: dist.Store, rank: int, hosts: Sequence[str], address: str, one_node: bool
    ) -> None:
        """Connect all ranks to rank 0. Collective.

        Args:
            store: where rank 0 publishes its port.
            rank: this rank.
            hosts: the host name of every rank.
            address: where other machines reach rank 0.
            one_node: whether all ranks run on one machine.
        """
        self.rank = rank
        self.hosts = hosts
        self._exit_code: int | None = None  # None until it is decided that all end
        self._decided = threading.Event()
        self._hub: _Hub | None = None
        self._closed = False
        if rank == 0:
            ours, hubs = socket.socketpair()
            self._connection = _Connection(ours)
            others = _accept_ranks(store, len(hosts), one_node)
            self._hub = _Hub({0: _Connection(hubs), **others}, hosts)
            self._hub.start()
        else:
            self._connection = self._connect(store, "127.0.0.1" if one_node else address)
        threading.Thread(target=self._listen, name="failure-watch", daemon=True).start()

    def report(self, error: BaseException, timeout_s: float) -> int:
        """Report an error of this rank, unless another rank's failure caused it.

        :param timeout_s: how long collective calls wait for other ranks, seconds.
        :return: the exit code that all ranks agree on.
        """
        failure = describe(error)
        if isinstance(error, RuntimeError) and not isinstance(error, th.OutOfMemoryError):
            # A collective call breaks when another rank dies, and that rank is to be named.
            self._decided.wait(ECHO_S)
            if self._exit_code is not None:
                return self._exit_code
            if "timed out" in failure.text.lower():
                text = f"no answer within {timeout_s:g} s{_location(error)}"
                return self.failed(Failure(text, failure.code, timed_out=True))
        if as_user_error(error) is None and not isinstance(error, KeyboardInterrupt | SystemExit):
            traceback.print_exception(error)
        return self.failed(failure)

    def failed(self, failure: Failure) -> int:
        """Report this rank's failure and wait for rank 0's decision; returns the exit code."""
        self._connection.send(asdict(failure))
        self._decided.wait(ECHO_S + COLLECT_S)
        if self._exit_code is None:
            _print_error(f"rank {self.rank} ({self.hosts[self.rank]}): {failure.text}")
            return failure.code
        return self._exit_code

    def bye(self, wait_s: float) -> None:
        """This rank has finished. Rank 0 waits for the others, up to `wait_s` seconds: they need
        its store until they have finished."""
        if self._closed:
            return
        if self._hub is not None:
            self._hub.all_left.wait(wait_s)
            for rank, connection in self._hub.connections.items():
                if rank:
                    connection.send({"bye": True})
        self._closed = True
        self._connection.send({"bye": True})

    def _listen(self) -> None:
        while True:
            messages = self._connection.receive()
            if messages is None:
                if not self._closed:
                    _print_error(f"rank 0 ({self.hosts[0]}): {DIED}")
                    self._end(EXIT_FAILED)
                return
            for message in messages:
                if "bye" in message:
                    self._closed = True
                else:
                    self._end(message["code"])

    def _end(self, code: int) -> None:
        self._connection.send({"bye": True})
        self._exit_code = code
        self._decided.set()
        time.sleep(GRACE_S)
        leave(code)

    def _connect(self, store: dist.Store, address: str) -> _Connection:
        port, token = store.get("watch").decode().split()
        try:
            connection = socket.create_connection((address, int(port)), timeout=CONNECT_S)
        except OSError as error:
            raise UserError(
                f"rank {self.rank} ({self.hosts[self.rank]}) cannot reach rank 0 at "
                f"{address}:{port} ({error}): is there a firewall between the nodes?"
            ) from None
        connection.sendall(f"{token} {self.rank}".encode().ljust(GREETING_BYTES))
        _make_lasting(connection)
        return _Connection(connection)


def _accept_ranks(store: dist.Store, num_ranks: int, one_node: bool) -> dict[int, _Connection]:
    """On rank 0: a connection to every other rank, each of which proves that it belongs here by a
    token from the store."""
    token = secrets.token_hex(16)
    connections: dict[int, _Connection] = {}
    with socket.create_server(("127.0.0.1" if one_node else "", 0), backlog=num_ranks) as server:
        port = server.getsockname()[1]
        server.settimeout(CONNECT_S)
        store.set("watch", f"{port} {token}")
        while len(connections) < num_ranks - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, num_ranks)) - set(connections))
                raise UserError(
                    f"ranks {missing} cannot reach rank 0 at port {port}: is there a firewall "
                    "between the nodes?"
                ) from None
            greeting = b""
            with contextlib.suppress(OSError):  # a stranger may send nothing
                connection.settimeout(CONNECT_S / 10)
                greeting = _receive_all(connection, GREETING_BYTES)
            received_token, _, rank = greeting.partition(b" ")
            if secrets.compare_digest(received_token, token.encode()):
                _make_lasting(connection)
                connections[int(rank)] = _Connection(connection)
            else:
                connection.close()
    return connections


def _receive_all(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the other side closes."""
    received = b""
    while len(received) < count and (more := connection.recv(count - len(received))):
        received += more
    return received


def _make_lasting(connection: socket.socket) -> None:
    """No timeout; but let the kernel notice within about two minutes that the other machine is
    gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
