"""The vector layer and the matrix products of csrc/cpu, by a program that checks them per level."""

from __future__ import annotations

import platform
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# What torch says of this processor decides which programs can run here.
_SUPPORTED = {
    "DEFAULT": ["baseline"],
    "AVX2": ["baseline", "avx2"],
    "AVX512": ["baseline", "avx2", "avx512"],
}


def _build_and_run(program: Path, command: list[str], flags: list[str], root: Path) -> str:
    compile_ = [*command, *flags, f"-I{root / 'csrc'}", "-o", str(program)]
    source = root / "tests" / "packaging" / "simd_check.cpp"
    done = subprocess.run([*compile_, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_headers(level: str, tmp_path: Path, root: Path, build: SimpleNamespace) -> None:
    """exp, rounding, masks, transposition, products and panels against plain loops in float64."""
    flags = build.LEVELS[platform.machine()].get(level)
    if flags is None or level not in _SUPPORTED[torch.backends.cpu.get_cpu_capability()]:
        pytest.skip(f"this processor cannot run {level}")
    command, _ = build.compiler()
    flags = [*build.COMPILE, *flags, f"-DEAMNET_LEVEL={level}"]
    out = _build_and_run(tmp_path / "check", command, flags, root)
    assert out.endswith("0 failed checks\n")


def test_headers_sanitized(tmp_path: Path, root: Path, build: SimpleNamespace) -> None:
    """No access outside of a buffer and no undefined behaviour, in particular at the tails."""
    command, _ = build.compiler()
    probe = [
        *command,
        "-fsanitize=address,undefined",
        "-x",
        "c++",
        "-",
        "-o",
        str(tmp_path / "probe"),
    ]
    if subprocess.run(probe, input="int main() {}", text=True, check=False).returncode != 0:
        pytest.skip(f"{shlex.join(command)} has no sanitizers installed")
    flags = [*build.COMPILE, *build.SANITIZERS["address"]]
    flags = [*flags, "-O0", "-DEAMNET_LEVEL=baseline"]
    out = _build_and_run(tmp_path / "check", command, flags, root)
    assert out.endswith("0 failed checks\n")
