"""The one diffusion training loop."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import blobfile as bf
import torch as th

from . import dist_util, logger
from .gaussian_diffusion import GaussianDiffusion
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler
from .runtime import rng
from .runtime.command_line.loop_config import LoopConfig
from .runtime.command_line.precision_flag import AUTO
from .runtime.errors import UserError
from .runtime.progress import progress_bar
from .runtime.signals import StopRequest
from .runtime.storage import checkpoint
from .runtime.storage.resume import (  # noqa: F401 - parse_resume_step_from_filename is public here
    Start,
    find_ema_checkpoint,
    is_ema,
    locate_start,
    parse_resume_step_from_filename,
)
from .stepper import Stepper, annealed, first_not_finite

_SAVE, _STOP = 1, 2  # what a rank asks all for; the greatest counts

Batch = tuple[th.Tensor, dict[str, th.Tensor]]


def find_start(folder: str, resume_checkpoint: str = "") -> Start:
    """`locate_start` on rank 0, for all ranks. Collective."""
    return dist_util.broadcast_object(
        locate_start(folder, resume_checkpoint) if dist_util.is_main() else None
    )


def parse_ema_rates(rates: float | str) -> dict[str, float]:
    """Rates by the names that they have in file names: "0.999, 0.9990" to {"0.999": 0.999}."""
    try:
        values = [float(rate) for rate in str(rates).split(",") if rate.strip()]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"--ema_rate {rates}: expected numbers between 0 and 1, as in 0.999,0.9999")
    return {str(value): value for value in values}


def get_blob_logdir() -> str:
    """The folder of the run's checkpoints: the logger's."""
    return logger.get_dir() or ""


def find_resume_checkpoint() -> str | None:
    """The model file of the newest complete checkpoint in the run's folder."""
    folder = get_blob_logdir()
    return locate_start(folder).path or None if folder else None


