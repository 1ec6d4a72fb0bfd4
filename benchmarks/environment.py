"""What this machine has for benchmarks/on_gpu.sh: packages, CUDA card, compiler.

    python benchmarks/environment.py [--json FILE]

Ends with exit code 2 and one line naming the packages that are missing, or a card that torch sees
but cannot compute on; nothing is installed.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

# by the name that it is imported by, the name that it is installed by
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "blobfile": "blobfile",
    "PIL": "pillow",
    "tqdm": "tqdm",
}
FOR_TESTS = {name: name for name in ("pytest", "hypothesis", "pydicom", "matplotlib")}


def missing(packages: dict[str, str]) -> list[str]:
    """The names by which those of the packages are installed that cannot be imported here."""
    absent = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            absent.append(package)
    return absent


def examine() -> dict[str, Any]:
    """What this machine has, as plain values.

    :raises RuntimeError: if torch sees a GPU and cannot compute on it.
    """
    import torch as th

    cpu_only = os.environ.get("GUIDED_DIFFUSION_DEVICE", "").lower() == "cpu"
    found: dict[str, Any] = {
        "device": "cuda" if th.cuda.is_available() and not cpu_only else "cpu",
        "torch": th.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        "compiler": shutil.which("gcc") or shutil.which("cc") or shutil.which("g++") or "",
        "missing_for_tests": missing(FOR_TESTS),
    }
    if found["device"] == "cuda":
        properties = th.cuda.get_device_properties(0)
        one = th.ones(256, 256, device="cuda")
        if float((one @ one).sum()) != 256**3:
            raise RuntimeError("a product of matrices on the GPU is wrong")
        found |= {
            "card": properties.name,
            "memory_gb": properties.total_memory / 1e9,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": th.version.cuda,
            "cudnn": th.backends.cudnn.version(),
            "nccl": ".".join(map(str, th.cuda.nccl.version())),
            "triton": not missing({"triton": "triton"}),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="", help="also write what was found to this file")
    arguments = parser.parse_args()
    absent = missing(NEEDED)
    if absent:
        print(
            f"error: {sys.executable} lacks {', '.join(absent)}: pip install {' '.join(absent)},"
            " or name a folder that holds them in PYTHONPATH",
            file=sys.stderr,
        )
        return 2
    try:
        found = examine()
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        print(f"error: torch cannot compute on the GPU ({said})", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}: {value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
