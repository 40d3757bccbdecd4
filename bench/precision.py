"""What folding, precision and `--tta` change in the Dice: `python -m bench.precision ROOT`.

The official validation part of ISIC 2017 (less what `SegmentationData` leaves out) is segmented by
the network as it was trained and by what `Predictor` makes of it. Masks are compared at the size of
the pictures' files; intervals resample the pictures, the same ones for all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench import results
from eamnet.data import SegmentationData
from eamnet.inference import Precision, Predictor
from eamnet.metrics import image_metrics
from eamnet.model import EAMNet
from eamnet.statistics import contrast

BASE = "float32, not folded"
FOLDED: tuple[Precision, ...] = ("float32", "bfloat16")


def predictors(checkpoint: str) -> dict[str, Predictor]:
    """The network as it was trained, its folded copies, and the mean of eight views by one."""
    found = {BASE: Predictor.from_file(checkpoint)}
    found[BASE].model = EAMNet.from_pretrained(checkpoint)
    for precision in FOLDED:
        found[f"{precision}, folded"] = Predictor.from_file(checkpoint, precision=precision)
    found["float32, folded, 8 views"] = Predictor.from_file(checkpoint, tta=True)
    return found


def dice(data: SegmentationData, candidates: dict[str, Predictor]) -> dict[str, list[float]]:
    """Of each picture of the test part, by candidate."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    ids = data.index().test
    start = time.monotonic()
    for index, identifier in enumerate(ids):
        image, truth = data.source.load(data.source[identifier])
        assert truth is not None, identifier
        for name, predictor in candidates.items():
            (mask,) = predictor.masks([image])
            rows = image_metrics(identifier, truth, mask, resolution="native", hd95=False)
            found[name].append(rows[0].dice)
        if index % 20 == 19:
            print(f"{index + 1} of {len(ids)}, {time.monotonic() - start:.0f} s", flush=True)
    return found


def compared(tables: dict[str, NDArray[np.float64]], name: str, base: str) -> results.Record:
    """The mean Dice of one of several networks, and its change from the base's, paired by picture.

    `tables` holds Dice (1,I) of the same I pictures by network.
    """
    mean = contrast(tables, {name: 1.0})
    change = contrast(tables, {name: 1.0, base: -1.0}) if name != base else None
    return {
        "network": name,
        "pictures": tables[name].size,
        "dice": mean.value,
        "dice_low": mean.low,
        "dice_high": mean.high,
        "change": change and change.value,
        "change_low": change and change.low,
        "change_high": change and change.high,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("root", help="folder of ISIC 2017")
    parser.add_argument(
        "--checkpoint", default="isic2017", help=".safetensors file, or bundled weights"
    )
    parser.add_argument("--output", type=Path, help="folder of precision.json and .csv")
    options = parser.parse_args(arguments)
    facts = results.environment(torch.device("cpu"))  # before the source can change
    data = SegmentationData("isic2017", root=options.root, protocol="validation-as-test")
    scores = dice(data, predictors(options.checkpoint))
    tables = {name: np.array([values]) for name, values in scores.items()}
    rows: list[results.Record] = []
    for name, values in tables.items():
        largest = float(np.abs(values - tables[BASE]).max())
        rows.append({**compared(tables, name, BASE), "largest_change": largest})
        print(rows[-1], flush=True)
    if options.output:
        content = {"environment": facts, "split": data.split_hash, "rows": rows}
        for path in results.write(options.output, "precision", content):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
