"""``eamnet demo``: the whole way from pictures to a report, without any data."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jsonargparse import ArgumentParser

__all__ = ["demo"]


def demo(arguments: list[str]) -> int:
    """``eamnet demo``: train on synthetic pictures, evaluate, write a report and say where."""
    parser = ArgumentParser(
        prog="eamnet demo",
        description="Train a small network on synthetic dermoscopy pictures, evaluate it on "
        "pictures that it has not seen, and write a report: the configuration named demo of "
        "`eamnet fit`, then `eamnet test`.",
    )
    parser.add_function_arguments(run_demo)
    return run_demo(**vars(parser.parse_args(arguments)))


def run_demo(run_dir: str | None = None, epochs: int = 6, pictures: int = 400) -> int:
    """Run the demonstration.

    Args:
        run_dir: Folder of the run; default: ``runs/demo-<date and time>``.
        epochs: Epochs to train.
        pictures: Synthetic pictures to draw; a fifth of them are for the test.

    Returns:
        0.
    """
    # Beside anything else on the machine, threads that wait for each other by spinning take two to
    # four times as long: 313 s instead of 92 s on two busy cores, 83 to 126 s instead of 78 s where
    # one process ran beside. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from eamnet import runs

    folder = Path(run_dir or f"runs/demo-{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    runs.fit(
        [
            *("--config", "demo"),
            *("--run_dir", str(folder)),
            *("--trainer.max_epochs", str(epochs)),
            *("--data.synthetic_count", str(pictures)),
        ]
    )
    runs.test(["--run_dir", str(folder)])
    print(f"\nThe report, with curves, metrics and pictures: {folder.resolve() / 'report.html'}")
    return 0
