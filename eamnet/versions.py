"""What a result depends on besides its configuration: software, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["cpu_model", "package_versions", "versions"]

PACKAGES = (
    "eamnet-kernels",
    "torch",
    "numpy",
    "lightning",
    "monai",
    "torchmetrics",
    "jsonargparse",
    "safetensors",
    "pillow",
    "matplotlib",
    "tensorboard",
)
"""Distributions whose versions are recorded: the project, torch, and the ``train`` extra."""


def package_versions() -> dict[str, str | None]:
    """The installed version of each of :data:`PACKAGES`, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the source tree that the package runs from, None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def versions() -> dict[str, object]:
    """All of it, ready for JSON."""
    import torch

    from eamnet_kernels import backends

    return {
        "python": platform.python_version(),
        "packages": package_versions(),
        "commit": git_commit(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend": backends.selected(),
    }
