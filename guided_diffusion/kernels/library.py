"""Loading the compiled kernels, if this processor can run them."""

import ctypes
import functools
import importlib.machinery
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch as th

_is_wrapped = th._C._functorch.is_functorch_wrapped_tensor

# to compare with torch's own operations: GUIDED_DIFFUSION_KERNELS=off
SWITCH = "GUIDED_DIFFUSION_KERNELS"
_AVX512, _AMX_BF16 = 1, 2


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are missing, switched off or unsuited to this CPU."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "false"):
        return None
    if th.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            try:
                # importing torch made its OpenMP runtime's functions visible to the library
                found = ctypes.CDLL(str(path))
                return found if _is_current(found) and _has_avx512(found) else None
            except (OSError, AttributeError):
                return None
    return None


def _has_avx512(found: ctypes.CDLL) -> bool:
    return bool(found.processor_features() & _AVX512)


def _is_current(found: ctypes.CDLL) -> bool:
    """Whether a library was built from the sources beside it, if there are any.

    In an editable installation, an update of the sources leaves the library of the former ones.
    """
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    if not sources:
        return True
    checksum = zlib.crc32(b"".join(path.read_bytes() for path in sources))
    found_checksum = getattr(found, "sources_checksum", None)
    if found_checksum is not None and found_checksum() & 0xFFFFFFFF == checksum:
        return True
    warnings.warn(
        "the compiled kernels are older than their sources and are not used; build them again with"
        " pip install --editable .",
        stacklevel=2,
    )
    return False


def is_plain(tensor: th.Tensor) -> bool:
    """Whether it has memory of its own, unlike the tensors that torch traces or batches with."""
    return type(tensor) in (th.Tensor, th.nn.Parameter) and not _is_wrapped(tensor)


def usable(tensor: th.Tensor) -> bool:
    """Whether to call a kernel for `tensor`: not while torch traces, which sees no kernels."""
    return (
        not (th.compiler.is_compiling() or th.jit.is_tracing())
        and library() is not None
        and tensor.device.type == "cpu"
        and is_plain(tensor)
    )


@functools.cache
def has_amx() -> bool:
    """Whether the kernels can multiply bfloat16 matrices in AMX tiles."""
    kernels = library()
    return kernels is not None and bool(kernels.processor_features() & _AMX_BF16)


def function(name: str) -> Callable[..., int]:
    """A function of the library, which must be there."""
    return getattr(library(), name)


def call(name: str, arguments: ctypes.Structure) -> None:
    """Run a kernel of the library, which must be there.

    :raises MemoryError: if memory for its intermediate results is short.
    """
    if function(name)(ctypes.byref(arguments)):
        raise MemoryError(f"{name}: not enough memory")


def describe() -> str:
    """What the log says of them."""
    if library() is None:
        return "torch's own kernels"
    return f"compiled kernels ({'AVX-512, AMX' if has_amx() else 'AVX-512'})"
