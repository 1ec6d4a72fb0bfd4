"""One line that names the rank that failed, and the end of all ranks with it.

Every rank keeps a socket open to rank 0. A rank that fails says so there, with its reason; the
socket of a process that was killed closes without a word, at once. Rank 0 prints one line and tells
all others to end. So nobody waits in a collective call for a rank that is gone, and a machine that
lost its power is noticed by TCP's keep-alive.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from guided_diffusion.runtime.errors import EXIT_USER_ERROR, UserError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT

# Seconds. What one rank reports, others may report a moment later: the same error in a file that
# all read, or a collective call that timed out on all ranks but the one that hangs.
COLLECT_S = 1.0
# An error on one rank may be the echo of another's death. So long is that one's word waited for.
ECHO_S = 3.0
# So long may the main thread still go on (to the end of a file that it is writing, say) once the
# end was decided.
GRACE_S = 5.0
CONNECT_S = 60.0

GREETING_BYTES = 64
DIED = "gone without a word (killed, out of memory, or its node lost?)"


def leave(code: int) -> None:
    """End this process now: nothing at exit may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out within about two minutes that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Line:
    """A socket that carries messages, one JSON object a line of text."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        # A data loader's worker must not hold the line of a rank that was killed.
        os.register_at_fork(after_in_child=connection.close)

    def send(self, message: dict) -> None:
        """Send, if anyone is there to hear it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """Wait for some messages; None once the other side is gone."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class _Hub(threading.Thread):
    """On rank 0: hears all ranks (its own too) and decides what the failure was."""

    def __init__(self, lines: dict[int, _Line], hosts: Sequence[str]) -> None:
        super().__init__(name="failure-hub", daemon=True)
        self.hosts = hosts
        self.lines = lines
        self.open = set(lines)
        self.reports: dict[int, dict] = {}
        self.decide_at: float | None = None
        self.all_left = threading.Event()

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, line in self.lines.items():
            selector.register(line.connection, selectors.EVENT_READ, rank)
        while self.open:
            wait = None if self.decide_at is None else self.decide_at - time.monotonic()
            if wait is not None and wait <= 0:
                return self._end(selector)
            for rank, messages in self._receive(selector, wait):
                if messages is None:
                    self._gone(rank)
                for message in messages or ():
                    self._hear(rank, message)
            if not self.open - {0}:
                self.all_left.set()

    def _receive(
        self, selector: selectors.BaseSelector, wait: float | None
    ) -> Iterator[tuple[int, list[dict] | None]]:
        for key, _ in selector.select(wait):
            messages = self.lines[key.data].receive()
            if messages is None:
                selector.unregister(key.fileobj)
            yield key.data, messages

    def _hear(self, rank: int, message: dict) -> None:
        if "bye" in message:
            self.open.discard(rank)
        elif rank not in self.reports:
            self._report(rank, message)

    def _gone(self, rank: int) -> None:
        if rank in self.open and rank not in self.reports:
            self._report(rank, {"text": DIED, "code": EXIT_FAILED})

    def _report(self, rank: int, message: dict) -> None:
        self.reports[rank] = message
        # A death is clear at once, and the launcher may be about to end this rank for it.
        if message["text"] == DIED or len(self.reports) == len(self.lines):
            self.decide_at = time.monotonic()
        elif self.decide_at is None:
            self.decide_at = time.monotonic() + COLLECT_S

    def _end(self, selector: selectors.BaseSelector) -> None:
        first = next(iter(self.reports))  # dicts keep the order of arrival
        text, code = self.reports[first]["text"], self.reports[first]["code"]
        silent = sorted(self.open - set(self.reports))
        if self.reports[first].get("timeout") and silent:
            who = ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in silent)
            line = f"timed out waiting for {who}, which neither answered nor failed: {text}"
        elif len(self.reports) == len(self.lines) and all(
            report["text"] == text for report in self.reports.values()
        ):
            line = text  # what all ranks say needs no rank
        else:
            line = f"rank {first} ({self.hosts[first]}): {text}"
        _say(line)
        for rank in self.lines:
            if rank:
                self.lines[rank].send({"end": True, "code": code})
        # Rank 0 goes last, when the others have heard it.
        last = time.monotonic() + COLLECT_S
        while self.open - {0} and time.monotonic() < last:
            for rank, messages in self._receive(selector, 0.1):
                if messages is None or any("bye" in message for message in messages):
                    self.open.discard(rank)
        self.lines[0].send({"end": True, "code": code})


class Watch:
    """This rank's end of the line to rank 0. Ends the process when rank 0 says so or is gone."""

    def __init__(
        self, store: dist.Store, rank: int, hosts: Sequence[str], address: str, alone_on_host: bool
    ) -> None:
        """Collective.

        Args:
            store: where rank 0 leaves its port.
            hosts: the host name of every rank.
            address: where rank 0 is reached from other machines.
            alone_on_host: whether all ranks run on one machine.
        """
        self.rank = rank
        self.hosts = hosts
        self.code: int | None = None  # set once the end was decided
        self._decided = threading.Event()
        self._hub = None
        self._bye = False
        if rank == 0:
            mine, theirs = socket.socketpair()
            self._line = _Line(mine)
            others = self._accept(store, len(hosts), alone_on_host)
            self._hub = _Hub({0: _Line(theirs), **others}, hosts)
            self._hub.start()
        else:
            self._line = self._connect(store, "127.0.0.1" if alone_on_host else address)
        threading.Thread(target=self._listen, name="failure-watch", daemon=True).start()

    def failed(self, text: str, code: int, timeout: bool = False) -> int:
        """Report this rank's failure, wait until it is known everywhere; returns the exit code."""
        self._line.send({"text": text, "code": code, "timeout": timeout})
        if not self._decided.wait(ECHO_S + COLLECT_S):
            _say(f"rank {self.rank} ({self.hosts[self.rank]}): {text}")
            return code
        return self.code

    def verdict(self, wait_s: float) -> int | None:
        """The exit code if another's failure becomes known within `wait_s` seconds."""
        self._decided.wait(wait_s)
        return self.code

    def bye(self, wait_s: float) -> None:
        """This rank is done. Rank 0 waits for the others, up to `wait_s` seconds: they need its
        store to the end."""
        if self._bye:
            return
        if self._hub is not None:
            self._hub.all_left.wait(wait_s)
            for rank, line in self._hub.lines.items():
                if rank:
                    line.send({"bye": True})
        self._bye = True
        self._line.send({"bye": True})

    def _listen(self) -> None:
        while True:
            messages = self._line.receive()
            if messages is None:
                if not self._bye:
                    _say(f"rank 0 ({self.hosts[0]}): {DIED}")
                    self._leave(EXIT_FAILED)
                return
            for message in messages:
                if "bye" in message:
                    self._bye = True
                else:
                    self._leave(message["code"])

    def _leave(self, code: int) -> None:
        self._line.send({"bye": True})
        self.code = code
        self._decided.set()
        time.sleep(GRACE_S)
        leave(code)

    @staticmethod
    def _accept(store: dist.Store, num_ranks: int, local: bool) -> dict[int, _Line]:
        token = secrets.token_hex(16)
        lines = {}
        with socket.create_server(("127.0.0.1" if local else "", 0), backlog=num_ranks) as server:
            port = server.getsockname()[1]
            server.settimeout(CONNECT_S)
            store.set("watch", f"{port} {token}")
            while len(lines) < num_ranks - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, num_ranks)) - set(lines))
                    raise UserError(
                        f"ranks {missing} do not reach rank 0 at port {port}: is there a firewall "
                        "between the nodes?"
                    ) from None
                greeting = b""
                with contextlib.suppress(OSError):  # a stranger may say nothing
                    connection.settimeout(CONNECT_S / 10)
                    greeting = connection.recv(GREETING_BYTES, socket.MSG_WAITALL)
                said, _, rank = greeting.partition(b" ")
                if secrets.compare_digest(said, token.encode()):
                    connection.settimeout(None)
                    _keep_alive(connection)
                    lines[int(rank)] = _Line(connection)
                else:
                    connection.close()
        return lines

    def _connect(self, store: dist.Store, address: str) -> _Line:
        port, token = store.get("watch").decode().split()
        try:
            connection = socket.create_connection((address, int(port)), timeout=CONNECT_S)
        except OSError as error:
            raise UserError(
                f"rank {self.rank} ({self.hosts[self.rank]}) does not reach rank 0 at "
                f"{address}:{port} ({error}): is there a firewall between the nodes?"
            ) from None
        connection.sendall(f"{token} {self.rank}".encode().ljust(GREETING_BYTES))
        connection.settimeout(None)
        _keep_alive(connection)
        return _Line(connection)


def describe(error: BaseException) -> tuple[str, int]:
    """(one line, exit code) of an error."""
    if isinstance(error, UserError):
        return " ".join(str(error).split()), EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else EXIT_FAILED
        return f"left by sys.exit({error.code!r})", code
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500], EXIT_FAILED
