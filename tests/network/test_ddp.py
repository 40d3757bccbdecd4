"""Two processes on the CPU train the network that one process trains."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from eamnet.checkpoints import load_checkpoint
from eamnet.cli import main
from eamnet.distributed import CrossProcessBatchNorm2d, CrossProcessBatchNormSync


def test_two_processes_reach_the_weights_of_one(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In float64, so that rounding is told from error: Adam's first steps turn the sign of a
    # gradient that is zero but for rounding (a bias before a batch norm) into a full step.
    common = ["fit", *tiny, "--trainer.max_epochs", "2", "--trainer.precision", "64-true"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*common, "--run_dir", str(one), "--data.batch_size", "8"]) == 0
    process = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "eamnet", *common, "--run_dir", str(two)),
            *("--data.batch_size", "4", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    name = "checkpoints/last-epoch=0001.ckpt"
    expected, found = (load_checkpoint(run / name)["state_dict"] for run in (one, two))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    start = load_checkpoint(one / "checkpoints" / "last-epoch=0000.ckpt")["state_dict"]
    moved = max((start[k] - v).abs().max() for k, v in expected.items() if v.is_floating_point())
    assert moved > 1e-4  # there was something to differ
    # Every picture was evaluated once, by one process or the other.
    with (two / "validation" / "per_image.csv").open() as file:
        rows = [(r["id"], r["resolution"], r["dice"]) for r in csv.DictReader(file)]
    with (one / "validation" / "per_image.csv").open() as file:
        assert rows == [(r["id"], r["resolution"], r["dice"]) for r in csv.DictReader(file)]


def test_processes_that_start_apart_must_be_told_the_folder(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", *tiny]) == 2
    assert "--run_dir" in capsys.readouterr().err


def _shares() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(8, 4, 5, 6, generator=generator, dtype=torch.float64)
    return [x[:3], x[3:]]  # of different sizes


def _forward_and_backward(norm: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    out = norm(x)
    # The sum over pictures, so that the gradients of two shares add up to those of the whole.
    (out.sin() * torch.arange(6.0, dtype=x.dtype)).sum().backward()
    return {"out": out.detach(), "grad": x.grad}


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    network = nn.Sequential(nn.BatchNorm2d(4)).double()
    CrossProcessBatchNormSync().apply(network)
    results = _forward_and_backward(network, _shares()[rank])
    results |= {k: v.clone() for k, v in network.state_dict().items()}
    results["grad_weight"] = network[0].weight.grad
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_batch_norm_over_processes_is_batch_norm_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _one_of_two, (str(tmp_path),), nprocs=2, start_method="fork"
    )
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    norm = nn.BatchNorm2d(4).double()
    expected = _forward_and_backward(norm, torch.cat(_shares()))
    for name in ("out", "grad"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), expected[name])
    grad_weight = sum(p["grad_weight"] for p in parts)
    torch.testing.assert_close(grad_weight, norm.weight.grad)
    for name, value in norm.state_dict().items():
        for part in parts:
            torch.testing.assert_close(part[f"0.{name}"], value)


def test_batch_norm_is_put_back() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(2)))
    before = list(network.state_dict())
    plugin = CrossProcessBatchNormSync()
    plugin.apply(network)
    assert sum(isinstance(m, CrossProcessBatchNorm2d) for m in network.modules()) == 2
    plugin.revert(network)
    assert not any(isinstance(m, CrossProcessBatchNorm2d) for m in network.modules())
    assert list(network.state_dict()) == before
