"""One process at a time writes into a run's folder: lock files with a heartbeat.

The holder keeps `run.lock` in the folder (or `segm.pth.lock` beside the file). It names its host,
process and start, and counts up every second. A lock is stale if its process is gone from this
host, or if its content has not changed for STALE_S seconds of watching and no process is seen to
run; the clocks of two hosts are never compared. Only atomic operations are used (hard links or
exclusive creation, renaming), so network file systems will do. Folders in the cloud have none of
these: they are locked against other processes of this machine only.

Whoever replaces or removes a lock holds a second one, named after the first one's token: of all
processes that find a lock stale, one takes over. A holder that was suspended and taken over finds
another token in the file, and `check_held` then raises before anything is written.
"""

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from types import FrameType
from typing import Any

from guided_diffusion.runtime.errors import UserError

LOCK_NAME = "run.lock"
BEAT_S = 1.0  # between signs of life
STALE_S = 60.0  # without a sign of life, after which a lock may be taken over
STOPPING_S = 600.0  # that a holder is waited for which is stopping
_POLL_S = 0.1
# bytes of a lock file: a beat overwrites them all in place
_SIZE = 512
# signals that end a process without its exit handlers
_ENDING = ("SIGTERM", "SIGUSR1", "SIGHUP")

Record = dict[str, Any]


class RunLock:
    """A lock file.

    :param path: of the lock file.
    :param subject: what it guards, for messages.
    :param instead: what a second process may do instead, for messages.
    """

    def __init__(self, path: str, subject: str = "", instead: str = "choose another folder"):
        self.path = os.path.abspath(path)
        self.subject = subject or os.path.dirname(self.path)
        self.instead = instead
        self.token = secrets.token_hex(16)
        self._pid = os.getpid()
        self._since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self._beats = 0
        self._created: list[str] = []  # folders that did not exist
        self._seen: dict[bytes, float] = {}  # when claims of others were first seen
        self._released = threading.Event()
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock, waiting for a holder that is stopping or gives no sign of life.

        :raises UserError: if another process holds it, or if the folder cannot be written.
        """
        began = changed_at = time.monotonic()
        last, told = b"", False
        while True:
            content = _read(self.path)
            if content is None:
                if self._create():
                    break
                continue
            now, holder = time.monotonic(), _parse(content)
            is_beat = content != last and holder.get("token", "") == _parse(last).get("token")
            if content != last:
                last, changed_at = content, now
            state, silent = _state(holder), now - changed_at > STALE_S
            if state == "gone" or (silent and state != "running"):
                if self._take_over(content):
                    _say(f"{self.subject}: {_name(holder)} has ended without finishing; going on")
                    break
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
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def is_held(self) -> bool:
        """Whether the file is still this lock's."""
        try:
            return _parse(_read(self.path) or b"").get("token") == self.token
        except OSError:
            return False

    def check(self) -> None:
        """:raises UserError: if another process took the lock over, or the file was removed."""
        try:
            content = _read(self.path)
        except OSError:  # it cannot be told; if the folder is lost, so is what is to be written
            return
        taker = _parse(content or b"")
        if content is not None and taker.get("token", self.token) == self.token:
            return
        what = f"was taken over by {_name(taker)}" if taker else "has lost its lock"
        raise UserError(
            f"{self.subject} {what}, as this process seemed to be gone: it ends without writing"
            " anything more; rerun the command when no other runs"
        )

    def release(self) -> None:
        """Remove the lock, if it is still this one's, and folders that it left empty."""
        self._released.set()
        if os.getpid() != self._pid or self._descriptor < 0:
            return  # a forked child is no holder
        with self._claim(self.token) as claimed:
            if claimed and self.is_held():
                _remove(self.path)
        self._adopt(-1)
        with contextlib.suppress(OSError):
            for folder in self._created:
                os.rmdir(folder)

    def _content(self) -> bytes:
        record = {
            "token": self.token,
            **_identity(),
            "since": self._since,
            "stopping": int(_stopping),
            "beat": f"{self._beats:012d}",
        }
        return json.dumps(record).encode().ljust(_SIZE - 1) + b"\n"

    def _create(self) -> bool:
        """Create the file; False if there is one."""
        temporary = self._write_temporary()
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            if os.stat(temporary).st_nlink < 2:  # else the answer of a server was lost
                return False
        except OSError:  # a file system without hard links
            try:
                self._adopt(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return False
            self._overwrite()
            return True
        finally:
            _remove(temporary)
        self._adopt(os.open(self.path, os.O_WRONLY))
        return True

    def _write_temporary(self) -> str:
        """The content of the lock in a file of another name."""
        folder, name = os.path.split(self.path)
        temporary = os.path.join(folder, f".{name}.{self.token[:8]}.tmp")
        missing, above = [], folder
        while not os.path.isdir(above) and above != os.path.dirname(above):
            missing.append(above)
            above = os.path.dirname(above)
        try:
            os.makedirs(folder, exist_ok=True)
            self._created = self._created or missing
            with open(temporary, "wb") as file:
                file.write(self._content())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write into {folder} ({error.strerror or error}): {self.instead}"
            ) from error
        return temporary

    @contextlib.contextmanager
    def _claim(self, token: str) -> Iterator[bool]:
        """The right to replace or remove the lock of this token; yields whether it is obtained."""
        claim = RunLock(f"{self.path}.{token[:8]}", self.subject, self.instead)
        claimed = claim._create()
        if not claimed and (content := _read(claim.path)) is not None:
            first = self._seen.setdefault(content, time.monotonic())
            if _state(_parse(content)) == "gone" or time.monotonic() - first > STALE_S:
                claimed = claim._take_over(content)
        try:
            yield claimed
        finally:
            if claimed and claim.is_held():
                _remove(claim.path)
            claim._adopt(-1)

    def _take_over(self, stale: bytes) -> bool:
        """Replace a stale lock; False if it has changed, or if another process is about to."""
        with self._claim(_parse(stale).get("token", "unknown")) as claimed:
            if not claimed or _read(self.path) != stale:
                return False
            temporary = self._write_temporary()
            self._adopt(os.open(temporary, os.O_WRONLY))
            os.replace(temporary, self.path)
            return True

    def _adopt(self, descriptor: int) -> None:
        """Write beats there from now on; -1: nowhere."""
        before, self._descriptor = self._descriptor, descriptor
        if before >= 0:
            os.close(before)

    def _beat(self) -> None:
        """Give signs of life, into the file that was created, whatever is at the path now."""
        while not self._released.wait(BEAT_S):
            self._beats += 1
            with contextlib.suppress(OSError):  # a full disk, a lost server: `check` decides
                self._overwrite()

    def _overwrite(self) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, self._content())
        os.fsync(self._descriptor)