def log_loss_dict(
    diffusion: GaussianDiffusion, ts: th.Tensor, losses: dict[str, th.Tensor]
) -> None:
    """Log the mean of each loss term, over all and over each quarter of the timesteps."""
    quarters = (4 * ts.cpu().numpy() // diffusion.num_timesteps).clip(0, 3).tolist()
    for key, values in losses.items():
        values = values.detach()
        logger.logkv_mean(key, values.mean(), len(values))
        for quarter in set(quarters):
            # selected on the CPU: indexing by a tensor would wait for the device
            chosen = [value for value, q in zip(values.unbind(), quarters) if q == quarter]
            logger.logkv_mean(f"{key}_q{quarter}", th.stack(chosen).mean(), len(chosen))


class TrainLoop:
    """Trains a network to denoise.

    All randomness is a function of (seed, step, index of the image in the global batch), so the
    weights do not depend on the number of ranks, on microbatches or on restarts (except through
    dropout, which depends on the first two, and through rounding).

    :param model: float32 network on its device.
    :param diffusion: the diffusion process.
    :param data: iterator over (images `[B x C x H x W]` in [-1, 1], dict of `[B x ...]` model
        arguments), or a function from the first step to such an iterator, with which a resumed
        run sees the images that would have followed.
    :param settings: see LoopConfig; by default its own, without clipping, as in the original.
        The arguments before it, which are the original's, and `fields` replace fields of it.
        A precision that they leave open is fp32 here: commands have chosen one before.
    :param use_fp16: the original's spelling of `precision="fp16"`.
    :param schedule_sampler: which timesteps to train on; uniform by default.
    :param folder: where checkpoints are written; by default `get_blob_logdir()`.
    :param start: where to begin; by default found by `find_start` in the folder.
    :param sample_fn: called as `sample_fn(network with averaged weights, step)` on rank 0, every
        `sample_interval` steps.
    :param probe_fn: called likewise every `probe_interval` steps, and at the end; what it logs is
        in the row of that step. The other ranks go on meanwhile, to their next collective call.
    :param probe_interval: 0: never; the same on all ranks.
    :param progress: show a progress bar on rank 0.
    :param wrapper: see Stepper.
    """

    def __init__(
        self,
        *,
        model: th.nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterator[Batch] | Callable[[int], Iterator[Batch]],
        batch_size: int | None = None,
        microbatch: int | None = None,
        lr: float | None = None,
        ema_rate: float | str | None = None,
        log_interval: int | None = None,
        save_interval: int | None = None,
        resume_checkpoint: str | None = None,
        use_fp16: bool = False,
        fp16_scale_growth: float | None = None,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float | None = None,
        lr_anneal_steps: int | None = None,
        settings: LoopConfig | None = None,
        folder: str = "",
        start: Start | None = None,
        sample_fn: Callable[[th.nn.Module, int], None] | None = None,
        probe_fn: Callable[[th.nn.Module, int], None] | None = None,
        probe_interval: int = 0,
        progress: bool = False,
        wrapper: th.nn.Module | None = None,
        **fields: Any,
    ):
        names = {f.name for f in dataclasses.fields(LoopConfig)}
        fields |= {k: v for k, v in locals().items() if k in names and v is not None}
        settings = dataclasses.replace(settings or LoopConfig(max_grad_norm=0.0), **fields)
        self.settings = settings
        self.folder = folder or get_blob_logdir()
        self.diffusion = diffusion
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.sample_fn = sample_fn
        self.probe_fn = probe_fn
        self.probe_interval = probe_interval
        self.progress = progress
        self.microbatch = settings.microbatch if settings.microbatch > 0 else settings.batch_size
        self.global_batch = settings.batch_size * dist_util.world_size()
        self.max_steps = settings.max_steps or settings.lr_anneal_steps
        self.ema_rates = parse_ema_rates(settings.ema_rate)
        self.stopped_by: str | None = None

        # autocast takes the place of float16 inside the network
        if callable(to_float32 := getattr(model, "convert_to_fp32", None)):
            to_float32()
        if start is None:
            start = find_start(self.folder, settings.resume_checkpoint)
        if start.path:
            checkpoint.load_weights(model, start.path)
        if settings.compile:
            model.compile(fullgraph=True)
        self.stepper = Stepper(
            model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            precision=("fp16" if use_fp16 else "fp32")
            if settings.precision in AUTO
            else settings.precision,
            scale_growth_interval=round(1 / max(settings.fp16_scale_growth, 1e-6)),
            max_grad_norm=settings.max_grad_norm,
            ema_rates=list(self.ema_rates.values()),
            ema_warmup=settings.ema_warmup,
            wrapper=wrapper,
        )
        self.device = self.stepper.device
        self.step = self._saved_step = start.step
        self._saved_at = time.monotonic()
        self._passing: list[int] = []  # steps of checkpoints that the next one replaces
        self._resume(start)
        self.data = data(self.step) if callable(data) else data

    @property
    def model(self) -> th.nn.Module:
        return self.stepper.module

    def _resume(self, start: Start) -> None:
        """Restore averages, optimizer, sampler and log from the checkpoint."""
        if not start.path:
            return
        logger.log(f"resuming from {start.path} at step {start.step}")
        self.stepper.steps = start.step
        if is_ema(start.path):
            logger.log("averaged weights: network and averages start from them, AdamW from scratch")
            for rate in self.ema_rates.values():
                self.stepper.load_ema(rate, self.model.state_dict())
            return
        for name, rate in self.ema_rates.items():
            path = find_ema_checkpoint(start.path, start.step, name)
            if path is None:
                logger.log(f"no averaged weights of rate {name} beside it: starting from its own")
            self.stepper.load_ema(rate, checkpoint.load(path) if path else self.model.state_dict())
        opt = bf.join(bf.dirname(start.path), checkpoint.step_name("opt", start.step))
        if bf.exists(opt):
            self.stepper.load_optimizer(checkpoint.load(opt))
        else:
            logger.log(f"no optimizer state {opt}: AdamW starts from scratch")
        if start.state is not None:
            self._restore(start.state)
            if bf.dirname(start.path) == bf.dirname(bf.join(self.folder, "model.pt")):
                self._passing = list(start.state.get("passing", ()))

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore what `stateN.pt` holds; warn where other images follow than would have."""
        self.stepper.load_state_dict(state["stepper"])
        self.schedule_sampler.load_state_dict(state["sampler"])
        ranks = dist_util.rank(), dist_util.world_size()
        logger.set_pending(logger.pending_of_rank(state.get("pending", ()), *ranks))
        for name, now in (("seed", self.settings.seed), ("global_batch", self.global_batch)):
            if (before := state.get(name, now)) != now:
                logger.log(
                    f"{name} was {before} and is now {now}: training continues on other images"
                )

    def run_loop(self) -> None:
        """Train until `max_steps`, or until a signal: then `stopped_by` names it."""
        settings = self.settings
        shown_steps = (self.max_steps or None) if self.progress else 0
        with StopRequest() as stop, progress_bar(shown_steps, initial=self.step) as bar:
            if settings.save_initial and self.step == 0:
                self.save()
            agreement = dist_util.Agreement()
            since = self.step, time.perf_counter()
            while not self.max_steps or self.step < self.max_steps:
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                bar.update()
                if self.device.type == "cpu" or self.step % settings.log_interval == 0:
                    self._check_skipped(batch, cond)
                probing = self._probes_now()
                if probing:
                    self._call_with_averages(self.probe_fn)
                if probing or self.step % settings.log_interval == 0:
                    since = self._log_speed(*since)
                    row = logger.dumpkvs()
                    if "loss" in row:
                        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if settings.sample_interval and self.step % settings.sample_interval == 0:
                    self._call_with_averages(self.sample_fn)
                if self.step % settings.save_interval == 0:
                    self.save()
                # agreed a step late, so that no rank waits for the others' answers
                agreed = agreement.result()
                if agreed == _SAVE and self.step not in (self._saved_step, self.max_steps):
                    self.save(passing=True)
                agreement.post(_STOP if stop.requested is not None else self._save_due())
                if agreed == _STOP:
                    self.stopped_by = stop.requested or "a signal on another rank"
                    break
            if self._saved_step != self.step:
                self.save()
            logger.flush()

    def _save_due(self) -> int:
        """_SAVE if rank 0, whose clock counts, has not saved for `save_minutes`; else 0."""
        since, minutes = time.monotonic() - self._saved_at, self.settings.save_minutes
        return _SAVE if minutes and since >= 60 * minutes and dist_util.is_main() else 0

    def _log_speed(self, step: int, began: float) -> tuple[int, float]:
        """Log speed since `step`, at the time `began`, and memory; returns now's step and time."""
        now = time.perf_counter()
        logger.logkv("seconds_per_step", (now - began) / (self.step - step))
        images = (self.step - step) * self.global_batch
        logger.logkv("images_per_second", images / (now - began))
        logger.logkv("skipped_steps", self.stepper.skipped()[1])
        if self.stepper.precision == "fp16":
            logger.logkv("loss_scale", self.stepper.loss_scale())
        if self.device.type == "cuda":
            logger.logkv("peak_memory_gib", th.cuda.max_memory_allocated() / 2**30)
        return self.step, now

    def run_step(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """One optimisation step on `[B x C x H x W]` images in [-1, 1]."""
        self.forward_backward(batch, cond)
        lr = annealed(self.settings.lr, self.step, self.settings.lr_anneal_steps)
        norm = self.stepper.step(lr)
        logger.logkv_mean("grad_norm", norm, len(batch))
        logger.logkv("lr", lr)
        self.step += 1
        self.log_step()

    def forward_backward(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """Accumulate the gradient of the mean loss over the batch, microbatch by microbatch."""
        drawn = []
        for first in range(0, len(batch), self.microbatch):
            rows = slice(first, first + self.microbatch)
            with contextlib.nullcontext() if rows.stop >= len(batch) else self.stepper.no_sync():
                ts, weights, losses = self.losses(self.stepper.model, batch, cond, rows)
                drawn.append((ts, losses["loss"].detach()))
                log_loss_dict(self.diffusion, ts, losses)
                self.stepper.backward((losses["loss"] * weights).mean() * (len(ts) / len(batch)))
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(*map(th.cat, zip(*drawn)))

    def losses(
        self,
        model: th.nn.Module,
        batch: th.Tensor,
        cond: dict[str, th.Tensor],
        rows: slice,
    ) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """Timesteps (on the CPU), importance weights and loss terms of some rows of a batch."""
        count = len(batch)
        offset = self.step * self.global_batch + dist_util.rank() * count
        indices = range(offset, offset + count)[rows]
        draws = rng.uniforms(self.settings.seed, "timestep", indices)
        ts, weights = self.schedule_sampler.sample(len(indices), "cpu", draws)
        images = batch[rows].to(self.device, non_blocking=True)
        kwargs = {k: v[rows].to(self.device, non_blocking=True) for k, v in cond.items()}
        noise = rng.normal(self.settings.seed, "noise", indices, images.shape[1:], self.device)
        th.manual_seed(
            rng.derive_seed(self.settings.seed, "dropout", self.step, dist_util.rank(), rows.start)
        )
        steps = ts.to(self.device, non_blocking=True)
        with self.stepper.autocast():
            terms = self.loss_terms(model, images, steps, kwargs, noise)
        return ts, weights.to(self.device, non_blocking=True), terms

    def loss_terms(
        self,
        model: th.nn.Module,
        images: th.Tensor,
        ts: th.Tensor,
        kwargs: dict[str, th.Tensor],
        noise: th.Tensor,
    ) -> dict[str, th.Tensor]:
        """The loss to minimise, "loss" `[N]`, and other terms `[N]` to log.

        :param images: `[N x C x H x W]` in [-1, 1].
        :param ts: `[N]` timesteps.
        :param kwargs: the network's further arguments.
        :param noise: like `images`.
        """
        return self.diffusion.training_losses(model, images, ts, kwargs, noise)

    def log_step(self) -> None:
        """Log the steps done and the images seen."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.global_batch)

    def _check_skipped(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """Stop after too many consecutive steps without a finite gradient. Collective then.

        Skipped steps left the weights as they were, so the last batch fails as the first did.

        :raises UserError: saying where numbers stop being finite.
        """
        in_a_row, _ = self.stepper.skipped()
        if not in_a_row >= self.settings.max_skipped_steps > 0:
            return
        self.step -= 1
        starts = range(0, len(batch), self.microbatch)
        found = (self._not_finite(batch, cond, slice(s, s + self.microbatch)) for s in starts)
        origins = dist_util.all_gather_object(next(filter(None, found), ""))
        self.step += 1
        origin = next(filter(None, origins), "the last batch, computed again, is finite")
        newest = checkpoint.complete_steps(self.folder)
        kept = f"the last good checkpoint is at step {newest[-1]}" if newest else "none was saved"
        raise UserError(
            f"no finite gradient in {in_a_row} steps in a row, since step {self.step - in_a_row}:"
            f" {origin}; {kept}. Lower --lr, set --max_grad_norm, or train in bf16 or fp32"
        )

    def _not_finite(self, batch: th.Tensor, cond: dict[str, th.Tensor], rows: slice) -> str:
        """The loss terms and the layer of a microbatch that are not finite; "" if all are."""
        terms: dict[str, th.Tensor] = {}

        def forward() -> None:
            terms.update(self.losses(self.stepper.wrapper, batch, cond, rows)[2])

        layer = first_not_finite(self.stepper.wrapper, forward)
        bad = [name for name, value in terms.items() if not th.isfinite(value).all()]
        where = f"loss terms {', '.join(bad)}" if bad else "all loss terms finite"
        if layer:
            return f"{where}; layer {layer} is the first whose output is not finite"
        loss = self.stepper.scaler.scale(terms["loss"].mean())
        named = [(n, p) for n, p in self.stepper.wrapper.named_parameters() if p.requires_grad]
        grads = th.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        broken = [
            name
            for (name, _), grad in zip(named, grads)
            if grad is not None and not th.isfinite(grad).all()
        ]
        if broken:
            return f"{where}; all layers finite, but not the gradient from {broken[-1]} backwards"
        return f"{where}; all layers finite" if bad else ""

    def _probes_now(self) -> bool:
        """Whether this step is one to probe at, the last one included."""
        if not self.probe_interval:
            return False
        return self.step % self.probe_interval == 0 or self.step == self.max_steps

    def _call_with_averages(self, function: Callable[[th.nn.Module, int], None] | None) -> None:
        """On rank 0, call `sample_fn` or `probe_fn` with the network of averaged weights."""
        if function is None or not dist_util.is_main():
            return
        rate = max(self.ema_rates.values(), default=None)
        context = (
            contextlib.nullcontext(self.model)
            if rate is None
            else self.stepper.averaged_weights(rate)
        )
        with context as network, th.no_grad(), self.stepper.autocast():
            function(network, self.step)

    def save(self, passing: bool = False) -> None:
        """Write a complete checkpoint; prune old ones. Collective.

        :param passing: the next checkpoint replaces it.
        """
        logger.flush()
        pending = dist_util.all_gather_object(logger.get_pending())
        if dist_util.is_main():
            parts = {"model": self.stepper.weights_as_state_dict()}
            for name, rate in self.ema_rates.items():
                averages = self.stepper.ema[rate]
                parts[checkpoint.ema_prefix(name)] = self.stepper.weights_as_state_dict(averages)
            parts["opt"] = self.stepper.optimizer_state()
            state = {
                "seed": self.settings.seed,
                "global_batch": self.global_batch,
                "stepper": self.stepper.state_dict(),
                "sampler": self.schedule_sampler.state_dict(),
                "pending": pending,
            }
            replaced = [step for step in self._passing if step != self.step]
            self._passing = [self.step] if passing else []
            state["passing"] = [*replaced, *self._passing]
            checkpoint.save_step(self.folder, self.step, parts, state)
            for step in replaced:
                checkpoint.remove_step(self.folder, step)
            checkpoint.prune(self.folder, self.settings.keep_checkpoints, self.step)
            logger.log(f"saved {bf.join(self.folder, f'model{self.step:06d}.pt')}")
        self._saved_step, self._saved_at = self.step, time.monotonic()
        dist_util.barrier()
