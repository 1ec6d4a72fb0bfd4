"""Likelihood of images under a diffusion network: the variational bound in bits per dimension."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import blobfile as bf
import numpy as np
import torch as th

from guided_diffusion import dist_util
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Model
from guided_diffusion.image_datasets import class_labels
from guided_diffusion.images.files import list_radiographs
from guided_diffusion.images.image_io import check_images
from guided_diffusion.images.reading import normalize
from guided_diffusion.networks.precision import choose_for, in_precision
from guided_diffusion.networks.trained import Trained
from guided_diffusion.runtime import rng
from guided_diffusion.runtime.errors import UserError
from guided_diffusion.runtime.messages import say
from guided_diffusion.runtime.progress import progress_bar
from guided_diffusion.runtime.storage.files import check_output, write_atomically, write_csv
from guided_diffusion.sampling.config import LikelihoodConfig
from guided_diffusion.sampling.folder import results_folder

# indices of a batch's images, the images [N x C x H x W] in [-1, 1], the model's arguments
NumberedBatch = tuple[Sequence[int], th.Tensor, dict[str, th.Tensor]]

# per-timestep terms, averaged over images, that the original package saves
_SAVED_TERMS = ("vb", "mse", "xstart_mse")


def likelihood_terms(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Iterable[NumberedBatch],
    *,
    seed: int | None = 0,
    clip_denoised: bool = True,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, np.ndarray]:
    """The terms of `GaussianDiffusion.calc_bpd_loop` for all images of the batches.

    :param seed: the noise is a function of the seed and the image's index; None draws it from
        torch's global generator.
    :param on_step: called once per batch and timestep.
    :return: float64 arrays, `[N]` for totals and `[N x T]` for terms of timesteps T - 1 to 0.
    """
    gathered: dict[str, list[np.ndarray]] = {}
    for numbers, images, arguments in batches:

        def noise(x: th.Tensor, timestep: int, numbers: Sequence[int] = numbers) -> th.Tensor:
            on_step()
            if seed is None:
                return th.randn_like(x)
            return rng.normal(seed, f"likelihood {timestep}", numbers, x.shape[1:]).to(x.device)

        terms = diffusion.calc_bpd_loop(
            model, images, clip_denoised, model_kwargs=arguments, noise_fn=noise
        )
        for name, values in terms.items():
            gathered.setdefault(name, []).append(values.cpu().double().numpy())
    return {name: np.concatenate(parts) for name, parts in gathered.items()}


def measure_likelihood(settings: LikelihoodConfig, trained: Trained) -> None:
    """Measure the images of a folder; write likelihood.csv and the per-timestep terms.

    :raises UserError: if there are no images.
    """
    precision, note = choose_for(dist_util.dev(), settings.precision)
    if not settings.data_dir:
        raise UserError("--data_dir is missing: name the folder of the images")
    stem = os.path.splitext(bf.basename(trained.path))[0]
    folder = results_folder(settings.out_dir, trained.path, "likelihood", stem)
    check_output(folder, folder=True)
    paths, left_out = list_radiographs(settings.data_dir)
    for line in filter(None, (left_out, note)):
        if dist_util.is_main():
            say(line)
    paths = paths[: settings.num_samples]
    check_images(paths)
    diffusion = trained.diffusion.build()
    mine = range(dist_util.rank(), len(paths), dist_util.world_size())
    batches = math.ceil(len(mine) / settings.batch_size)
    with progress_bar(batches * diffusion.num_timesteps) as bar:
        terms = likelihood_terms(
            in_precision(trained.network(dist_util.dev()), precision, dist_util.dev()),
            diffusion,
            _numbered_batches(paths, mine, settings.batch_size, trained),
            seed=settings.seed,
            clip_denoised=settings.clip_denoised,
            on_step=bar.update,
        )
    parts = [part for part in dist_util.all_gather_object((list(mine), terms)) if part[0]]
    if dist_util.is_main():
        order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
        terms = {k: np.concatenate([part[k] for _, part in parts])[order] for k in parts[0][1]}
        _write(folder, paths, terms)
        mean, deviation = terms["total_bpd"].mean(), terms["total_bpd"].std()
        print(f"{len(paths)} images: {mean:.4f} bits per dimension (deviation {deviation:.4f})")
        print(f"results: {folder}")


def _numbered_batches(
    paths: Sequence[str], numbers: Sequence[int], size: int, trained: Trained
) -> Iterator[NumberedBatch]:
    labels = class_labels(paths, trained.classes) if trained.model.class_cond else None
    for first in range(0, len(numbers), size):
        batch = list(numbers[first : first + size])
        images = normalize(np.stack([trained.reading.load(paths[k]) for k in batch]))
        device, arguments = dist_util.dev(), {}
        if labels is not None:
            arguments["y"] = th.tensor([labels[k] for k in batch], device=device)
        yield batch, images.to(device), arguments


def _write(folder: str, paths: Sequence[str], terms: dict[str, np.ndarray]) -> None:
    for name in _SAVED_TERMS:
        save = functools.partial(np.savez, arr_0=terms[name].mean(axis=0))
        write_atomically(bf.join(folder, f"{name}_terms.npz"), save)
    rows = [
        (path, f"{total:.6f}", f"{prior:.6f}")
        for path, total, prior in zip(paths, terms["total_bpd"], terms["prior_bpd"])
    ]
    write_csv(bf.join(folder, "likelihood.csv"), ["image", "total_bpd", "prior_bpd"], rows)
