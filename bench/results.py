"""Result files: what was measured, on what, when; JSON for programs, CSV for spreadsheets."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import eamnet_kernels

SCHEMA = 1
Record = dict[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date: what a number means nothing without."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "eamnet_kernels": eamnet_kernels.__version__,
        "commit": git.stdout.strip() or None,
    }


def write(folder: Path, name: str, content: dict[str, Any]) -> list[Path]:
    """Write `name`.json, and `name`.csv with its rows; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Record] = content["rows"]
    targets = [folder / f"{name}.json", folder / f"{name}.csv"]
    for target in targets:
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=target.name, delete=False, newline=""
        ) as file:
            if target.suffix == ".json":
                json.dump({"schema": SCHEMA, **content}, file, indent=1)
                file.write("\n")
            else:
                fields = list(dict.fromkeys(key for row in rows for key in row))
                writer = csv.DictWriter(file, fields, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(target)
    return targets


def read(path: Path) -> dict[str, Any]:
    """A result file; ValueError where it is not one or of another schema."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result file of the benchmark: {error}") from None
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')}; accepted: {SCHEMA}")
    return content
