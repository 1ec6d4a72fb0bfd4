"""Networks compiled for inference; on GPUs all kernels launch as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch as th


def compiled(network: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """`network` for inference, compiled by torch.compile at the first call.

    Compiling takes minutes and is repeated for inputs of another size: it pays for many images of
    one size. A CUDA graph writes every result to the same memory, so callers get copies.

    :param network: a module, or a function that calls one, returning a tensor.
    """
    graph = th.compile(lambda *args, **kwargs: network(*args, **kwargs), mode=_mode())

    def call(*args: Any, **kwargs: Any) -> th.Tensor:
        th.compiler.cudagraph_mark_step_begin()
        return graph(*args, **kwargs).clone()

    return call


def _mode() -> str | None:
    return "reduce-overhead" if th.cuda.is_available() else None
