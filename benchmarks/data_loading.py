"""How fast batches of images come: with and without the cache, for several sizes and worker counts.

    python benchmarks/data_loading.py FOLDER [--sizes 224,64] [--workers 0,1] [--json OUT.json]

Every line is the loader of training itself. Without the cache every image is decoded and resized
anew; with it the first pass fills the memory and the next ones are measured. Ratios between lines
of one run carry over to other machines better than the rates do.
"""

import argparse
import json
import os
import sys
import time

import torch as th
from tqdm import tqdm

from guided_diffusion.image_datasets import load_data, sample_is_grey
from guided_diffusion.images.files import list_images
from guided_diffusion.images.reading import ReadingConfig
from guided_diffusion.runtime.errors import command


def measure(
    folder: str, reading: ReadingConfig, batch_size: int, workers: int, cache: str, seconds: float
) -> dict:
    """Images per second of one setting, and the seconds that filling the cache took."""
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
    warm_up = -(-count // batch_size) + 2 * workers if cache == "ram" else 2 * (workers + 1)
    for _ in range(warm_up):
        next(batches)
    filled = time.perf_counter() - start
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    rate = images / (time.perf_counter() - start)
    batches.close()  # ends its workers
    return {
        "size": reading.image_size,
        "cache": cache,
        "workers": workers,
        "images_per_second": rate,
        "first_pass_seconds": filled if cache == "ram" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of images, searched recursively")
    parser.add_argument("--sizes", default="224,64", help="image sizes in pixels")
    parser.add_argument("--workers", default="0,1", help="numbers of reading processes")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resize", default="crop", help="crop, pad or squash")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured for each line")
    parser.add_argument("--json", help="also write the numbers here")
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
        plain = next(
            other
            for other in lines
            if (other["size"], other["workers"], other["cache"]) == (line["size"], 0, "none")
        )
        line["ratio"] = line["images_per_second"] / plain["images_per_second"]
        first = line["first_pass_seconds"]
        print(
            f"{line['size']:5} {line['workers']:8} {line['cache']:>6} "
            f"{line['images_per_second']:10.0f} {line['ratio']:7.1f} "
            + (f"{first:9.1f} s" if first else f"{'-':>11}")
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"images": len(paths), "channels": channels, "lines": lines}, file, indent=2)


if __name__ == "__main__":
    sys.exit(command(main)())
