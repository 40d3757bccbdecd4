"""``eamnet demo``: the whole way from pictures to a report, without any data."""

from __future__ import annotations

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
