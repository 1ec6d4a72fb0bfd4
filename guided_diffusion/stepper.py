"""One optimisation step, the same for every training loop here.

Precision, gradient exchange between ranks, clipping, AdamW, averaged weights, and steps whose
gradients are not finite. Nothing in a step waits for the device: what would need a look at a
number (was the gradient finite?) is decided on the device.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch as th
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from . import dist_util
from .nn import update_ema
from .runtime.errors import UserError

PRECISIONS = {"fp32": th.float32, "fp16": th.float16, "bf16": th.bfloat16}
# the scale of the loss at the start of a float16 run; it finds its level within some steps
INITIAL_LOSS_SCALE = 2.0**16


class Stepper:
    """A network, its optimizer and its averaged copies.

    :param model: float32 network, already on its device; parameters that do not require a
        gradient stay as they are.
    :param lr: learning rate of a step unless `step` is told otherwise.
    :param weight_decay: decoupled weight decay of AdamW (arXiv 1711.05101).
    :param betas: of AdamW.
    :param param_groups: for AdamW, each a dict with "params" and optionally "lr_scale", a factor
        on the learning rate; by default one group of all parameters, as in the original.
    :param precision: "fp32", "fp16" or "bf16"; the weights stay float32 (autocast). float16
        needs CUDA; on a CPU it means float32.
    :param scale_growth_interval: finite float16 steps after which the loss scale doubles.
    :param max_grad_norm: longer gradients are scaled down to this 2-norm; 0 switches it off.
    :param ema_rates: an averaged copy of the weights is kept for each.
    :param ema_warmup: begin with lower rates, min(rate, (1 + n) / (10 + n)) at step n, so that
        the random weights of the start are forgotten.
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
    ):
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

        self.model = model
        if dist_util.world_size() > 1:
            dist_util.sync_params(model.parameters())
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(
                model, device_ids=ids, gradient_as_bucket_view=True
            )
        groups = param_groups or [{"params": list(model.parameters())}]
        self.opt = th.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)
        self.scaler = th.amp.GradScaler(
            self.device.type,
            init_scale=INITIAL_LOSS_SCALE,
            growth_interval=scale_growth_interval,
            enabled=precision == "fp16",
        )
        self._trained = [p for g in self.opt.param_groups for p in g["params"] if p.requires_grad]
        self.ema = {rate: self.copy_of_weights() for rate in ema_rates}
        # steps skipped in a row and altogether
        self._skipped = th.zeros(2, dtype=th.int64, device=self.device)

    def copy_of_weights(self) -> list[th.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network and its losses are computed."""
        return th.autocast(
            self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"
        )

    def gradients_stay_here(self) -> contextlib.AbstractContextManager:
        """The context for all but the last microbatch: ranks exchange gradients once a step."""
        return self.model.no_sync() if self.model is not self.module else contextlib.nullcontext()

    def backward(self, loss: th.Tensor) -> None:
        """Add the gradients of a microbatch's share of the mean loss."""
        self.scaler.scale(loss).backward()

    def step(self, lr: float | None = None) -> th.Tensor:
        """Clip, update weights and averages, forget the gradients.

        A gradient that is not finite leaves weights and optimizer alone and counts as skipped.

        :return: the gradient's 2-norm before clipping, a float32 scalar on the device.
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
            # what GradScaler would tell AdamW: leave the weights alone if this is one
            self.opt.found_inf = (~finite).float()
            self.opt.grad_scale = None
            self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self._skipped = th.where(finite, self._skipped * self._in_total, self._skipped + 1)
        self._update_ema()
        self.steps += 1
        return norm

    @property
    def _in_total(self) -> th.Tensor:
        if not hasattr(self, "_in_total_cache"):
            self._in_total_cache = th.tensor([0, 1], device=self.device)
        return self._in_total_cache

    def _update_ema(self) -> None:
        weights = list(self.module.parameters())
        warm = (1 + self.steps) / (10 + self.steps)
        for rate, average in self.ema.items():
            update_ema(average, weights, min(rate, warm) if self.ema_warmup else rate)

    def skipped(self) -> tuple[int, int]:
        """Steps skipped in a row until now, and altogether. Waits for the device."""
        in_a_row, total = self._skipped.tolist()
        return in_a_row, total

    def loss_scale(self) -> float:
        """What float16 losses are multiplied by; 1 in other precisions. Waits for the device."""
        return self.scaler.get_scale()

    def weights_as_state_dict(self, weights: Sequence[th.Tensor] | None = None) -> dict[str, Any]:
        """The network's state_dict, with `weights` (an average, say) in place of its own."""
        state = self.module.state_dict()
        if weights is not None:
            state.update(zip((name for name, _ in self.module.named_parameters()), weights))
        return state

    @contextlib.contextmanager
    def averaged_weights(self, rate: float) -> Iterator[nn.Module]:
        """The network with its averaged weights, for as long as the context lasts."""
        own = [p.data for p in self.module.parameters()]
        training = self.module.training
        try:
            for parameter, average in zip(self.module.parameters(), self.ema[rate]):
                parameter.data = average
            yield self.module.eval()
        finally:
            for parameter, data in zip(self.module.parameters(), own):
                parameter.data = data
            self.module.train(training)

    def load_ema(self, rate: float, state: dict[str, th.Tensor]) -> None:
        """Take an averaged copy from a state_dict."""
        for (name, _), average in zip(self.module.named_parameters(), self.ema[rate]):
            average.copy_(state[name])

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Take AdamW's state, whichever implementation wrote it; learning rates stay ours."""
        groups = [{**g, "fused": True, "foreach": None} for g in state["param_groups"]]
        here = [len(g["params"]) for g in self.opt.param_groups]
        there = [len(g["params"]) for g in groups]
        ids = [i for g in groups for i in g["params"]]
        params = [p for g in self.opt.param_groups for p in g["params"]]
        if there != here or any(
            state["state"][i]["exp_avg"].shape != p.shape
            for i, p in zip(ids, params)
            if i in state["state"]
        ):
            raise UserError(
                f"the optimizer's state is of {there} tensors, the network has {here}, or their"
                " shapes differ: it belongs to another network or to float16 master weights of the"
                " original package; remove the opt file to start it afresh"
            )
        for theirs, ours in zip(groups, self.opt.param_groups):
            theirs.update({k: v for k, v in ours.items() if k not in ("params", "fused")})
        self.opt.load_state_dict({"state": state["state"], "param_groups": groups})

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides weights, averages and optimizer; plain values."""
        return {
            "steps": self.steps,
            "skipped": self._skipped.tolist(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._skipped = th.tensor(state["skipped"], device=self.device)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def annealed(lr: float, step: int, steps: int) -> float:
    """Linear decay to zero over `steps` steps; constant where `steps` is 0."""
    return lr * max(0.0, 1 - step / steps) if steps else lr


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 0, then half a cosine to 0 (arXiv 1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def first_not_finite(model: nn.Module, call: Any) -> str:
    """Name the first module whose output is not finite during `call()`; "" if all are."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
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
