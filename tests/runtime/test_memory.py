"""Freed memory stays with the process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
import torch as th
from guided_diffusion.runtime.memory import keep_freed_memory

# glibc's thresholds at their start; later they move with what a program has freed
for parameter in (-3, -1):
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(parameter, 1 << 17)
print(keep_freed_memory() if sys.argv[1] == "keep" else None)

def step():
    tensors = [th.empty(1 << 20).fill_(1.0) for _ in range(20)]

faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # the system may take pages away now and then
"""


def run(mode, **env):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    did, faults = done.stdout.split()
    return did, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_memory_is_reused_without_page_faults():
    did, faults = run("keep")
    if did == "False":
        pytest.skip("another C library, or its variables are set")
    pages = 20 * (4 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults < pages / 10
    assert run("leave")[1] > pages / 2


def test_the_users_own_settings_hold():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