_held: dict[str, RunLock] = {}  # this process's locks by path
_stopping = False


def hold_folder(folder: str, instead: str) -> None:
    """Lock a folder until the end of `released`, or of the process; again is no error.

    :param instead: what a second process may do, such as "choose another --out_dir".
    :raises UserError: if another process holds it.
    """
    _hold(os.path.join(folder, LOCK_NAME), folder, instead)


def hold_file(path: str, instead: str) -> None:
    """Lock a file that will be written, and what belongs to it; see `hold_folder`."""
    _hold(f"{path}.lock", path, instead)


def release_folder(folder: str) -> None:
    """Release the lock of a folder."""
    release_all(set(_held) - {_local(os.path.join(folder, LOCK_NAME))})


def _local(path: str) -> str:
    """The path of a lock file; for the cloud, one in the folder of temporary files."""
    if "://" in path:
        name = hashlib.sha256(path.encode()).hexdigest()[:16]
        path = os.path.join(tempfile.gettempdir(), f"guided_diffusion_{name}.lock")
    return os.path.realpath(path)


def _hold(path: str, subject: str, instead: str) -> None:
    path = _local(path)
    if path in _held and _held[path]._pid == os.getpid():
        return
    lock = RunLock(path, subject, instead)
    lock.acquire()
    _held[path] = lock
    if threading.current_thread() is threading.main_thread():
        for number in _ending_signals():
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)


def check_held() -> None:
    """:raises UserError: if this process has lost one of its locks: it must not write any more."""
    for lock in list(_held.values()):
        if lock._pid == os.getpid():
            lock.check()


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Release, at the end, the locks that were taken inside."""
    before = set(_held)
    try:
        yield
    finally:
        release_all(before)


def release_all(but: set[str] | None = None) -> None:
    """Release this process's locks.

    :param but: paths of those to keep.
    """
    global _stopping
    for path in set(_held) - (but or set()):
        _held.pop(path).release()
    if not _held:
        _stopping = False
        if threading.current_thread() is threading.main_thread():
            for number in _ending_signals():
                if signal.getsignal(number) is _end:
                    signal.signal(number, signal.SIG_DFL)


def note_stopping() -> None:
    """Let other processes know that this one has been asked to stop, and wait for it."""
    global _stopping
    _stopping = True


def _end(number: int, frame: FrameType | None) -> None:
    """Release the locks, then end by the signal as if there had been no handler."""
    release_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _ending_signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]


atexit.register(release_all)


def _read(path: str) -> bytes | None:
    """The content of a lock file; None if there is none."""
    try:
        with open(path, "rb", buffering=0) as file:  # opening asks the server, not a cache
            return file.read(_SIZE)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(content: bytes) -> Record:
    """What a lock file says; {} while it is incomplete."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def _identity() -> Record:
    """This process, so that others on this host can tell whether it still runs."""
    return {**_machine(), "pid": os.getpid(), "started": _process(os.getpid())[1]}


def _machine() -> Record:
    """This host since its last start, and the container whose process numbers these are."""
    machine = {"host": socket.gethostname(), "boot": "", "container": ""}
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        machine["boot"] = file.read().strip()
    with contextlib.suppress(OSError):
        machine["container"] = os.readlink("/proc/self/ns/pid")
    return machine


def _process(pid: int) -> tuple[str, str]:
    """State and start time of a process as Linux tells them; ("", "") if it does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def _state(holder: Record) -> str:
    """Of the holder's process: "running" or "gone", if it is this host's; else "unknown"."""
    if sys.platform == "win32" or any(holder.get(k) != v for k, v in _machine().items()):
        return "unknown"
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return "gone"
    except (OSError, KeyError, TypeError):  # another user's process
        return "unknown"
    state, started = _process(holder["pid"])
    if state in ("Z", "X") or (started and started != holder.get("started")):
        return "gone"
    return "running" if state and state not in "Tt" else "unknown"  # T: suspended


def _name(holder: Record) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host')} (since {holder.get('since')})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
