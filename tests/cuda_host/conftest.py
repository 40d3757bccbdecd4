"""Compiles the CUDA kernels for the CPU and registers them as the backend `cuda_host`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eamnet_kernels
from eamnet_kernels import backends

TESTS = Path(__file__).resolve().parents[1]
sys.path.extend(str(p) for p in (TESTS, TESTS / "cuda_host") if str(p) not in sys.path)

from cuda_host import backend as host  # noqa: E402


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    return host.build(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def cuda_host(library: Path) -> Iterator[str]:
    """The backend's name, selected; no other test sees it in the registry."""
    host.HostBackend.library = str(library)
    backends.register(
        host.HostBackend(
            "cuda_host",
            "the CUDA kernels on the CPU",
            lambda: None,
            ("gate_statistics", "multi_dilation_conv"),
        )
    )
    with eamnet_kernels.use_backend("cuda_host"):
        yield "cuda_host"
    backends.unregister("cuda_host")
