"""Half precision as in the original package: float16 torsos with float32 master weights.

`TrainLoop` uses autocast instead, which keeps checkpoints float32; this module is for callers
written for the original package.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch as th
import torch.nn as nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# a group of named parameters, and the shape of the one tensor that holds their master copies
NamedParams = list[tuple[str, th.Tensor]]
GroupAndShape = tuple[NamedParams, tuple[int, ...]]


def _convert_convolution(layer: nn.Module, dtype: th.dtype) -> None:
    if isinstance(layer, _CONVOLUTIONS):
        layer.weight.data = layer.weight.data.to(dtype)
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(dtype)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 - a public name
    """Convert a convolution's weights to float16; leave other modules unchanged."""
    _convert_convolution(l, th.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741 - a public name
    """Convert a convolution's weights to float32; leave other modules unchanged."""
    _convert_convolution(l, th.float32)


def get_param_groups_and_shapes(
    named_model_params: Iterable[tuple[str, th.Tensor]],
) -> list[GroupAndShape]:
    """Two groups: vectors and scalars as one vector, all others as a matrix of one row."""
    named = list(named_model_params)
    vectors = [(name, p) for name, p in named if p.ndim <= 1]
    matrices = [(name, p) for name, p in named if p.ndim > 1]
    return [(vectors, (-1,)), (matrices, (1, -1))]


def make_master_params(param_groups_and_shapes: Sequence[GroupAndShape]) -> list[nn.Parameter]:
    """Float32 copies, one flat parameter per group."""
    masters = []
    for named, shape in param_groups_and_shapes:
        flat = _flatten_dense_tensors([p.detach().float() for _, p in named])
        masters.append(nn.Parameter(flat.view(shape)))
    return masters


def unflatten_master_params(
    param_group: NamedParams, master_param: th.Tensor
) -> Sequence[th.Tensor]:
    """The parts of a master parameter, in the shapes of the parameters of its group."""
    return _unflatten_dense_tensors(master_param.view(-1), [p for _, p in param_group])


def param_grad_or_zeros(param: th.Tensor) -> th.Tensor:
    """The gradient of `param`, or zeros if it has none."""
    return th.zeros_like(param) if param.grad is None else param.grad.detach()


def model_grads_to_master_grads(
    param_groups_and_shapes: Sequence[GroupAndShape], master_params: Sequence[nn.Parameter]
) -> None:
    """Copy the model's gradients, in float32, to the master parameters."""
    for master, (named, shape) in zip(master_params, param_groups_and_shapes):
        grads = [param_grad_or_zeros(p).float() for _, p in named]
        master.grad = _flatten_dense_tensors(grads).view(shape)


@th.no_grad()
def master_params_to_model_params(
    param_groups_and_shapes: Sequence[GroupAndShape], master_params: Sequence[nn.Parameter]
) -> None:
    """Copy the master parameters into the model, in the model's precision."""
    for master, (named, _) in zip(master_params, param_groups_and_shapes):
        for (_, param), value in zip(named, unflatten_master_params(named, master)):
            param.copy_(value)


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: Sequence[GroupAndShape] | None,
    master_params: Sequence[th.Tensor],
    use_fp16: bool,
) -> dict[str, th.Tensor]:
    """The model's state_dict with the values of the master parameters.

    :param param_groups_and_shapes: may be None without `use_fp16`.
    """
    state = model.state_dict()
    if use_fp16:
        for master, (named, _) in zip(master_params, param_groups_and_shapes or ()):
            for (name, _), value in zip(named, unflatten_master_params(named, master)):
                state[name] = value
    else:
        for (name, _), value in zip(model.named_parameters(), master_params):
            state[name] = value
    return state


def state_dict_to_master_params(
    model: nn.Module, state_dict: Mapping[str, th.Tensor], use_fp16: bool
) -> Sequence[th.Tensor]:
    """Inverse of `master_params_to_state_dict`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return make_master_params(get_param_groups_and_shapes(named))
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[nn.Parameter]) -> None:
    """Clear the gradients of the master parameters."""
    for param in master_params:
        param.grad = None


def zero_grad(model_params: Iterable[nn.Parameter]) -> None:
    """Set existing gradients to zero, in place."""
    for param in model_params:
        if param.grad is not None:
            param.grad.detach_().zero_()


def check_overflow(value: float) -> bool:
    """Whether a norm is infinite or NaN."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Loss scaling and master weights around an optimizer (arXiv 1710.03740).

    :param model: the network; with `use_fp16`, its `convert_to_fp16` is called.
    :param use_fp16: without it, calls are only passed through.
    :param fp16_scale_growth: added to log2 of the loss scale after each step without overflow.
    :param initial_lg_loss_scale: log2 of the initial loss scale.
    :raises TypeError: if the network cannot be converted to float16.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = 20.0,
    ) -> None:
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.model_params = list(model.parameters())
        self.param_groups_and_shapes: list[GroupAndShape] = []
        self.master_params = self.model_params
        if use_fp16:
            convert = getattr(model, "convert_to_fp16", None)
            if not callable(convert):
                raise TypeError(f"use_fp16: {type(model).__name__} has no method convert_to_fp16")
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            convert()

    def zero_grad(self) -> None:
        """Set the gradients of the model to zero."""
        zero_grad(self.model_params)

    def backward(self, loss: th.Tensor) -> None:
        """Accumulate the gradients of a scalar loss, scaled with `use_fp16`."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: th.optim.Optimizer) -> bool:
        """One step of `opt` over the master parameters; False if it overflowed and was skipped."""
        if self.use_fp16:
            model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        scale = 2**self.lg_loss_scale if self.use_fp16 else 1.0
        grads = [p.grad for p in self.master_params if p.grad is not None]
        grad_norm = float(th.nn.utils.get_total_norm(grads)) / scale
        if self.use_fp16 and check_overflow(grad_norm):
            self.lg_loss_scale -= 1
            zero_master_grads(self.master_params)
            return False
        if self.use_fp16:
            th._foreach_mul_(grads, 1.0 / scale)
        opt.step()
        if self.use_fp16:
            zero_master_grads(self.master_params)
            master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
            self.lg_loss_scale += self.fp16_scale_growth
        return True

    def master_params_to_state_dict(
        self, master_params: Sequence[th.Tensor]
    ) -> dict[str, th.Tensor]:
        """See the function of this name."""
        return master_params_to_state_dict(
            self.model, self.param_groups_and_shapes, master_params, self.use_fp16
        )

    def state_dict_to_master_params(
        self, state_dict: Mapping[str, th.Tensor]
    ) -> Sequence[th.Tensor]:
        """See the function of this name."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
