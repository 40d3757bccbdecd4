"""Races, missing barriers and accesses out of bounds in the CUDA kernels, found on the CPU.

ThreadSanitizer and AddressSanitizer watch `sanitized.cpp`, where each thread of a block is a real
thread. To know that they would see a fault, faults are planted in a copy of the kernels: each must
be reported.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cuda_host.backend import HERE, SOURCES, compile_command

_BUILD = runpy.run_path(str(HERE.parents[1] / "setup.py"), run_name="definitions")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs Linux and g++"
)


@dataclass(frozen=True)
class Fault:
    """In `file`, `text` becomes `replacement`; `report` is what the sanitizer then says."""

    sanitizer: str
    file: str
    text: str
    replacement: str
    report: str


FAULTS = {
    "race": Fault(
        "thread",
        "multi_dilation_conv_kernels.h",
        "T* stage = stage_memory + warp * kStageSize<T>;",
        "T* stage = stage_memory;",  # all warps write to one stage
        "data race",
    ),
    "missing-barrier": Fault(
        "thread",
        "stencil_tile.h",
        "__syncthreads();  // the window is written",
        "",
        "data race",
    ),
    "missing-warp-barrier": Fault(
        "thread",
        "multi_dilation_conv_kernels.h",
        "__syncwarp();  // the outputs are staged",
        "",
        "data race",
    ),
    "overrun-of-shared-memory": Fault(
        "address",
        "multi_dilation_conv_host.h",
        "int64_t(window.rows) * window.columns",
        "int64_t(window.rows - 1) * window.columns",  # a block asks for too little
        "heap-buffer-overflow",
    ),
    "overrun-of-global-memory": Fault(
        "address",
        "multi_dilation_conv_kernels.h",
        "if (row >= a.channels || !tile.inside(pixel)) return;",
        "if (row >= a.channels) return;",  # the part of a tile beyond the picture is written
        "heap-buffer-overflow",
    ),
}


def _build(folder: Path, sanitizer: str, csrc: Path, *options: str) -> Path:
    program = folder / "sanitized"
    flags = (f"-fsanitize={sanitizer}", "-Wno-maybe-uninitialized", *options)
    command = compile_command(HERE / "sanitized.cpp", program, *flags, csrc=csrc)
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer installed")
    assert built.returncode == 0, built.stderr
    return program


def _run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_BUILD["FIXED_ADDRESSES"], str(program)],
        env={
            "TSAN_OPTIONS": "halt_on_error=1",
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "halt_on_error=1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_clean(sanitizer: str, tmp_path: Path) -> None:
    done = _run(_build(tmp_path, sanitizer, SOURCES))
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout == "complete\n"
    assert not done.stderr


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(SOURCES / "cuda", csrc / "cuda")
    source = csrc / "cuda" / fault.file
    text = source.read_text()
    assert fault.text in text, "the fault has to be planted somewhere else now"
    source.write_text(text.replace(fault.text, fault.replacement))
    program = _build(tmp_path, fault.sanitizer, csrc, "-DEAMNET_ONE_CASE")
    for _ in range(10):  # threads may happen to run in the order that the missing barrier enforced
        done = _run(program)
        if done.returncode != 0:
            break
    assert done.returncode != 0
    assert fault.report in done.stderr, done.stderr[:4000]
