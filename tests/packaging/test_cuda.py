"""The CUDA library: when it is built, with what, and what comes out; a GPU is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eamnet_kernels import backends, native


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("EAMNET_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "EAMNET_BUILD_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_built_when_asked_for(build: SimpleNamespace, clean: pytest.MonkeyPatch) -> None:
    """By the environment alone; a GPU or an nvcc on the path changes nothing."""
    assert not build.cuda_wanted()
    clean.setenv("CUDA_HOME", "/somewhere")
    assert build.cuda_wanted() == (sys.platform == "linux")
    clean.setenv("EAMNET_CUDA", "0")
    assert not build.cuda_wanted()
    clean.delenv("CUDA_HOME")
    clean.setenv("EAMNET_CUDA", "1")
    assert build.cuda_wanted() == (sys.platform == "linux")
    clean.setenv("EAMNET_CUDA", "yes")
    with pytest.raises(SystemExit, match="accepted are 0 and 1"):
        build.cuda_wanted()


def test_without_nvcc(build: SimpleNamespace, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="nvcc was not found") as caught:
        build.nvcc()
    assert "EAMNET_CUDA=0" in str(caught.value)


def test_architectures(build: SimpleNamespace, clean: pytest.MonkeyPatch) -> None:
    assert build.cuda_architectures() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    clean.setenv("TORCH_CUDA_ARCH_LIST", "8.6 10.0a+PTX")
    assert build.cuda_architectures() == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_100a,code=compute_100a",
    ]
    clean.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(SystemExit, match=r"7\.5"):
        build.cuda_architectures()


def test_reason_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch without CUDA, a library that is not built, one for another CUDA."""
    load = native._load_cuda.__wrapped__
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in load()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "EAMNET_CUDA=1" in load()
    (tmp_path / "_C_cuda.so").touch()
    (tmp_path / "_C_cuda.json").write_text(json.dumps({"cuda_version": "12.8"}))
    assert "CUDA 12.8, torch has 13" in load()
    (tmp_path / "_C_cuda.json").write_text(json.dumps({"cuda_version": "13.0"}))
    monkeypatch.setattr(native, "load", lambda: True)
    assert "could not be loaded" in load()


def test_explain_says_why_not() -> None:
    reasons = backends.explain("gate_statistics", torch.ones(1, 2, 3, 4)).reasons
    assert reasons["cuda"] is not None
    reasons = backends.explain("cross_mix_channels", *[torch.ones(())] * 7).reasons
    assert reasons["cuda"] == "backend 'cuda' does not implement cross_mix_channels"


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_build_and_audit(
    root: Path, build: SimpleNamespace, clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With nvcc and without a GPU: it builds for every card; the machine code is as committed."""
    try:
        _, version = build.nvcc()
    except SystemExit as reason:
        pytest.skip(str(reason))
    build.build_cuda(tmp_path, "0")
    library = tmp_path / "_C_cuda.so"
    symbols = subprocess.run(
        ["nm", "--dynamic", "--demangle", "--undefined-only", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not [
        s for s in symbols.splitlines() if any(n in s for n in ("torch::", "at::", "c10::"))
    ]
    assert str(root).encode() not in library.read_bytes()
    if (torch.version.cuda or "").partition(".")[0] != version.partition(".")[0]:
        pytest.skip(f"built; torch has CUDA {torch.version.cuda}, so it cannot be loaded")
    pytest.importorskip("triton", reason="the audit uses the tools in the Triton wheel")
    options = ("--library", str(library), "--write", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "eamnet_kernels.cuda.audit", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cuda-audit.json").read_text())
    committed = json.loads((root / "docs" / "cuda-audit.json").read_text())
    if found["cuda_version"] == committed["cuda_version"]:
        assert found == committed, "python -m eamnet_kernels.cuda.audit --write docs"


def test_audit_finds_faults() -> None:
    from eamnet_kernels.cuda.audit import Row, resident_threads

    good = Row("sm_90", "conv_forward, dense", "bfloat16", 128, 0, 256, 85403, 512, 48, 6, 2, 2, 0)
    assert not good.faults()
    for changes, fault in (
        ({"local": 3}, "spill"),
        ({"local_bytes": 8}, "spill"),
        ({"matrix": 0}, "without matrix"),
        ({"dtype": "float32"}, "multiplies float32"),
        ({"loads_16": 0, "async_copies_16": 0}, "16-byte loads"),
        ({"stores_16": 0}, "16-byte stores"),
        ({"shared_bytes": 300 << 10}, "shared memory"),
    ):
        (found,) = Row(**{**vars(good), **changes}).faults()
        assert fault in found
    from eamnet_kernels.cuda.audit import CARDS

    assert resident_threads(128, 256, 85403, CARDS["sm_90"]) == 512
    assert resident_threads(32, 256, 100 << 10, CARDS["sm_80"]) == 256
