"""Predictions from the data sheet, alone and beside measurements; and the script for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import predict

ROOT = Path(__file__).resolve().parents[2]


def test_a_prediction_is_bytes_over_bandwidth_or_operations_over_rate() -> None:
    found = predict.predictions()
    milliseconds, limit = found["gate_statistics", "4x32x256x256", "forward", "float32"]
    # x is read and two maps of pixels are written, 4 bytes each.
    assert milliseconds == pytest.approx(1e3 * 4 * (4 * 32 + 2 * 4) * 65536 / 3.35e12)
    assert limit == "memory"
    milliseconds, limit = found["cross_mix_pixels", "1x8x4096x32", "forward", "float32"]
    assert milliseconds == pytest.approx(1e3 * 8 * 1 * 8 * 4096**2 * 32 / 67e12)
    assert limit == "arithmetic"


def test_only_what_was_measured_is_compared() -> None:
    row = {
        "subject": "gate_statistics",
        "case": "4x32x256x256",
        "mode": "forward",
        "dtype": "float32",
        "candidate": "triton",
        "chosen": True,
        "median_ms": 0.0213,
    }
    head, _, line = predict.table([row, {**row, "chosen": False}]).splitlines()
    assert "measured" in head
    assert line.endswith("| 0.0213 | 50% | triton |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run for long")
def test_the_script_for_a_gpu_says_where_there_is_none() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    dry = run("--dry-run")
    assert dry.returncode == 0
    assert [line.split()[0] for line in dry.stdout.splitlines()] == ["+"] * 5
    assert "tests/cuda_host/test_on_card.py" in dry.stdout
    assert run("--fast").returncode == 2
    done = run()
    assert done.returncode != 0
    assert "no CUDA device" in done.stderr
