"""One optimisation step, shared by all training loops.

Mixed precision, gradient exchange between ranks, clipping, AdamW, exponential moving averages (EMA)
of the weights, and skipping of steps whose gradients are not finite. A step never waits for the
device: decisions that depend on a number (is the gradient finite?) are made on the device.
"""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch as th
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from . import dist_util
from .networks.precision import PRECISIONS
from .runtime.errors import UserError

# of a float16 run; dynamic loss scaling (arXiv 1710.03740, section 3.2) soon adapts it
INITIAL_LOSS_SCALE = 2.0**16


class _AdamW(th.optim.AdamW):
    """AdamW with the attributes that GradScaler sets and torch's fused kernel reads.

    torch marks its optimizers' methods for its compiler, which the first call then imports: 150 MB
    and seconds that nothing here needs, as steps are not compiled. So the methods are unmarked.
    """

    found_inf: th.Tensor | None  # 1.0: leave weights and state unchanged
    grad_scale: th.Tensor | None
    step = th.no_grad()(inspect.unwrap(th.optim.AdamW.step))
    add_param_group = inspect.unwrap(th.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(th.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(th.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(th.optim.AdamW.load_state_dict)


class Stepper:
    """A network, its optimizer and the moving averages of its weights.

    With gradient accumulation over k microbatches, a step is

        for loss in losses[:-1]:  # each weighted so that their sum is the mean over the batch
            with stepper.no_sync():
                stepper.backward(loss)
        stepper.backward(losses[-1])
        stepper.step()

    with the network, `stepper.model`, and its losses evaluated under `stepper.autocast()`.

    :param model: float32 network, already on its device; parameters that do not require a
        gradient are left unchanged.
    :param lr: learning rate, unless `step` is called with another.
    :param weight_decay: decoupled weight decay of AdamW (arXiv 1711.05101).
    :param betas: of AdamW.
    :param param_groups: for AdamW, each a dict with "params" and optionally "lr_scale", a factor
        on the learning rate; by default one group of all parameters, as in the original.
    :param precision: "fp32", "fp16" or "bf16"; the weights stay float32 (autocast). fp16 needs
        CUDA; on a CPU it means fp32.
    :param scale_growth_interval: number of finite float16 steps after which the loss scale doubles.
    :param max_grad_norm: gradients with a greater 2-norm are scaled down to it; 0: no clipping.
    :param ema_rates: one moving average is kept per rate.
    :param ema_warmup: start with lower rates, min(rate, (1 + n) / (10 + n)) at step n, so that the
        random initial weights are soon forgotten.
    :param wrapper: a module that calls `model`, to be called in its place. Parameters of its own
        are trained too, but are neither averaged nor part of the network's weights.
    :raises UserError: for an unknown precision.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        param_groups: Sequence[dict[str, Any]] | None = None,
        precision: str = "fp32",
        scale_growth_interval: int = 1000,
        max_grad_norm: float = 0.0,
        ema_rates: Sequence[float] = (),
        ema_warmup: bool = True,
        wrapper: nn.Module | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)}")
        self.module = model
        self.device = next(model.parameters()).device
        if precision == "fp16" and self.device.type != "cuda":
            precision = "fp32"
        self.precision = precision
        self.lr = lr
        self.max_grad_norm = max_grad_norm
        self.ema_warmup = ema_warmup
        self.steps = 0

        self.wrapper = model if wrapper is None else wrapper
        self.model = self.wrapper  # what to call: exchanges gradients between ranks in `backward`
        if dist_util.world_size() > 1:
            dist_util.sync_params(self.wrapper.parameters())
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(
                self.wrapper, device_ids=ids, gradient_as_bucket_view=True
            )
        own = set(model.parameters())
        self._beside = {n: p for n, p in self.wrapper.named_parameters() if p not in own}
        groups = list(param_groups or [{"params": list(model.parameters())}])
        if self._beside:
            groups.append({"params": list(self._beside.values())})
        self.opt = _AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)
        self.scaler = th.amp.GradScaler(
            self.device.type,
            init_scale=INITIAL_LOSS_SCALE,
            growth_interval=scale_growth_interval,
            enabled=precision == "fp16",
        )
        self._trained = [p for g in self.opt.param_groups for p in g["params"] if p.requires_grad]
        # of what moving averages are kept, by name: the running statistics of BatchNorm belong to
        # the weights
        stored = model.state_dict()
        self._averaged = dict(model.named_parameters()) | {
            name: buffer
            for name, buffer in model.named_buffers()
            if name in stored and buffer.is_floating_point()
        }
        self.ema = {rate: self.copy_of_weights() for rate in ema_rates}
        # steps skipped consecutively and in total, and what a finite step multiplies them by
        self._skipped = th.zeros(2, dtype=th.int64, device=self.device)
        self._skipped_factor = th.tensor([0, 1], device=self.device)

    def copy_of_weights(self) -> list[th.Tensor]:
        """Copies of all parameters, in the order of `parameters()`, then of running statistics."""
        return [tensor.detach().clone() for tensor in self._averaged.values()]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which to evaluate the network and its losses."""
        return th.autocast(
            self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"
        )

    def no_sync(self) -> contextlib.AbstractContextManager:
        """The context for all but the last microbatch: ranks exchange gradients once per step."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def backward(self, loss: th.Tensor) -> None:
        """Accumulate the gradients of a microbatch.

        :param loss: scalar, the microbatch's contribution to the mean over the batch.
        """
        self.scaler.scale(loss).backward()

    def step(self, lr: float | None = None) -> th.Tensor:
        """Clip the gradients, update weights and averages, and clear the gradients.

        If a gradient is not finite, weights and optimizer stay unchanged and the step counts as
        skipped.

        :param lr: learning rate of this step; by default that of the constructor.
        :return: the 2-norm of the gradients before clipping, a float32 scalar on the device.
        """
        for group in self.opt.param_groups:
            group["lr"] = (self.lr if lr is None else lr) * group.get("lr_scale", 1.0)
        self.scaler.unscale_(self.opt)
        grads = [p.grad for p in self._trained if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        finite = th.isfinite(norm)
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self._trained, self.max_grad_norm, norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.opt)
            self.scaler.update()
        else:
            self.opt.found_inf = (~finite).float()  # as GradScaler would set it
            self.opt.grad_scale = None
            self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self._skipped = th.where(finite, self._skipped * self._skipped_factor, self._skipped + 1)
        self._update_ema(finite)
        self.steps += 1
        return norm

    @th.no_grad()
    def _update_ema(self, finite: th.Tensor) -> None:
        """average = rate average + (1 - rate) weights; skipped steps leave it unchanged."""
        weights = list(self._averaged.values())
        warmup_rate = (1 + self.steps) / (10 + self.steps)
        for rate, average in self.ema.items():
            rate = min(rate, warmup_rate) if self.ema_warmup else rate
            share = th.where(finite, 1 - rate, 0.0)
            th._foreach_lerp_(average, weights, [share] * len(weights))

    def skipped(self) -> tuple[int, int]:
        """Steps skipped consecutively until now, and in total. Waits for the device."""
        in_a_row, total = self._skipped.tolist()
        return in_a_row, total

    def loss_scale(self) -> float:
        """The factor on float16 losses; 1 in other precisions. Waits for the device."""
        return self.scaler.get_scale()

    def weights_as_state_dict(self, weights: Sequence[th.Tensor] | None = None) -> dict[str, Any]:
        """The network's state_dict, optionally with other weights (an average, say) instead."""
        state = self.module.state_dict()
        if weights is not None:
            state.update(zip(self._averaged, weights))
        return state

    @contextlib.contextmanager
    def averaged_weights(self, rate: float) -> Iterator[nn.Module]:
        """The network in evaluation mode with averaged weights, for the duration of the context."""
        own = [tensor.data for tensor in self._averaged.values()]
        training = self.module.training
        try:
            for tensor, average in zip(self._averaged.values(), self.ema[rate]):
                tensor.data = average
            yield self.module.eval()
        finally:
            for tensor, data in zip(self._averaged.values(), own):
                tensor.data = data
            self.module.train(training)

    def load_ema(self, rate: float, state: Mapping[str, th.Tensor]) -> None:
        """Load a moving average from a state_dict of the network."""
        for name, average in zip(self._averaged, self.ema[rate]):
            average.copy_(state[name])

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict, without what is trained beside the network."""
        whole = self.opt.state_dict()
        if self._beside:
            beside = whole["param_groups"].pop()["params"]
            whole["state"] = {i: v for i, v in whole["state"].items() if i not in beside}
        return whole

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Load the moments of AdamW, from any of its implementations; hyperparameters stay ours.

        What is trained beside the network starts without moments, see `load_state_dict`.

        :param state: state_dict of an AdamW optimizer.
        :raises UserError: if it belongs to another network.
        """
        ours, theirs = list(self.opt.param_groups), state["param_groups"]
        beside = [ours.pop()] if self._beside else []
        our_sizes = [len(group["params"]) for group in ours]
        their_sizes = [len(group["params"]) for group in theirs]
        params = [p for group in ours for p in group["params"]]
        indices = [i for group in theirs for i in group["params"]]
        if their_sizes != our_sizes or any(
            state["state"][i]["exp_avg"].shape != p.shape
            for i, p in zip(indices, params)
            if i in state["state"]
        ):
            raise UserError(
                f"the optimizer's state is of {their_sizes} tensors, the network has {our_sizes},"
                " or their shapes differ: it belongs to another network or to float16 master"
                " weights of the original package; remove the opt file to start without it"
            )
        groups = [{**our, "params": their["params"]} for our, their in zip(ours, theirs)]
        for group in beside:
            first = 1 + max(indices, default=-1)
            groups.append({**group, "params": list(range(first, first + len(group["params"])))})
        self.opt.load_state_dict({"state": state["state"], "param_groups": groups})

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs besides weights, averages and `optimizer_state`.

        Plain values, and tensors of what is trained beside the network.
        """
        state = {
            "steps": self.steps,
            "skipped": self._skipped.tolist(),
            "scaler": self.scaler.state_dict(),
        }
        if self._beside:
            state["beside"] = {
                name: {"weight": param.detach(), "moments": dict(self.opt.state[param])}
                for name, param in self._beside.items()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        :raises UserError: if what was trained beside the network has other shapes.
        """
        self.steps = state["steps"]
        self._skipped = th.tensor(state["skipped"], device=self.device)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self._beside and (beside := state.get("beside")):
            self._load_beside(beside)

    @th.no_grad()
    def _load_beside(self, state: Mapping[str, Any]) -> None:
        theirs = {name: saved["weight"].shape for name, saved in state.items()}
        if theirs != {name: param.shape for name, param in self._beside.items()}:
            raise UserError(
                "the checkpoint's heads have other shapes: they were trained for another encoder;"
                " align with the same one, or start from the checkpoint's averaged weights, ema_*"
            )
        for name, param in self._beside.items():
            param.copy_(state[name]["weight"])
            self.opt.state[param] = {
                sys.intern(key): value.to(self.device, copy=True)  # so that equal files are written
                for key, value in state[name]["moments"].items()
            }


def annealed(lr: float, step: int, steps: int) -> float:
    """Learning rate that decays linearly from `lr` to zero over `steps` steps; constant if 0."""
    return lr * max(0.0, 1 - step / steps) if steps else lr


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate, 0 to 1, at step `step` of `steps`.

    Linear warmup over `warmup` steps, then cosine decay to 0 (arXiv 1608.03983, equation 5).
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def first_not_finite(model: nn.Module, call: Callable[[], object]) -> str:
    """The name of the first module whose output is not finite during `call()`; "" if none."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and th.is_tensor(output) and not th.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
