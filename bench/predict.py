"""`python -m bench.predict`: what an H100 would take at best, from its data sheet. Not measured.

    python -m bench.predict                                 # the predictions
    python -m bench.predict --measured bench/results/h100   # beside what was measured there

The least bytes and operations of each case (`floor.py`) over the card's peak rates, whichever takes
longer. Source: NVIDIA H100 Tensor Core GPU data sheet, SXM: 3.35 TB/s, 989 TFLOP/s in bfloat16 and
float16 (without sparsity), 67 TFLOP/s in float32. No kernel reaches a peak rate, and short calls
are bound by their launches; the issue's goal for kernels bound by memory is 75 % of the bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.floor import Ceilings, count
from bench.operators import describe
from bench.subjects import SUBJECTS

H100 = {
    "float32": Ceilings(3.35e12, 67e12),
    "bfloat16": Ceilings(3.35e12, 989e12),
    "float16": Ceilings(3.35e12, 989e12),
}
Name = tuple[str, str, str, str]


def predictions() -> dict[Name, tuple[float, str]]:
    """By subject, case, mode and dtype: milliseconds, and which of the two limits it is."""
    found = {}
    for subject in SUBJECTS.values():
        if subject.operator is None:  # a module's work is not counted
            continue
        for case in subject.cases:
            for mode in ("forward", "both"):
                for dtype, ceilings in H100.items():
                    itemsize = getattr(torch, dtype).itemsize
                    counted = count(subject.operator, case, mode, itemsize)
                    seconds = counted.floor(ceilings)
                    limit = "memory" if counted.bytes / ceilings.copy == seconds else "arithmetic"
                    found[subject.name, describe(case), mode, dtype] = (1e3 * seconds, limit)
    return found


def table(rows: list[dict[str, Any]] | None) -> str:
    """The predictions as Markdown; with `rows` of a benchmark, those it has, with its medians."""
    measured = {
        (r["subject"], r["case"], r["mode"], r["dtype"]): r
        for r in rows or []
        if r["chosen"] and r["median_ms"] is not None
    }
    titles = ["operator", "case", "mode", "dtype", "predicted H100 ms", "limit"]
    if rows is not None:
        titles += ["measured ms", "predicted / measured", "by"]
    lines = [titles, ["---"] * len(titles)]
    for name, (milliseconds, limit) in predictions().items():
        line = [*name, f"{milliseconds:.4f}", limit]
        if rows is not None:
            if name not in measured:
                continue
            row = measured[name]
            share = milliseconds / row["median_ms"]
            line += [f"{row['median_ms']:.4f}", f"{share:.0%}", row["candidate"]]
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.predict")
    parser.add_argument("--measured", type=Path, help="folder with a benchmark's operators.json")
    options = parser.parse_args(arguments)
    rows = None
    if options.measured:
        content = results.read(options.measured / "operators.json")
        rows = content["rows"]
        print(f"Measured on {content['environment']['gpu'] or content['environment']['cpu']}.\n")
    print("A prediction for an H100 SXM from its data sheet's peak rates, not a measurement.\n")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
