"""Fuzz the readers: every damaged file must yield a result or one clean error.

    python benchmarks/fuzz_readers.py [--files 2000] [--kinds images,masks] [--seed 0]

Takes valid files (images of every format, masks, class tables, config.json, segm.pth, checkpoints,
CSV files of groups), flips bits in them, truncates them or puts junk where a value was (a function
of seed and file number), and reads them in a process of limited memory. Prints how many files were
read, were refused, crashed the process, hung, or were "unclean": raised anything but a one-line
UserError that names the file, or gave other weights than were written. Exits with 1 if there were
any of the last three.
"""

import argparse
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter

import fuzz_kinds
import numpy as np

from guided_diffusion.runtime.errors import UserError

OUTCOMES = ("read", "refused", "unclean", "crashed", "hung")


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip 1 to 64 bits (half the time within the first 600 bytes), truncate the file, or both."""
    damaged = bytearray(content)
    kind = rng.integers(4)
    if kind != 3:
        reach = min(len(damaged), 600) if rng.integers(2) else len(damaged)
        for place in rng.integers(0, reach, 2 ** rng.integers(0, 7)):
            damaged[place] ^= 1 << int(rng.integers(8))
    if kind >= 2:
        del damaged[int(rng.integers(len(damaged))) :]
    return bytes(damaged)


def damaged_file(
    kinds: dict[str, fuzz_kinds.Kind], seed: int, number: int
) -> tuple[str, str, bytes]:
    """Kind, name and content of damaged file `number`; kinds and their formats alternate."""
    kind = list(kinds)[number % len(kinds)]
    files, further = kinds[kind].files, kinds[kind].mutate
    name = list(files)[number // len(kinds) % len(files)]
    rng = np.random.default_rng((seed, number))
    if further and rng.integers(2):
        return kind, name, further(files[name], rng)
    return kind, name, mutate(files[name], rng)


def try_reading(kind: fuzz_kinds.Kind, path: str) -> tuple[str, str]:
    """The outcome, "read", "refused" or "unclean", and a description of what was unclean."""
    try:
        kind.read(path)
    except UserError as error:
        text = str(error)
        if (
            not any(name in text for name in (path, *kind.names(path)))
            or "\n" in text
            or not text.isprintable()
            or len(text) > 1000
        ):
            return "unclean", f"message {text!r}"
        return "refused", ""
    except BaseException as error:  # any other exception is a finding
        return "unclean", f"{type(error).__name__}: {error}"
    return "read", ""


def run_worker(names: list[str], first: int, last: int, seed: int, memory: int) -> None:
    """Read damaged files within `memory` bytes of address space; prints one JSON line per file."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    warnings.simplefilter("error")  # a warning that reaches the user counts as unclean too
    kinds = fuzz_kinds.make(names)
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in kinds.items():
            os.mkdir(os.path.join(folder, name))
            for beside, content in (kind.beside or {}).items():
                _write(os.path.join(folder, name, beside), content)
        for number in range(first, last):
            kind, name, content = damaged_file(kinds, seed, number)
            path = os.path.join(folder, kind, name)
            _write(path, content)
            outcome, detail = try_reading(kinds[kind], path)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps([number, outcome, detail, peak]), flush=True)


def _write(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def supervise(
    args: argparse.Namespace,
) -> tuple[list[tuple[int, str, str]], tuple[int, int], tuple[float, int]]:
    """Run workers over all files, restarting after each crash or hang.

    :return: number, outcome and detail of each file; peak memory in KiB and longest time in
        seconds, each with the number of its file.
    """
    results, peak, longest, number = [], (0, 0), (0.0, 0), 0
    while number < args.files:
        command = [sys.executable, __file__, "--worker", str(number)]
        for flag in ("files", "seed", "memory_mib", "kinds"):
            command += [f"--{flag}", str(getattr(args, flag))]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        limit, unexpected, start = 60.0, b"", time.monotonic()  # the first answer includes start-up
        while number < args.files:
            ready, _, _ = select.select([worker.stdout], [], [], limit)
            line = worker.stdout.readline() if ready else b""
            if not line:
                worker.kill()
                outcome = "crashed" if ready else "hung"
                results.append((number, outcome, f"exit {worker.wait()} {unexpected[-300:]!r}"))
                number += 1
                break
            if not line.startswith(b"["):
                unexpected += line
                continue
            number, outcome, detail, memory = json.loads(line)
            if unexpected:
                outcome, detail = "unclean", f"printed {unexpected[-300:]!r}"
            results.append((number, outcome, detail))
            if limit == args.seconds:
                longest = max(longest, (time.monotonic() - start, number))
            peak = max(peak, (memory, number), key=lambda pair: pair[0])
            limit, unexpected, start, number = args.seconds, b"", time.monotonic(), number + 1
        worker.kill()
        worker.communicate()
    return results, peak, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="number of damaged files")
    parser.add_argument(
        "--kinds",
        default=",".join(fuzz_kinds.KINDS),
        help="which kinds of files, in turn: any of the default (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument(
        "--memory_mib", type=int, default=8192, help="address space of a worker, in MiB"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit per file")
    parser.add_argument("--keep", help="folder in which to keep the files that failed")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.kinds.split(",")
    if unknown := sorted(set(names) - set(fuzz_kinds.KINDS)):
        parser.error(f"--kinds {unknown[0]}: choose among {', '.join(fuzz_kinds.KINDS)}")
    if args.worker is not None:
        run_worker(names, args.worker, args.files, args.seed, args.memory_mib * 2**20)
        return 0
    kinds = fuzz_kinds.make(names)
    results, peak, longest = supervise(args)
    counts = {(kind, name): Counter() for kind in kinds for name in kinds[kind].files}
    for number, outcome, detail in results:
        kind, name, content = damaged_file(kinds, args.seed, number)
        counts[kind, name][outcome] += 1
        if outcome not in ("read", "refused"):
            print(f"{outcome}: file {number}, {kind}, {name}: {detail}")
            if args.keep:
                os.makedirs(args.keep, exist_ok=True)
                _write(os.path.join(args.keep, f"{number}_{name}"), content)
    print(f"{'files':38}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for (kind, name), count in counts.items():
        print(f"{kind + ' ' + name:38}" + "".join(f"{count[outcome]:9}" for outcome in OUTCOMES))
    total = sum(counts.values(), Counter())
    print(f"{'all ' + str(len(results)):38}" + "".join(f"{total[o]:9}" for o in OUTCOMES))
    print(
        f"peak resident memory {peak[0] / 1024:.0f} MiB (file {peak[1]}), "
        f"longest time {longest[0]:.2f} s (file {longest[1]})"
    )
    return int(any(total[outcome] for outcome in ("unclean", "crashed", "hung")))


if __name__ == "__main__":
    sys.exit(main())
