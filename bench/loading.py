"""What a picture costs on its way into a batch: `python -m bench.loading --output FOLDER`.

Processor time of one thread, on synthetic pictures. What is compared takes turns in every round,
each time with all pictures of the set. The augmentation stands beside MONAI's dictionary
transforms that do the same, seeded for every picture as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bench import results
from bench.timing import Times
from eamnet.data.cache import PictureStore
from eamnet.data.dataset import SegmentationDataset
from eamnet.data.synthetic import SyntheticSource
from eamnet.data.transforms import Augmentation

Work = Callable[[int, int], object]
"""`work(round, index)` does the work for one picture."""


def monai_augmentation(like: Augmentation, pictures: SegmentationDataset) -> Work:
    """Flips, a quarter turn, an affine map and three changes of intensity by MONAI."""
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import (
        RandAdjustContrastd,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )
    from monai.transforms.spatial.dictionary import RandAffined, RandFlipd, RandRotate90d

    both = ("image", "mask")
    transform = Compose(
        [
            RandFlipd(both, prob=0.5, spatial_axis=0),
            RandFlipd(both, prob=0.5, spatial_axis=1),
            RandRotate90d(both, prob=0.75),
            RandAffined(
                both,
                prob=like.affine_probability,
                rotate_range=np.radians(like.rotation),
                scale_range=like.scale,
                translate_range=like.translation * pictures[0]["image"].shape[-1],
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            ),
            RandScaleIntensityd("image", prob=1.0, factors=like.contrast),
            RandShiftIntensityd("image", prob=1.0, offsets=like.brightness),
            RandAdjustContrastd("image", prob=1.0, gamma=(0.9, 1.1)),
        ]
    )
    items = [
        {"image": item["image"], "mask": item["mask"]}
        for item in (pictures[index] for index in range(len(pictures)))
    ]

    def work(turn: int, index: int) -> object:
        transform.set_random_state(seed=turn * len(items) + index)
        return transform(items[index])

    return work


def subjects(size: int, count: int, cache_dir: Path) -> dict[str, Work]:
    """What is timed at one size, by its line in the table."""
    source = SyntheticSource(count, size=size)
    augment = Augmentation()
    memory = PictureStore(source, size, in_memory=True)
    disk = PictureStore(source, size, cache_dir)
    ids = [record.id for record in source]
    drawn = [memory[source[identifier]] for identifier in ids]
    for identifier in ids:
        disk[source[identifier]]
    plain = SegmentationDataset(source, ids, size, store=memory)
    kept = SegmentationDataset(source, ids, size, augment, store=memory)
    cached = SegmentationDataset(source, ids, size, augment, store=disk)
    cached_plain = SegmentationDataset(source, ids, size, store=disk)
    return {
        "drawing a synthetic picture": lambda _, i: source.read(source[ids[i]]),
        "augmentation": lambda turn, i: augment(
            drawn[i].image, drawn[i].mask, seed=0, epoch=turn, picture_id=ids[i]
        ),
        "augmentation by MONAI": monai_augmentation(augment, plain),
        "item with augmentation, pictures in memory": lambda turn, i: kept[turn, i],
        "item with augmentation, from the disk cache": lambda turn, i: cached[turn, i],
        "item without augmentation, from the disk cache": lambda _, i: cached_plain[i],
    }


def measure(sizes: list[int], count: int, rounds: int) -> Iterator[results.Record]:
    """A row for each subject and size."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            works = subjects(size, count, Path(folder))
            seconds: dict[str, list[float]] = {what: [] for what in works}
            for turn in range(1 + rounds):  # the first warms up
                for what, work in works.items():
                    start = time.process_time()
                    for index in range(count):
                        work(turn, index)
                    if turn > 0:
                        seconds[what].append((time.process_time() - start) / count)
        for what, found in seconds.items():
            yield {"what": what, "size": size, **Times(np.array(found)).milliseconds()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__)
    parser.add_argument("--size", type=int, action="append", help="default: 128 and 256")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder of loading.json and .csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = results.environment(torch.device("cpu"))
    rows = []
    for row in measure(options.size or [128, 256], options.pictures, options.rounds):
        rows.append(row)
        print(f"{row['what']}, {row['size']}²: {row['median_ms']:.2f} ms", flush=True)
    if options.output:
        for path in results.write(options.output, "loading", {"environment": facts, "rows": rows}):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
