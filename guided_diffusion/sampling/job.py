"""Sampling a folder of images from a trained network, as every sampling script does.

Each image is a function of the seed and its index alone. Finished images are kept as PNG files, so
an interrupted command resumes with the missing ones, at any batch size and number of ranks. The
folder's `sampling.json` records the settings that determine the images.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.images.image_io import read_image, write_image
from guided_diffusion.networks.compiled import compiled
from guided_diffusion.networks.config import ClassifierConfig
from guided_diffusion.networks.precision import (
    Choice,
    check_precision,
    choose_for,
    default_of_all_ranks,
    in_precision,
)
from guided_diffusion.networks.trained import Trained
from guided_diffusion.runtime import messages
from guided_diffusion.runtime.command_line.precision_flag import AUTO
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.signals import EXIT_STOPPED, StopRequest
from guided_diffusion.runtime.storage import checkpoint, packed, run_lock
from guided_diffusion.runtime.storage.files import (
    check_output,
    save_json,
    write_atomically,
    writing,
)
from guided_diffusion.sampling.choices import Labels, choose_sampler, parse_labels
from guided_diffusion.sampling.config import DEFAULT_STEPS, SampleConfig
from guided_diffusion.sampling.folder import SETTINGS_NAME, samples_folder, stored_images
from guided_diffusion.sampling.guidance import ClassifierFree
from guided_diffusion.sampling.images import sample_images, to_uint8
from guided_diffusion.sampling.pictures import image_grid, write_gif
from guided_diffusion.sampling.solvers import SamplerOptions, StepReport

# suggest a faster sampler when every timestep is visited and there are more than this
_MANY_STEPS = 100
_GRID_IMAGES = 64
# images and steps shown in process.png
_PROCESS_IMAGES = 4
_PROCESS_STEPS = 12


def identity_of(trained: Trained) -> dict[str, Any]:
    """Everything about a checkpoint that determines its samples, as plain values."""
    return {
        "name": bf.basename(trained.path),
        **checkpoint.file_fingerprint(packed.weights_file(trained.path)),
        "half": trained.model.use_fp16 and dist_util.dev().type == "cuda",
        "network": dataclasses.asdict(trained.model),
        "diffusion": dataclasses.asdict(trained.diffusion),
    }


def as_flags_say(trained: Trained, settings: SampleConfig) -> Trained:
    """The checkpoint without half precision of its own where --precision names another."""
    if settings.precision in AUTO or not trained.model.use_fp16:
        return trained
    name = "classifier_use_fp16" if isinstance(trained.model, ClassifierConfig) else "use_fp16"
    changed: dict[str, Any] = {name: False}
    return dataclasses.replace(trained, model=dataclasses.replace(trained.model, **changed))


def class_labels(settings: SampleConfig, trained: Trained) -> Labels | None:
    """The classes to sample; None if the network is not class-conditional.

    :raises UserError: if the flags name a class that the network does not have.
    """
    if trained.model.class_cond:
        return parse_labels(
            settings.class_labels, trained.classes, trained.model.num_classes, settings.seed
        )
    if settings.class_labels:
        raise UserError(f"--class_labels: {trained.path} is of a network without classes")
    return None


def guided(
    network: Callable[..., th.Tensor], settings: SampleConfig, trained: Trained
) -> Callable[..., th.Tensor]:
    """The network, with classifier-free guidance if the flags ask for it.

    :raises UserError: if the network was not trained for it.
    """
    if settings.guidance_scale == 1:
        return network
    if not trained.model.cond_drop_prob:
        raise UserError(
            f"--guidance_scale {settings.guidance_scale}: {trained.path} was trained without"
            " --cond_drop_prob, which classifier-free guidance requires"
        )
    return ClassifierFree(network, settings.guidance_scale, trained.model.num_classes)


class _Stopped(Exception):
    """A signal arrived in the middle of a batch."""


@dataclasses.dataclass
class SampleJob:
    """Images to sample into a folder.

    settings: the flags. trained: the checkpoint. model: the network or a wrapper around it, called
    as (x, timesteps, **conditions). labels: the classes of the images, None if there are none.
    conditions: maps image indices to further arguments of the model. cond_fn: classifier
    gradient, see `solvers.SamplerOptions`. also: further settings that determine the images,
    recorded in `sampling.json`. names: file names of the images, which then go to `IMG`; by default
    images are numbered and go to `png`. prepare: called with the folder before sampling, on the
    main rank. defaults: what to tell a user who left open what is sampled.
    """

    settings: SampleConfig
    trained: Trained
    model: Callable[..., th.Tensor]
    labels: Labels | None = None
    conditions: Callable[[Sequence[int]], dict[str, th.Tensor]] | None = None
    cond_fn: Callable[..., th.Tensor] | None = None
    also: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    prepare: Callable[[str], None] | None = None
    defaults: str = ""

    def __post_init__(self) -> None:
        if self.settings.compile:
            self.model = compiled(self.model)
        self.precision = self.settings.precision
        if self.precision in AUTO:
            self.precision = "fp32"  # until `run` has seen the folder
        check_precision(self.precision, dist_util.dev())
        self.diffusion = self.trained.diffusion.build()
        self.sampler, self.steps = choose_sampler(self.settings, self.diffusion)
        size = self.trained.model.image_size
        self.shape = (self.trained.model.in_channels, size, size)

    def run(self) -> int:
        """Sample the missing images and write all results; returns the exit code."""
        folder, self.precision, note = self._open_folder()
        for line in filter(None, (self.defaults, note)):
            _say(line)
        pending = dist_util.broadcast_object(self._pending(folder) if _is_main() else None)
        _say(self._announcement(folder, len(pending)))
        stopped = self._sample(folder, pending)
        if stopped:
            _say(f"stopped by {stopped}: rerun the command to resume")
            return EXIT_STOPPED
        dist_util.barrier()
        if _is_main():
            self._write_results(folder)
            print(f"results: {folder}")
        return 0

    def identity(self) -> dict[str, Any]:
        """The settings that determine the images; not how many there are, nor the batch size."""
        settings = self.settings
        return {
            "checkpoint": identity_of(self.trained),
            "sampler": self.sampler,
            "steps": self.steps,
            "eta": settings.eta,
            "clip_denoised": settings.clip_denoised,
            "seed": settings.seed,
            "class_labels": list(self.labels.chosen) if self.labels else [],
            "guidance_scale": settings.guidance_scale,
            # absent: fp32, as in the folders of older versions
            **({} if self.precision == "fp32" else {"precision": self.precision}),
            **self.also,
        }

    def _open_folder(self) -> tuple[str, str, str]:
        """Create the results folder and record the settings in it.

        :return: its path, the precision of its images, and a line about that or "".
        """
        settled = None
        default = default_of_all_ranks()
        if _is_main():
            folder = self._lock_folder()
            self.precision, note = self._choose_precision(stored_images(folder), default)
            identity = self.identity()
            pictures = bf.join(folder, "IMG" if self.names else "png")
            with writing(pictures):
                bf.makedirs(pictures)
            record = {"reading": self.trained.reading.to_dict(), "images": identity}
            save_json(bf.join(folder, SETTINGS_NAME), record)
            if self.prepare is not None:
                self.prepare(folder)
            settled = folder, self.precision, note
        return dist_util.broadcast_object(settled)

    def _choose_precision(self, stored: Mapping[str, Any], default: str) -> Choice:
        """As the flag says, or else as of the images in the folder, or else the default."""
        began = stored.get("precision", "fp32") if stored else ""
        return choose_for(dist_util.dev(), self.settings.precision, began, default)

    def _lock_folder(self) -> str:
        """The results folder, which no other command writes into."""
        identity = self.identity()
        free = ("precision",) if self.settings.precision in AUTO else ()
        arguments = self.settings.out_dir, self.trained.path, self._name(), identity, free
        folder = samples_folder(*arguments)
        check_output(folder, folder=True)
        run_lock.hold_folder(folder, "choose another --out_dir")
        if samples_folder(*arguments) != folder:  # another command has just begun there
            run_lock.release_folder(folder)
            return self._lock_folder()
        return folder

    def _name(self) -> str:
        stem = os.path.splitext(bf.basename(self.trained.path))[0]
        return f"{stem}_{self.sampler}_{self.steps}_seed{self.settings.seed}"

    def _pending(self, folder: str) -> list[int]:
        """Indices of the images still to be sampled."""
        paths = [self._path(folder, index) for index in range(self.settings.num_samples)]
        folders = {bf.dirname(path) for path in paths}
        finished = {bf.join(f, name) for f in folders if bf.isdir(f) for name in bf.listdir(f)}
        return [index for index, path in enumerate(paths) if path not in finished]

    def _path(self, folder: str, index: int) -> str:
        """The file of the image with this index."""
        if self.names:
            return bf.join(folder, "IMG", f"{self.names[index]}.png")
        return bf.join(folder, "png", f"{index:06d}.png")

    def _announcement(self, folder: str, pending: int) -> str:
        channels, height, width = self.shape
        total = self.diffusion.num_timesteps
        original = self.diffusion.original_num_steps
        timesteps = str(total) if total == original else f"{total} of {original}"
        line = (
            f"{self.settings.num_samples} images of {height}x{width}x{channels} by {self.sampler},"
            f" {self.steps} steps over {timesteps} timesteps, into {folder}"
        )
        if pending < self.settings.num_samples:
            line += f"; {self.settings.num_samples - pending} are there already"
        if self.steps == original > _MANY_STEPS:
            line += (
                f"\nthis visits every one of the {original} timesteps; quicker:"
                f" --sampler dpm++2m --steps {DEFAULT_STEPS} --eta 1, or --timestep_respacing 250"
            )
        return line

    def _draw(self, indices: Sequence[int], callback: Callable[[StepReport], None]) -> th.Tensor:
        """Sample the images with these indices: `[N x C x H x W]` in [-1, 1]."""
        device = dist_util.dev()
        arguments = self.conditions(indices) if self.conditions else {}
        if self.labels:
            arguments["y"] = th.tensor(self.labels.of(indices), device=device)
        return sample_images(
            in_precision(self.model, self.precision, device),
            self.diffusion,
            self.shape,
            indices,
            sampler=self.sampler,
            steps=self.steps,
            seed=self.settings.seed,
            device=device,
            options=SamplerOptions(
                eta=self.settings.eta,
                clip_denoised=self.settings.clip_denoised,
                model_kwargs=arguments,
                cond_fn=self.cond_fn and in_precision(self.cond_fn, self.precision, device),
                callback=callback,
            ),
        )

    def _sample(self, folder: str, pending: Sequence[int]) -> str | None:
        """Sample the pending images; returns the name of the signal that stopped it, if any.

        A signal takes effect at the next sampling step, since a batch may take minutes.
        """
        size = self.settings.batch_size
        rounds = math.ceil(len(pending) / (size * dist_util.world_size()))
        with StopRequest() as stop, progress_bar(rounds * self.steps) as bar:

            def after_step(_: StepReport) -> None:
                bar.update()
                if stop.requested:
                    raise _Stopped

            for number in range(rounds):
                first = (number * dist_util.world_size() + dist_util.rank()) * size
                mine = pending[first : first + size]
                last = first + len(mine)
                bar.set_description(f"image {first + 1} to {last} of {len(pending)}", refresh=False)
                with contextlib.suppress(_Stopped):
                    images = to_uint8(self._draw(mine, after_step)) if mine else ()
                    for index, image in zip(mine, images):
                        write_image(self._path(folder, index), image)
                if dist_util.agree_max(int(stop.requested is not None)):
                    return stop.requested or "a signal on another rank"
        return None

    def _write_results(self, folder: str) -> None:
        count = self.settings.num_samples
        channels, height, width = self.shape
        images = np.empty((count, height, width, channels), np.uint8)
        for index in range(count):
            picture = read_image(self._path(folder, index), channels)
            images[index] = picture.reshape(height, width, channels)
        arrays = [images]
        shown = range(min(count, _GRID_IMAGES))
        captions = [self.names[index] if self.names else str(index) for index in shown]
        if self.labels:
            labels = self.labels.of(range(count))
            arrays.append(np.array(labels, np.int64))
            captions = [f"{captions[i]} {self.labels.name(labels[i])}" for i in shown]
        shape = "x".join(map(str, images.shape))
        path = bf.join(folder, f"samples_{shape}.npz")
        write_atomically(path, lambda file: np.savez(file, *arrays))
        write_image(bf.join(folder, "grid.png"), image_grid(images[: len(shown)], captions))
        if self.settings.save_process:
            self._write_process(folder)

    def _write_process(self, folder: str) -> None:
        """Write process.png and process.gif: the predicted images during sampling."""
        shown = set(np.linspace(0, self.steps - 1, _PROCESS_STEPS).round().astype(int).tolist())
        seen: list[tuple[int, np.ndarray]] = []
        indices = range(min(self.settings.num_samples, _PROCESS_IMAGES))
        with progress_bar(self.steps, desc="process") as bar:

            def note(state: StepReport) -> None:
                bar.update()
                if state["step"] in shown:
                    timestep = self.diffusion.timestep_map[state["timestep"]]
                    seen.append((timestep, to_uint8(state["pred_xstart"])))

            self._draw(indices, note)
        cells = [images[i] for i in indices for _, images in seen]
        captions = [f"t {timestep}" for timestep, _ in seen] * len(indices)
        strip = image_grid(np.stack(cells), captions, columns=len(seen))
        write_image(bf.join(folder, "process.png"), strip)
        frames = [image_grid(images, [f"t {t}"] * len(images)) for t, images in seen]
        write_gif(bf.join(folder, "process.gif"), frames)


def _is_main() -> bool:
    return dist_util.is_main()


def _say(line: str) -> None:
    if _is_main():
        messages.say(line)
