"""How often the intervals of reports and studies hold the truth: `python -m bench.coverage`.

A nominal 95 % interval is checked where the truth is known. Of one evaluation: its pictures are
drawn from those of a real one, whose own averages are then the truth. Of a comparison of two
networks in a study: scores are normal, with the spreads below between pictures and between
trainings, and the networks are equal. Both use the functions that make the intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench import results
from eamnet.metrics import ImageMetrics, read_csv, summarise
from eamnet.statistics import contrast

ROOT = Path(__file__).resolve().parent.parent
SCORES = ROOT / "docs" / "results" / "isic2017-256" / "per_image.csv"
PICTURES = (20, 50, 150, 600)

SEEDS = (2, 3, 5, 10)
SPREADS = (0.005, 0.01, 0.02)
"""Of a training's mean score about the mean over trainings."""
STUDY_PICTURES = 150
OF_A_PICTURE = 0.07
"""Spread over pictures of the difference of two networks, averaged over trainings."""
OF_A_TRAINING = 0.08
"""Spread over trainings of a network's score on one picture, about the training's mean."""


def of_pictures(
    population: list[ImageMetrics], samples: int, sizes: tuple[int, ...] = PICTURES
) -> Iterator[results.Record]:
    """The share of samples whose interval of the Dice holds that of `population`, both ways."""
    generator = np.random.default_rng(0)
    (truth,) = summarise(population, resamples=1)["resolutions"].values()
    for size in sizes:
        held = {"mean": 0, "pooled": 0}
        for _ in range(samples):
            drawn = generator.integers(len(population), size=size)
            # As pictures of their own, where one was drawn twice.
            rows = [replace(population[d], id=f"{i:04}") for i, d in enumerate(drawn)]
            (found,) = summarise(rows)["resolutions"].values()
            for way in held:
                estimate = found["macro"][way]["dice"]  # type: ignore[literal-required]
                value = truth["macro"][way]["dice"]["value"]  # type: ignore[literal-required]
                held[way] += estimate["low"] <= value <= estimate["high"]
        yield {"pictures": size, "samples": samples, **{k: v / samples for k, v in held.items()}}


def of_studies(
    samples: int, spreads: tuple[float, ...] = SPREADS, seeds: tuple[int, ...] = SEEDS
) -> Iterator[results.Record]:
    """The share of samples whose interval of two equal networks' difference holds zero."""
    generator = np.random.default_rng(0)
    for spread in spreads:
        for count in seeds:
            held = pictures_alone = 0
            for seed in range(samples):
                difference = generator.normal(0, OF_A_PICTURE, STUDY_PICTURES) / 2
                scores = {
                    name: sign * difference
                    + generator.normal(0, spread, (count, 1))
                    + generator.normal(0, OF_A_TRAINING, (count, STUDY_PICTURES))
                    for name, sign in (("a", 1), ("b", -1))
                }
                averaged = {name: table.mean(0, keepdims=True) for name, table in scores.items()}
                weights = {"a": 1.0, "b": -1.0}
                held += not contrast(scores, weights, resamples=400, seed=seed).certain
                pictures_alone += not contrast(averaged, weights, resamples=400, seed=seed).certain
            yield {
                "spread": spread,
                "seeds": count,
                "samples": samples,
                "held": held / samples,
                "pictures_alone": pictures_alone / samples,
            }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("--scores", type=Path, default=SCORES, help="per_image.csv of a run")
    parser.add_argument("--samples", type=int, default=600, help="of each size and kind")
    parser.add_argument("--output", type=Path, help="folder of the result files")
    options = parser.parse_args(arguments)
    facts = results.environment(torch.device("cpu"))
    native = [row for row in read_csv(options.scores) if row.resolution == "native"]
    for name, rows in (
        ("picture_intervals", of_pictures(native, options.samples)),
        ("study_intervals", of_studies(options.samples)),
    ):
        found = []
        for row in rows:
            found.append(row)
            print(name, row, flush=True)
        if options.output:
            content = {"environment": facts, "rows": found}
            for path in results.write(options.output, name, content):
                print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
