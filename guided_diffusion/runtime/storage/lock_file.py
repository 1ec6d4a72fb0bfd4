"""Lock files with a heartbeat, which one process at a time holds.

The lock file, say `run.lock`, names its holder's host, process and start, and counts up every
second. A lock is stale if its process is gone from this host, or if its content has not changed for
STALE_S seconds of watching and no process is seen to run; the clocks of two hosts are never
compared.

Whoever takes a stale lock over leaves it where it is and adds a file to it, `run.lock.TOKEN` with
the token of its predecessor: the holder is the last of this chain. Each file of the chain is
created complete and by a hard link, which succeeds for one process only and never replaces
anything; file systems without hard links need exclusive creation. A holder that releases its lock
first adds a closing file in the same way, then removes the chain, `run.lock` first.

Guaranteed, if the file system creates links (or files, exclusively) atomically:

- At no moment is more than one process the last of the chain, however long processes pause.
- A process seen to run on the same host is never taken over.
- A holder that was suspended for more than STALE_S seconds, or whose host was cut off, may be taken
  over. Then it is no longer last, and whoever took over has marked its file as well, which its host
  cannot have cached. `check_held` finds that out before each write and raises; the heartbeat
  never touches another's file. Between this check and the end of the write nothing protects: a
  process suspended exactly there completes this write when it wakes.
- A process suspended for more than STALE_S seconds between closing and removing finds that it was
  taken over and restores the name `run.lock`; a holder whose name is missing looks twice. Should a
  third process create the name in that instant, the one that took over loses the lock to it, and
  finds so at its next check.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import sys
import threading
import time
from datetime import datetime
from typing import NamedTuple

from guided_diffusion.runtime import processes
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.processes import Record

BEAT_S = 1.0  # between signs of life
STALE_S = 60.0  # without a sign of life, after which a lock may be taken over
STOPPING_S = 600.0  # that a holder is waited for which is stopping
# Windows would turn line ends into two bytes
_BINARY = getattr(os, "O_BINARY", 0)
_POLL_S = 0.1
_TRIES = 20  # to create a file in a folder that others keep removing
# bytes that a beat overwrites in place; as many behind them are for whoever takes the lock over
_SIZE = 512
_TOKEN = 16  # characters of a token in file names


class Node(NamedTuple):
    """A file of the chain that makes up a lock."""

    path: str
    content: bytes


class RunLock:
    """A lock file.

    :param path: of the lock file.
    :param subject: what it guards, for messages.
    :param instead: what a second process may do instead, for messages.
    """

    stopping = False  # whether this process has been asked to stop; its heartbeat says so

    def __init__(self, path: str, subject: str = "", instead: str = "choose another folder"):
        self.path = os.path.abspath(path)
        self.subject = subject or os.path.dirname(self.path)
        self.instead = instead
        self.token = secrets.token_hex(16)
        self._pid = os.getpid()
        self._since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._created: list[str] = []  # folders that did not exist
        self._released = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock, waiting for a holder that is stopping or gives no sign of life.

        :raises UserError: if another process holds it, or if the folder cannot be written.
        """
        began = changed_at = time.monotonic()
        last: Node | None = None
        told = False
        while self._heart is None:
            now = time.monotonic()  # before reading: a pause in between makes nobody look silent
            chain = self._chain()
            if not chain:
                if not self._append(None):
                    time.sleep(_POLL_S)
                continue
            node, holder = chain[-1], _parse(chain[-1].content)
            is_beat = (
                last is not None
                and node != last
                and holder.get("token", "") == _parse(last.content).get("token")
            )
            if node != last:
                last, changed_at = node, now
            state, silent = processes.state(holder), now - changed_at > STALE_S
            if state == "gone" or (silent and state != "running"):
                if self._append(node) and not holder.get("closing"):
                    _say(f"{self.subject}: {_name(holder)} has ended without finishing; going on")
            elif silent or (is_beat and not (holder.get("stopping") and now - began < STOPPING_S)):
                raise UserError(
                    f"{self.subject} is in use by {_name(holder)}: let it finish or stop it and"
                    f" rerun the command, or {self.instead}"
                )
            elif not told and now - began > 3 * BEAT_S:
                doing = "is stopping" if holder.get("stopping") else "gives no sign of life"
                _say(f"{self.subject}: waiting for {_name(holder)}, which {doing}")
                told = True
            time.sleep(_POLL_S)

    def is_held(self) -> bool:
        """Whether this lock is the last of the chain."""
        try:
            return self._loss() is None
        except OSError:
            return False

    def check(self) -> None:
        """:raises UserError: if another process took the lock over, or the file was removed."""
        try:
            taker = self._loss()
            if taker == {}:  # whoever removed the name by mistake may be about to restore it
                time.sleep(2 * _POLL_S)
                taker = self._loss()
        except OSError:  # it cannot be told; if the folder is lost, so is what is to be written
            return
        if taker is None:
            return
        what = f"was taken over by {_name(taker)}" if taker else "has lost its lock"
        raise UserError(
            f"{self.subject} {what}, as this process seemed to be gone: it ends without writing"
            " anything more; rerun the command when no other runs"
        )

    def release(self) -> None:
        """Remove the lock, if it is still this one's, and folders that it left empty."""
        self._released.set()
        if os.getpid() != self._pid or self._heart is None:
            return  # a forked child is no holder
        self._heart.join(2 * BEAT_S)
        with contextlib.suppress(OSError, UserError):  # then it is stale, or lost with its folder
            self._remove_chain()
        with contextlib.suppress(OSError):
            for folder in self._created:
                os.rmdir(folder)

    def _loss(self) -> Record | None:
        """Who took the lock over, {} if that cannot be told; None: nobody did."""
        chain = self._chain()
        if own := [node for node in chain if _parse(node.content).get("token") == self.token]:
            if mark := _parse(own[0].content[_SIZE:]):
                return mark
            if own[0] is chain[-1]:
                return None
        return _parse(chain[-1].content) if chain else {}

    def _content(self, **changes: object) -> bytes:
        record = {
            "token": self.token,
            **processes.identity(),
            "since": self._since,
            "stopping": int(self.stopping),
            "beat": f"{0:012d}",
            **changes,
        }
        return json.dumps(record).encode().ljust(_SIZE - 1) + b"\n"

    def _chain(self) -> list[Node]:
        """The lock file and those that took it over, one after the other."""
        chain: list[Node] = []
        path = self.path
        while (content := _read(path)) is not None and path not in [node.path for node in chain]:
            chain.append(Node(path, content))
            path = self._successor(chain[-1])
        return chain

    def _successor(self, node: Node) -> str:
        """The file of whoever takes a node over."""
        empty = f"{node.path}.empty"  # the successor of a file that was never filled
        token = _parse(node.content).get("token")
        if not isinstance(token, str) or os.path.exists(empty):
            return empty
        return f"{self.path}.{token[:_TOKEN]}"

    def _append(self, stale: Node | None) -> bool:
        """Become the last of the chain, after a stale node or with none; False if another did."""
        self.token = secrets.token_hex(16)  # names one attempt
        path = self._successor(stale) if stale else self.path
        descriptor = self._create(path, self._content())
        if descriptor < 0:
            return False
        # after a pause before the link, the chain may be gone or its last may have woken
        if self._loss() is None and (stale is None or _read(stale.path) == stale.content):
            if stale:
                self._mark(stale)
            self._heart = threading.Thread(
                target=self._beat, args=(descriptor,), name="run-lock", daemon=True
            )
            self._heart.start()
            return True
        os.close(descriptor)
        if closing := self._close(path):
            self._detach(path, self.token, closing)
            _remove(closing.path)
        return False

    def _create(self, path: str, content: bytes) -> int:
        """Create a complete file, if there is none.

        :return: a descriptor of it; -1 if another process has created it.
        :raises UserError: if the folder cannot be written.
        """
        folder, name = os.path.split(path)
        temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
        token, tries = _parse(content)["token"], 0
        while True:
            try:
                self._make_folder(folder)
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                except FileExistsError:  # by this very link, if the answer of a server was lost
                    return _open(path, token)
                except FileNotFoundError:
                    raise
                except OSError:  # a file system without hard links
                    return _create_exclusively(path, content)
                return _open(path, token)
            except FileNotFoundError as error:  # others removed the folder or the temporary file
                tries += 1
                if tries == _TRIES:
                    raise self._unwritable(folder, error) from error
                time.sleep(_POLL_S)
            except OSError as error:
                raise self._unwritable(folder, error) from error
            finally:
                _remove(temporary)

    def _make_folder(self, folder: str) -> None:
        missing, above = [], folder
        while not os.path.isdir(above) and above != os.path.dirname(above):
            missing.append(above)
            above = os.path.dirname(above)
        os.makedirs(folder, exist_ok=True)
        self._created = self._created or missing

    def _unwritable(self, folder: str, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(f"cannot write into {folder} ({reason}): {self.instead}")

    def _mark(self, taken: Node) -> None:
        """Say in a file that it was taken over, behind what its heartbeat overwrites."""
        with contextlib.suppress(OSError):  # such as another user's file
            descriptor = _open(taken.path, _parse(taken.content).get("token"))
            if descriptor >= 0:
                try:
                    _write(descriptor, _SIZE, self._content())
                finally:
                    os.close(descriptor)

    def _close(self, path: str) -> Node | None:
        """Bar others from taking this lock, which is at `path`, over; None if one has."""
        content = self._content(token=secrets.token_hex(16), stopping=1, closing=1)
        closing = Node(self._successor(Node(path, self._content())), content)
        descriptor = self._create(closing.path, content)
        if descriptor < 0:
            return None
        os.close(descriptor)
        return closing

    def _remove_chain(self) -> None:
        """Remove the lock file, then all that belongs to it, unless another took over."""
        chain = self._chain()
        own = [node for node in chain if _parse(node.content).get("token") == self.token]
        closing = self._close(own[0].path) if own else None
        if closing is None:
            return
        folder, name = os.path.split(self.path)
        # listed before others can begin a new chain; its random names are never used again
        pattern = re.compile(
            rf"\.?{re.escape(name)}(\.empty|\.[0-9a-f]{{{_TOKEN}}})*(\.[0-9a-f]{{8}}\.tmp)?"
        )
        rest = [one for one in os.listdir(folder) if pattern.fullmatch(one) and one != name]
        if self._detach(self.path, _parse(chain[0].content).get("token"), closing):
            for one in rest:
                _remove(os.path.join(folder, one))

    def _detach(self, path: str, token: object, closing: Node) -> bool:
        """Remove a file of a closed chain; False if it is another's by now."""
        removed = f"{path}.{secrets.token_hex(4)}.old"
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, removed)
            same = _parse(_read(removed) or b"").get("token") == token
            if same and not os.path.exists(self._successor(closing)):
                _remove(removed)
                return True
            try:
                os.link(removed, path)
            except FileExistsError:  # a third process has begun a new chain
                pass
            except OSError:
                os.rename(removed, path)
            _remove(removed)
        return False

    def _beat(self, descriptor: int) -> None:
        """Give signs of life, into the file that was created, whatever is at the path now."""
        beats = 0
        while not self._released.wait(BEAT_S):
            beats += 1
            with contextlib.suppress(OSError):  # a full disk, a lost server: `check` decides
                _write(descriptor, 0, self._content(beat=f"{beats:012d}"))
        os.close(descriptor)  # here alone, so that no beat goes to another file of this number


