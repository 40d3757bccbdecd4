"""The command ``average``: a run whose network lies between another run's and what that began with.

Fine-tuning for one thing costs some of another. The mean of the weights before and after often
keeps most of both (Wortsman et al., arXiv:2109.01903): between two networks of one history the loss
has no barrier.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml  # type: ignore[import-untyped, unused-ignore]
from jsonargparse import ArgumentParser

from eamnet.checkpoints import AtomicCheckpointIO, last_whole_checkpoint, load_checkpoint
from eamnet.inference import NETWORK_PREFIX, export_weights
from eamnet.metrics import write_atomic
from eamnet.model import EAMNet

__all__ = ["AVERAGE", "average", "average_run"]

AVERAGE = "average.json"
"""In the folder of a run made here: `share`, and `epoch`, how many were trained before."""
_COPIED = ("split.json", "data_report.json", "versions.json", "metrics.csv")


def average(arguments: list[str]) -> int:
    """``eamnet average``: the mean of a run's weights and of those it started from."""
    parser = ArgumentParser(
        prog="eamnet average",
        description="Make a run of the mean of another run's last weights and those that it "
        "started from (--init); validate, test, card and predict take it as any other.",
    )
    parser.add_function_arguments(average_run)
    options = parser.parse_args(arguments)
    folder = average_run(**vars(options))
    print(f"not evaluated yet: eamnet validate --run_dir {folder}")
    return 0


def average_run(run_dir: str, output: str, share: float = 0.5) -> Path:
    """Write a run folder with the mean of the weights before and after fine-tuning.

    Args:
        run_dir: a run that started from other weights (``eamnet fit --init``).
        output: the new run's folder, which must not exist.
        share: of the run's last checkpoint in the mean, between 0 and 1; the rest is ``init``.

    Returns:
        The new folder: ``checkpoints/best.ckpt``, ``best.safetensors``, the run's configuration,
        split and records, and ``average.json``.

    Raises:
        FileNotFoundError: the run has no configuration or no checkpoint.
        FileExistsError: ``output`` is there.
        ValueError: the run did not start from other weights, or ``share`` is out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    run, folder = Path(run_dir), Path(output)
    if folder.exists():
        raise FileExistsError(f"output {folder} exists: give another --output")
    config = yaml.safe_load((run / "config.yaml").read_text())
    if config["init"] is None:
        raise ValueError(f"run_dir {run} did not start from other weights (fit --init)")
    last = last_whole_checkpoint(run / "checkpoints")
    if last is None:
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no checkpoint")
    checkpoint = load_checkpoint(last)
    state = checkpoint["state_dict"]
    for name, before in EAMNet.from_pretrained(config["init"]).state_dict().items():
        after = state[NETWORK_PREFIX + name]
        if after.is_floating_point():  # the rest counts batches
            mean = before.double().lerp(after.double(), share)
            state[NETWORK_PREFIX + name] = mean.to(after.dtype).contiguous()
    best = folder / "checkpoints" / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, best)
    export_weights(best, folder / "best.safetensors")
    for name in _COPIED:
        shutil.copy2(run / name, folder / name)
    config["run_dir"] = str(folder)
    write_atomic(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    facts = {"share": share, "epoch": checkpoint["epoch"] + 1}
    write_atomic(folder / AVERAGE, (json.dumps(facts) + "\n").encode())
    return folder
