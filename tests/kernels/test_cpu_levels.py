"""The conformance cases on the instruction sets below the one that this processor's kernels use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eamnet_kernels import native

pytestmark = pytest.mark.skipif(not native.load(), reason="the compiled library is not built")


# Lowest first, as setup.py lists them; the highest that runs here is the one of the other tests.
LEVELS = list(native.facts()["levels"]) if native.load() else []  # type: ignore[index]


@pytest.mark.parametrize("level", LEVELS)
def test_conformance(level: str) -> None:
    """The level is chosen once per process, so each is tried in a process of its own."""
    highest = os.environ.get("EAMNET_CPU_LEVEL") or native.cpu_level()
    if LEVELS.index(level) >= LEVELS.index(highest):
        pytest.skip(f"the other tests run on {highest}")
    tests = f"{Path(__file__).with_name('test_conformance.py')}::test_values_and_gradients"
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", "cpu and (float32 or bfloat16)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tests],
        env=os.environ | {"EAMNET_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
