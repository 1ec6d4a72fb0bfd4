"""The one diffusion training loop."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import blobfile as bf
import torch as th
from tqdm import tqdm

from . import dist_util, logger
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler
from .runtime import checkpoint, rng
from .runtime.errors import UserError
from .runtime.signals import StopRequest
from .stepper import Stepper, annealed, first_not_finite

Batch = tuple[th.Tensor, dict[str, th.Tensor]]


class Start(NamedTuple):
    """Where a run begins.

    step: optimisation steps already done. path: the model file to begin from, "" for random
    weights. state: what `stateN.pt` held, None for a checkpoint of the original package.
    """

    step: int = 0
    path: str = ""
    state: dict[str, Any] | None = None


def find_start(folder: str, resume_checkpoint: str = "") -> Start:
    """Where the run in `folder` goes on. Every rank must call it; rank 0 looks.

    :param resume_checkpoint: "auto" or "": the newest complete checkpoint in the folder, if any;
        "none": from the beginning; else a model or EMA file to begin from, unless the folder has
        a checkpoint that is further on, since then this is that run's command given again.
    :raises UserError: if the named file is missing, or if "none" would overwrite checkpoints.
    """
    return dist_util.broadcast_object(
        _find_start(folder, resume_checkpoint) if dist_util.is_main() else None
    )


def _find_start(folder: str, resume_checkpoint: str) -> Start:
    found = checkpoint.newest_state(folder)
    if resume_checkpoint == "none":
        if found:
            raise UserError(
                f"{folder} holds checkpoints up to step {found[0]}, which --resume_checkpoint none"
                " would overwrite: set OPENAI_LOGDIR to another folder"
            )
        return Start()
    start = Start()
    if found:
        step, state = found
        start = Start(step, bf.join(folder, checkpoint.step_name("model", step)), state)
    if resume_checkpoint in ("", "auto"):
        if not found and (strange := checkpoint.foreign_models(folder)):
            raise UserError(
                f"{folder} holds {strange[-1]} of another program: begin from it with"
                f" --resume_checkpoint {bf.join(folder, strange[-1])}, or set OPENAI_LOGDIR to"
                " another folder"
            )
        return start
    if not bf.exists(resume_checkpoint):
        raise UserError(f"--resume_checkpoint {resume_checkpoint}: there is no such file")
    step = parse_resume_step_from_filename(resume_checkpoint)
    if start.step > step:
        return start  # the command of this run, given again
    theirs = bf.dirname(resume_checkpoint)
    state = None
    if step in checkpoint.complete_steps(theirs) and not _is_ema(resume_checkpoint):
        state = checkpoint.read_state(theirs, step)
    return Start(step, resume_checkpoint, state)


def _is_ema(path: str) -> bool:
    return bf.basename(path).startswith("ema_")


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in names like `model010000.pt` and `ema_0.9999_010000.pt`; 0 if there is none."""
    match = re.search(r"(?:model|ema_[^_]+_)(\d+)\.pt$", bf.basename(filename))
    return int(match.group(1)) if match else 0


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
    return logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """The model file of the newest complete checkpoint in the run's folder."""
    folder = get_blob_logdir()
    return (folder and _find_start(folder, "").path) or None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The EMA file that belongs to a model file, if it exists."""
    if not main_checkpoint:
        return None
    name = checkpoint.step_name(checkpoint.ema_prefix(rate), step)
    path = bf.join(bf.dirname(main_checkpoint), name)
    return path if bf.exists(path) else None


def load_weights(model: th.nn.Module, path: str) -> None:
    """Give a network the weights in a file.

    :raises UserError: if they are another network's.
    """
    weights = checkpoint.load(path)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} does not fit the network that the flags describe: {reason}"
        ) from error


def log_loss_dict(diffusion: Any, ts: th.Tensor, losses: dict[str, th.Tensor]) -> None:
    """Log the mean of each loss term, over all and over each quarter of the timesteps."""
    quarters = (4 * ts.cpu().numpy() // diffusion.num_timesteps).clip(0, 3).tolist()
    for key, values in losses.items():
        values = values.detach()
        logger.logkv_mean(key, values.mean(), len(values))
        for quarter in set(quarters):
            # picked on the CPU: an index tensor would wait for the device
            chosen = [value for value, q in zip(values.unbind(), quarters) if q == quarter]
            logger.logkv_mean(f"{key}_q{quarter}", th.stack(chosen).mean(), len(chosen))


class TrainLoop:
    """Trains a network to denoise.

    All randomness is a function of (seed, step, number of the image in the global batch), so the
    weights do not depend on the number of ranks, on microbatches or on restarts (but for dropout,
    which depends on the first two, and for rounding).

    :param model: float32 network on its device.
    :param diffusion: the diffusion process.
    :param data: iterator over (images `[B x C x H x W]` in [-1, 1], dict of `[B x ...]` model
        arguments), or a function from the first step to such an iterator, which lets a resumed
        run see the images that would have followed.
    :param batch_size: images a rank and step.
    :param microbatch: images a forward pass; -1 for all at once.
    :param lr: learning rate of AdamW.
    :param ema_rate: rates of the averaged weights, a number or "0.999,0.9999".
    :param log_interval: steps between rows of the log.
    :param save_interval: steps between checkpoints.
    :param resume_checkpoint: see `find_start`; or its result.
    :param use_fp16: the original's spelling of `precision="fp16"`.
    :param fp16_scale_growth: growth of log2 of the float16 loss scale a step.
    :param schedule_sampler: which timesteps to train on; uniform by default.
    :param weight_decay: of AdamW.
    :param lr_anneal_steps: the learning rate falls linearly to zero over these steps, which ends
        the run; 0 for a constant one.
    :param precision: fp32, fp16 or bf16.
    :param seed: of all randomness.
    :param max_steps: ends the run; 0 for no end but annealing's.
    :param max_grad_norm: see Stepper.
    :param ema_warmup: see Stepper.
    :param keep_checkpoints: newest checkpoints to keep; 0 for all.
    :param max_skipped_steps: steps in a row without a finite gradient after which the run stops.
    :param save_initial: also save at step 0.
    :param sample_interval: steps between calls of `sample_fn`; 0 for none.
    :param sample_fn: called as `sample_fn(network with averaged weights, step)` on rank 0.
    :param progress: show a progress bar on rank 0.
    :param compile: compile the network as one graph (torch.compile); checkpoints stay the same.
    """

    def __init__(
        self,
        *,
        model: th.nn.Module,
        diffusion: Any,
        data: Iterator[Batch] | Callable[[int], Iterator[Batch]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str | Start,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        precision: str = "",
        seed: int = 0,
        max_steps: int = 0,
        max_grad_norm: float = 0.0,
        ema_warmup: bool = True,
        keep_checkpoints: int = 0,
        max_skipped_steps: int = 100,
        save_initial: bool = False,
        sample_interval: int = 0,
        sample_fn: Callable[[th.nn.Module, int], None] | None = None,
        progress: bool = False,
        compile: bool = False,
    ):
        self.diffusion = diffusion
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.global_batch = batch_size * dist_util.world_size()
        self.lr = lr
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps = lr_anneal_steps
        self.max_steps = max_steps or lr_anneal_steps
        self.seed = seed
        self.keep_checkpoints = keep_checkpoints
        self.max_skipped_steps = max_skipped_steps
        self.save_initial = save_initial
        self.sample_interval = sample_interval
        self.sample_fn = sample_fn
        self.progress = progress
        self.stopped_by: str | None = None

        if hasattr(model, "convert_to_fp32"):
            model.convert_to_fp32()  # autocast takes the place of float16 inside the network
        self.ema_rates = parse_ema_rates(ema_rate)
        start = resume_checkpoint
        if not isinstance(start, Start):
            start = find_start(get_blob_logdir(), resume_checkpoint)
        if start.path:
            load_weights(model, start.path)
        if compile:
            model.compile(fullgraph=True)
        self.stepper = Stepper(
            model,
            lr=lr,
            weight_decay=weight_decay,
            precision=precision or ("fp16" if use_fp16 else "fp32"),
            scale_growth_interval=round(1 / max(fp16_scale_growth, 1e-6)),
            max_grad_norm=max_grad_norm,
            ema_rates=list(self.ema_rates.values()),
            ema_warmup=ema_warmup,
        )
        self.device = self.stepper.device
        self.step = self._saved_step = start.step
        self._resume(start)
        self.data = data(self.step) if callable(data) else data
        self._last_batch: Batch | None = None

    @property
    def model(self) -> th.nn.Module:
        return self.stepper.module

    def _resume(self, start: Start) -> None:
        """Bring averages, optimizer, sampler and log to where the checkpoint left them."""
        if not start.path:
            return
        logger.log(f"going on from {start.path} at step {start.step}")
        if _is_ema(start.path):
            logger.log("averaged weights: they start the network and its averages, AdamW anew")
            for rate in self.ema_rates.values():
                self.stepper.load_ema(rate, self.model.state_dict())
            self.stepper.steps = start.step
            return
        for name, rate in self.ema_rates.items():
            path = find_ema_checkpoint(start.path, start.step, name)
            source = checkpoint.load(path) if path else self.model.state_dict()
            if not path:
                logger.log(f"no averaged weights of rate {name} there: starting from the model's")
            self.stepper.load_ema(rate, source)
        opt = bf.join(bf.dirname(start.path), checkpoint.step_name("opt", start.step))
        if bf.exists(opt):
            self.stepper.load_optimizer(checkpoint.load(opt))
        else:
            logger.log(f"no optimizer state {opt}: AdamW starts anew")
        self.stepper.steps = start.step
        if start.state is not None:
            self.stepper.load_state_dict(start.state["stepper"])
            self.schedule_sampler.load_state_dict(start.state["sampler"])
            ranks = dist_util.rank(), dist_util.world_size()
            logger.set_pending(logger.pending_of_rank(start.state.get("pending", ()), *ranks))
            for name in ("seed", "global_batch"):
                now = getattr(self, name)
                if (before := start.state.get(name, now)) != now:
                    logger.log(f"{name} was {before} and is now {now}: other images follow")

    def run_loop(self) -> None:
        """Train until `max_steps`, or until a signal: then `stopped_by` names it."""
        with StopRequest() as stop, self._progress_bar() as bar:
            if self.save_initial and self.step == 0:
                self.save()
            agreement = dist_util.Agreement()
            since = time.perf_counter()
            self._since_step = self.step
            while not self.max_steps or self.step < self.max_steps:
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                bar.update()
                if self.device.type == "cpu" or self.step % self.log_interval == 0:
                    self._check_skipped()
                if self.step % self.log_interval == 0:
                    since = self._log_speed(since)
                    row = logger.dumpkvs()
                    if "loss" in row:
                        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if self.sample_interval and self.step % self.sample_interval == 0:
                    self._sample()
                if self.step % self.save_interval == 0:
                    self.save()
                # agreed a step late, so that no rank waits for the others' answers
                asked = agreement.result()
                agreement.post(int(stop.requested is not None))
                if asked:
                    self.stopped_by = stop.requested or "a signal on another rank"
                    break
            if self._saved_step != self.step:
                self.save()
            logger.flush()

    def _progress_bar(self) -> tqdm:
        shown = self.progress and dist_util.is_main()
        return tqdm(
            total=self.max_steps or None,
            initial=self.step,
            unit="step",
            disable=not shown,
            mininterval=0.5 if sys.stderr.isatty() else 60,
            dynamic_ncols=True,
        )

    def _log_speed(self, since: float) -> float:
        now = time.perf_counter()
        steps = self.step - self._since_step
        if steps:
            logger.logkv("seconds_per_step", (now - since) / steps)
            logger.logkv("images_per_second", steps * self.global_batch / (now - since))
        self._since_step = self.step
        total = self.stepper.skipped()[1]
        logger.logkv("skipped_steps", total)
        if self.stepper.precision == "fp16":
            logger.logkv("loss_scale", self.stepper.loss_scale())
        if self.device.type == "cuda":
            logger.logkv("peak_memory_gib", th.cuda.max_memory_allocated() / 2**30)
        return now

    def run_step(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """One optimisation step on `[B x C x H x W]` images in [-1, 1]."""
        self._last_batch = batch, cond
        self.forward_backward(batch, cond)
        lr = annealed(self.lr, self.step, self.lr_anneal_steps)
        norm = self.stepper.step(lr)
        logger.logkv_mean("grad_norm", norm, len(batch))
        logger.logkv("lr", lr)
        self.step += 1
        self.log_step()

    def forward_backward(self, batch: th.Tensor, cond: dict[str, th.Tensor]) -> None:
        """Accumulate the gradient of the mean loss over the batch, microbatch by microbatch."""
        for first in range(0, len(batch), self.microbatch):
            rows = slice(first, first + self.microbatch)
            is_last = rows.stop >= len(batch)
            share = len(batch[rows]) / len(batch)
            context = contextlib.nullcontext() if is_last else self.stepper.no_sync()
            with context:
                ts, weights, losses = self.losses(self.stepper.model, batch, cond, rows)
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(ts, losses["loss"].detach())
                log_loss_dict(self.diffusion, ts, losses)
                self.stepper.backward((losses["loss"] * weights).mean() * share)

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
        draws = rng.uniforms(self.seed, "timestep", indices)
        ts, weights = self.schedule_sampler.sample(len(indices), "cpu", draws)
        images = batch[rows].to(self.device, non_blocking=True)
        kwargs = {k: v[rows].to(self.device, non_blocking=True) for k, v in cond.items()}
        noise = rng.normal(self.seed, "noise", indices, images.shape[1:], self.device)
        th.manual_seed(
            rng.derive_seed(self.seed, "dropout", self.step, dist_util.rank(), rows.start)
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
        """What is to be minimised, "loss" `[N]`, and other terms `[N]` to be logged.

        :param images: `[N x C x H x W]` in [-1, 1]; :param ts: `[N]` timesteps.
        :param kwargs: the network's further arguments; :param noise: like `images`.
        """
        return self.diffusion.training_losses(model, images, ts, kwargs, noise)

    def log_step(self) -> None:
        """Note how far the run is."""
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.global_batch)

    def _check_skipped(self) -> None:
        in_a_row, _ = self.stepper.skipped()
        if in_a_row >= self.max_skipped_steps > 0:
            raise UserError(self._diagnosis(in_a_row))

    def _diagnosis(self, in_a_row: int) -> str:
        """Where numbers stop being finite. Skipped steps left the weights as they were, so the
        last batch fails as the first did. Collective."""
        batch, cond = self._last_batch
        self.step -= 1
        starts = range(0, len(batch), self.microbatch)
        found = (self._not_finite(batch, cond, slice(s, s + self.microbatch)) for s in starts)
        origins = dist_util.all_gather_object(next(filter(None, found), ""))
        self.step += 1
        origin = next(filter(None, origins), "the last batch, taken again, is finite")
        newest = checkpoint.complete_steps(get_blob_logdir())
        kept = f"the last good checkpoint is at step {newest[-1]}" if newest else "none was saved"
        return (
            f"no finite gradient in {in_a_row} steps in a row, since step {self.step - in_a_row}:"
            f" {origin}; {kept}. Lower --lr, set --max_grad_norm, or train in bf16 or fp32"
        )

    def _not_finite(self, batch: th.Tensor, cond: dict[str, th.Tensor], rows: slice) -> str:
        """The loss terms and the layer of a microbatch that are not finite; "" if all are."""
        terms: dict[str, th.Tensor] = {}

        def forward() -> None:
            terms.update(self.losses(self.model, batch, cond, rows)[2])

        layer = first_not_finite(self.model, forward)
        bad = [name for name, value in terms.items() if not th.isfinite(value).all()]
        where = f"loss terms {', '.join(bad)}" if bad else "all loss terms finite"
        if layer:
            return f"{where}; layer {layer} put out the first number that is not finite"
        loss = self.stepper.scaler.scale(terms["loss"].mean())
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        grads = th.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        broken = [
            name
            for (name, _), grad in zip(named, grads)
            if grad is not None and not th.isfinite(grad).all()
        ]
        if broken:
            return f"{where}; all layers finite, the gradient not from {broken[-1]} backwards"
        return f"{where}; all layers finite" if bad else ""

    def _sample(self) -> None:
        if self.sample_fn is None or not dist_util.is_main():
            return
        rate = max(self.ema_rates.values(), default=None)
        context = (
            contextlib.nullcontext(self.model)
            if rate is None
            else self.stepper.averaged_weights(rate)
        )
        with context as network, th.no_grad(), self.stepper.autocast():
            self.sample_fn(network, self.step)

    def save(self) -> None:
        """Write a complete checkpoint; prune old ones. Collective."""
        logger.flush()
        pending = dist_util.all_gather_object(logger.get_pending())
        if dist_util.is_main():
            parts = {"model": self.stepper.weights_as_state_dict()}
            for name, rate in self.ema_rates.items():
                averages = self.stepper.ema[rate]
                parts[checkpoint.ema_prefix(name)] = self.stepper.weights_as_state_dict(averages)
            parts["opt"] = self.stepper.opt.state_dict()
            state = {
                "seed": self.seed,
                "global_batch": self.global_batch,
                "stepper": self.stepper.state_dict(),
                "sampler": self.schedule_sampler.state_dict(),
                "pending": pending,
            }
            checkpoint.save_step(get_blob_logdir(), self.step, parts, state)
            checkpoint.prune(get_blob_logdir(), self.keep_checkpoints, self.step)
            logger.log(f"saved {bf.join(get_blob_logdir(), f'model{self.step:06d}.pt')}")
        self._saved_step = self.step
        dist_util.barrier()