def _read(path: str) -> bytes | None:
    """The content of a lock file; None if there is none."""
    for left in reversed(range(_TRIES)):
        try:
            with open(path, "rb", buffering=0) as file:  # opening asks the server, not a cache
                return file.read(2 * _SIZE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # on network file systems: removed since it was opened
            if error.errno != errno.ESTALE or not left:
                raise
    return None


def _open(path: str, token: object) -> int:
    """A descriptor of the lock file that has this token; -1 if the path has no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR | _BINARY)
    except FileNotFoundError:
        return -1
    if _parse(os.read(descriptor, _SIZE)).get("token") == token:
        return descriptor
    os.close(descriptor)
    return -1


def _create_exclusively(path: str, content: bytes) -> int:
    """A descriptor of a new file, empty at first; -1 if there is one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    except FileExistsError:
        return -1
    _write(descriptor, 0, content)
    return descriptor


def _write(descriptor: int, offset: int, content: bytes) -> None:
    os.lseek(descriptor, offset, os.SEEK_SET)
    os.write(descriptor, content)
    os.fsync(descriptor)


def _parse(content: bytes) -> Record:
    """What a lock file says; {} while it is incomplete."""
    try:
        record = json.loads(content[:_SIZE])
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def _name(holder: Record) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host')} (since {holder.get('since')})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
