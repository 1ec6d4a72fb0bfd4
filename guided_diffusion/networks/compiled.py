"""Compiled networks for sampling and prediction; on GPUs their kernels start as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch as th


def compiled(network: Callable[..., th.Tensor]) -> Callable[..., th.Tensor]:
    """`network` for inference, compiled by torch.compile when it is first called.

    Compiling takes minutes and is repeated for inputs of another size, so it pays for many images
    of one size. A CUDA graph writes every result to the same place; callers get copies.

    :param network: a module or a function that calls one; returns a tensor.
    """
    called = th.compile(lambda *args, **kwargs: network(*args, **kwargs), **_options())

    def call(*args: Any, **kwargs: Any) -> th.Tensor:
        th.compiler.cudagraph_mark_step_begin()
        return called(*args, **kwargs).clone()

    return call


def _options() -> dict[str, str]:
    return {"mode": "reduce-overhead"} if th.cuda.is_available() else {}
