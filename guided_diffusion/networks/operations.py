"""How many operations a network takes, counted without computing anything."""

import copy
from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils.flop_counter import FlopCounterMode


def count_operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions and matrix products, run on the meta device.

    There attention counts its two products forward and four backward, whatever a kernel computes
    twice; so a faster algorithm does not look like less work.
    """
    with FlopCounterMode(display=False) as counter, th.device("meta"):
        call()
    return counter.get_total_flops()


def operations_of(
    network: th.nn.Module, *inputs: th.Tensor, backward: bool = False, **named: th.Tensor
) -> int:
    """Operations of a network's forward pass and, with `backward`, of its backward pass as well.

    :param inputs: as the network takes them; `named` likewise. Only their shapes matter.
    """
    twin = copy.deepcopy(network).to("meta")
    inputs = [value.to("meta") for value in inputs]
    named = {name: value.to("meta") for name, value in named.items()}

    def call() -> None:
        with th.set_grad_enabled(backward):
            output = twin(*inputs, **named)
        if backward:
            output.mean().backward()

    return count_operations(call)
