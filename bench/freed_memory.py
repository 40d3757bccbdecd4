"""What `eamnet.memory.keep_freed_memory` gives: `python -m bench.freed_memory --output FOLDER`.

How malloc treats freed memory holds for a process, so training steps are timed in processes of
either kind, of EAM-Net and of the same network in plain PyTorch, all four in turn in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench import results
from bench.network import training_step
from bench.subjects import direct_definitions
from bench.timing import Times, paired_ratio
from eamnet.losses import SegmentationLoss
from eamnet.memory import keep_freed_memory
from eamnet.model import EAMNet

NETWORKS = ("EAM-Net", "EAM-Net, plain")
FREED = ("kept", "returned")


def step_of_a_process(
    network: str, freed: str, side: int, batch: int, steps: int
) -> results.Record:
    """The median step, after one that warms up, and the peak of this process."""
    if freed == "kept" and not keep_freed_memory():
        raise RuntimeError("no glibc, or the environment says how malloc is to behave")
    torch.manual_seed(0)
    model, loss_of = EAMNet().train(), SegmentationLoss()
    optimizer = torch.optim.Adam(model.parameters())
    images = torch.rand(batch, 3, side, side)
    masks = (torch.rand(batch, 1, side, side) > 0.5).float()
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        with direct_definitions() if network == NETWORKS[1] else contextlib.nullcontext():
            training_step(model, images, masks, loss_of, optimizer)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux
    return {"seconds": float(np.median(seconds[1:])), "peak_mb": peak / 1e6}


def measure(sides: list[int], batch: int, steps: int, rounds: int) -> Iterator[results.Record]:
    """A row per size and kind."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment.pop("GLIBC_TUNABLES", None)
    kinds = tuple(itertools.product(NETWORKS, FREED))
    for side in sides:
        found: dict[tuple[str, str], list[results.Record]] = {kind: [] for kind in kinds}
        for index in range(rounds):
            for kind in kinds if index % 2 == 0 else kinds[::-1]:
                command = [sys.executable, "-m", "bench.freed_memory", "--process", *kind]
                command += ["--side", str(side), "--batch", str(batch), "--steps", str(steps)]
                run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                found[kind].append(json.loads(run.stdout))
        times = {k: Times(np.array([r["seconds"] for r in rows])) for k, rows in found.items()}
        for network, freed in kinds:
            own = times[network, freed]
            ratio = paired_ratio(own, times[kinds[0]])
            yield {
                "network": network,
                "freed_memory": freed,
                "size": side,
                "batch": batch,
                "rounds": rounds,
                **own.milliseconds(),
                "times_first": ratio.median,
                "times_first_low": ratio.low,
                "times_first_high": ratio.high,
                "peak_mb": max(row["peak_mb"] for row in found[network, freed]),
            }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.freed_memory", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of freed_memory.json and .csv")
    parser.add_argument("--side", type=int, action="append", help="default: 128 and 256")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed in a process")
    parser.add_argument("--rounds", type=int, default=3, help="of four processes")
    parser.add_argument("--process", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sides = options.side or [128, 256]
    if options.process:
        network, freed = options.process
        measured = step_of_a_process(network, freed, sides[0], options.batch, options.steps)
        print(json.dumps(measured))
        return 0
    facts = results.environment(torch.device("cpu"))
    rows = []
    for row in measure(sides, options.batch, options.steps, options.rounds):
        rows.append(row)
        print(
            f"{row['network']}, {row['freed_memory']}, {row['batch']}x{row['size']}²: "
            f"{row['median_ms']:.0f} ms, {row['times_first']:.2f} times, {row['peak_mb']:.0f} MB",
            flush=True,
        )
    if options.output:
        for path in results.write(
            options.output, "freed_memory", {"environment": facts, "rows": rows}
        ):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
