"""Which process wrote a record, and whether it still runs on this host."""

import contextlib
import os
import socket
import sys
from typing import Any

Record = dict[str, Any]


def identity() -> Record:
    """This process, so that others on this host can tell whether it still runs."""
    return {**machine(), "pid": os.getpid(), "started": stat(os.getpid())[1]}


def machine() -> Record:
    """This host since its last start, and the container whose process numbers these are."""
    found = {"host": socket.gethostname(), "boot": "", "container": ""}
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        found["boot"] = file.read().strip()
    with contextlib.suppress(OSError):
        found["container"] = os.readlink("/proc/self/ns/pid")
    return found


def stat(pid: int) -> tuple[str, str]:
    """State and start time of a process as Linux tells them; ("", "") if it does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def state(holder: Record) -> str:
    """Of the holder's process: "running" or "gone", if it is this host's; else "unknown"."""
    if sys.platform == "win32" or any(holder.get(k) != v for k, v in machine().items()):
        return "unknown"
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return "gone"
    except (OSError, KeyError, TypeError):  # another user's process
        return "unknown"
    letter, started = stat(holder["pid"])
    if letter in ("Z", "X") or (started and started != holder.get("started")):
        return "gone"
    return "running" if letter and letter not in "Tt" else "unknown"  # T: suspended
