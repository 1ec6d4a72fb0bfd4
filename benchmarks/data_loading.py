"""Data loader throughput, with and without the cache, by image size and number of workers.

    python benchmarks/data_loading.py FOLDER [--sizes 224,64] [--workers 0,1] [--json OUT.json]

Measures the data loader used for training. Without the cache, images are decoded and resized every
time; with it, the first pass fills the cache and later passes are measured. Ratios between lines of
one run carry over to other machines better than the rates do.
"""

import argparse
import os
import sys
import time

import torch as th
from tqdm import tqdm

from guided_diffusion.image_datasets import load_data, sample_is_grey
from guided_diffusion.images.files import list_images
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import command
from guided_diffusion.runtime.storage.files import save_json


def measure(
    folder: str, reading: ReadingConfig, batch_size: int, workers: int, cache: str, seconds: float
) -> dict:
    """Images per second with these settings, and the seconds taken to fill the cache."""
    count = len(list_images(folder))
    batches = load_data(
        data_dir=folder,
        batch_size=batch_size,
        image_size=reading.image_size,
        random_flip=False,
        reading=reading,
        cache=cache,
        num_workers=workers,
    )
    start = time.perf_counter()
    warm_up_batches = -(-count // batch_size) + 2 * workers if cache == "ram" else 2 * (workers + 1)
    for _ in range(warm_up_batches):
        next(batches)
    warm_up_seconds = time.perf_counter() - start
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    rate = images / (time.perf_counter() - start)
    batches.close()  # stops the workers
    return {
        "size": reading.image_size,
        "cache": cache,
        "workers": workers,
        "images_per_second": rate,
        "first_pass_seconds": warm_up_seconds if cache == "ram" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of images, searched recursively")
    parser.add_argument("--sizes", default="224,64", help="image sizes in pixels, comma-separated")
    parser.add_argument("--workers", default="0,1", help="numbers of data loader processes")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    parser.add_argument("--resize", default="crop", help="crop, pad or squash")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure each line for")
    parser.add_argument("--json", help="also write the results to this JSON file")
    args = parser.parse_args()
    paths = list_images(args.folder)
    channels = 1 if sample_is_grey(paths) else 3
    print(
        f"{len(paths)} images, {channels} channels, {os.cpu_count()} cores, torch {th.__version__}"
    )
    settings = [
        (int(size), int(workers), cache)
        for size in args.sizes.split(",")
        for workers in args.workers.split(",")
        for cache in ("none", "ram")
    ]
    lines = []
    for size, workers, cache in tqdm(settings, leave=False):
        reading = ReadingConfig(size, channels, args.resize)
        lines.append(measure(args.folder, reading, args.batch_size, workers, cache, args.seconds))
    print(
        f"{'size':>5} {'workers':>8} {'cache':>6} {'images/s':>10} {'ratio':>7} {'first pass':>11}"
    )
    for line in lines:
        baseline = next(
            other
            for other in lines
            if (other["size"], other["workers"], other["cache"]) == (line["size"], 0, "none")
        )
        line["ratio"] = line["images_per_second"] / baseline["images_per_second"]
        first = line["first_pass_seconds"]
        print(
            f"{line['size']:5} {line['workers']:8} {line['cache']:>6} "
            f"{line['images_per_second']:10.0f} {line['ratio']:7.1f} "
            + (f"{first:9.1f} s" if first else f"{'-':>11}")
        )
    if args.json:
        save_json(args.json, {"images": len(paths), "channels": channels, "lines": lines})


if __name__ == "__main__":
    sys.exit(command(main)())
