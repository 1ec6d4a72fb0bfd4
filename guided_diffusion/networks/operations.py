"""Counting the floating-point operations of a network without computing anything."""

import copy
from collections.abc import Callable
from typing import Any

import torch as th


def count_operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of the convolutions and matrix products in `call`, on meta tensors.

    Attention counts as its two products forward and four backward, even if a kernel recomputes
    some, so that a faster algorithm does not look like less work.
    """
    from torch.utils.flop_counter import FlopCounterMode  # 75 MB

    with FlopCounterMode(display=False) as counter, th.device("meta"):
        call()
    return counter.get_total_flops()


def operations_of(
    network: th.nn.Module, *inputs: th.Tensor, backward: bool = False, **named: th.Tensor
) -> int:
    """Floating-point operations of a network's forward pass.

    :param inputs: the network's arguments, like `named`; only their shapes matter.
    :param backward: count the backward pass as well.
    """
    twin = copy.deepcopy(network).to("meta")
    shapes = [value.to("meta") for value in inputs]
    named_shapes = {name: value.to("meta") for name, value in named.items()}

    def call() -> None:
        with th.set_grad_enabled(backward):
            output = twin(*shapes, **named_shapes)
        if backward:
            output.mean().backward()

    return count_operations(call)
