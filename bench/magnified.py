"""How well large lesions are found: `python -m bench.magnified ROOT --split SPLIT.JSON`.

Few pictures have a lesion that nearly fills them, too few in a validation part to choose weights
by. So its pictures are cropped to a window about their lesion, whose sides are the picture's
divided by a factor, and are scored as pictures of their own. The lesion fills the factor's square
more of the picture, as far as it fits, and is blurred as much. Dice is taken at the
window's size; intervals resample the pictures, the same ones for all weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench import results
from bench.precision import compared
from eamnet.data import SegmentationData
from eamnet.data.transforms import Pixels
from eamnet.inference import Predictor
from eamnet.measures import area_fraction
from eamnet.metrics import image_metrics

FACTORS = (1.0, 1.5, 2.25)
FAILED = 0.55
"""A picture whose Dice is lower counts as failed."""


def window(mask: Pixels, factor: float) -> tuple[slice, slice]:
    """The rows and columns of the crop of a picture by its mask ``(H, W)``, inside the picture."""
    found = []
    for axis, size in enumerate(mask.shape):
        positions = np.nonzero(mask)[axis]
        centre = positions.mean() + 0.5 if len(positions) else size / 2
        side = max(1, round(size / factor))
        start = min(max(0, round(centre - side / 2)), size - side)
        found.append(slice(start, start + side))
    return found[0], found[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.magnified", description=__doc__)
    parser.add_argument("root", help="folder of ISIC 2017")
    parser.add_argument("--split", required=True, help="split.json, whose validation part is used")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=["isic2017"],
        help=".safetensors files or bundled weights; changes are from the first",
    )
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS)
    parser.add_argument("--output", type=Path, help="folder of magnified.json and .csv")
    options = parser.parse_args(arguments)
    if min(options.factors) < 1:
        parser.error("factors must be 1 or more")
    if not Path(options.split).is_file():  # one would be drawn, of pictures that were trained on
        parser.error(f"there is no split file {options.split}")
    facts = results.environment(torch.device("cpu"))  # before the source can change
    data = SegmentationData("isic2017", root=options.root, split=options.split)
    predictors = {Path(name).stem: Predictor.from_file(name) for name in options.checkpoint}
    if len(predictors) != len(options.checkpoint):
        parser.error("two checkpoints have one name")
    scores: dict[tuple[str, float], list[float]] = {}
    shares: dict[float, list[float]] = {factor: [] for factor in options.factors}
    ids = data.index().val
    start = time.monotonic()
    for index, identifier in enumerate(ids):
        image, truth = data.source.load(data.source[identifier])
        assert truth is not None, identifier
        for factor in options.factors:
            inside = window(truth, factor)
            shares[factor].append(area_fraction(truth[inside]))
            for name, predictor in predictors.items():
                (mask,) = predictor.masks([image[inside]])
                (found,) = image_metrics(
                    identifier, truth[inside], mask, resolution="native", hd95=False
                )
                scores.setdefault((name, factor), []).append(found.dice)
        if index % 20 == 19:
            print(f"{index + 1} of {len(ids)}, {time.monotonic() - start:.0f} s", flush=True)
    rows: list[results.Record] = []
    first = next(iter(predictors))
    for factor in options.factors:
        tables = {name: np.array([scores[name, factor]]) for name in predictors}
        for name, values in tables.items():
            rows.append(
                {
                    "factor": factor,
                    "median_share": float(np.median(shares[factor])),
                    **compared(tables, name, first),
                    "failed": int((values < FAILED).sum()),
                }
            )
            print(rows[-1], flush=True)
    if options.output:
        content = {"environment": facts, "split": data.split_hash, "rows": rows}
        for path in results.write(options.output, "magnified", content):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
