"""What the packaging tests share: the repository, the definitions of setup.py, child processes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from eamnet_kernels import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the repository: the tests do not stand beside setup.py")
    return ROOT


@pytest.fixture(scope="session")
def build(root: Path) -> SimpleNamespace:
    """The names that setup.py defines, without a build."""
    return SimpleNamespace(**runpy.run_path(str(root / "setup.py"), run_name="definitions"))


@pytest.fixture(scope="session")
def loaded() -> None:
    """For tests of the compiled library: it has to be there, unless the user does without."""
    if not native.load():
        if os.environ.get("EAMNET_BUILD_NATIVE") == "0":
            pytest.skip("installed without the compiled library (EAMNET_BUILD_NATIVE=0)")
        pytest.fail(f"the compiled library is not loaded: {native.error()}")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs Python in a fresh process and folder; keyword arguments are environment variables."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
