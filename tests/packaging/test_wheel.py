"""Building and installing: the wheel, installation without the library, errors."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest


def _pip(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def needs_build_tools() -> None:
    for module in ("setuptools", "wheel", "ninja", "pip"):
        pytest.importorskip(module, reason=f"building without isolation needs {module}")


@pytest.mark.slow
@pytest.mark.usefixtures("needs_build_tools", "loaded")
def test_wheel(tmp_path: Path, root: Path) -> None:
    # In the checkout itself, whose objects are up to date: only the link is repeated.
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    _pip("wheel", *options, str(root), EAMNET_CUDA="0")
    (wheel,) = tmp_path.iterdir()
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("eamnet_kernels", "py3", "none")
    assert platform.startswith("linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(
            archive.read(f"{name}-{version}.dist-info/METADATA"),
        )
        entry_points = archive.read(f"{name}-{version}.dist-info/entry_points.txt").decode()
    assert [n for n in names if n.endswith((".so", ".json"))] == [
        "eamnet_kernels/_C.json",
        "eamnet_kernels/_C.so",
    ]
    assert "eamnet_kernels/py.typed" in names
    assert "eamnet/__init__.py" in names
    folders = {n.split("/")[0] for n in names}
    assert folders == {"eamnet", "eamnet_kernels", f"{name}-{version}.dist-info"}
    assert "eamnet = eamnet.cli:main" in entry_points
    # An upper limit would make pip replace the user's torch.
    assert "torch>=2.10" in metadata.get_all("Requires-Dist", [])
    assert any(n.endswith("/LICENSE") for n in names)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_build_tools")
def test_install_without_the_library(tmp_path: Path, root: Path, python) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, source / name)
    for name in ("csrc", "eamnet", "eamnet_kernels"):
        shutil.copytree(
            root / name, source / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__")
        )
    options = ("--no-deps", "--no-build-isolation", "--target", str(target))
    _pip("install", *options, str(source), EAMNET_BUILD_NATIVE="0", CXX="no-compiler")
    assert not list(target.rglob("*.so"))
    code = (
        "import torch, eamnet_kernels as ek; print(ek.__file__);"
        "ek.functional.gate_statistics(torch.ones(1, 2, 3, 4));"
        "print(ek.native.error())"
    )
    done = python("-c", code, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    assert "not built" in done.stdout


def _failing_build(root: Path, tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert not list(tmp_path.rglob("*.so"))
    return done.stderr


@pytest.mark.usefixtures("needs_build_tools")
def test_no_compiler(root: Path, tmp_path: Path) -> None:
    message = _failing_build(root, tmp_path, CXX="no-such-compiler")
    assert "No C++ compiler was found (looked for: no-such-compiler)" in message
    assert "apt install g++" in message
    assert "EAMNET_BUILD_NATIVE=0" in message


@pytest.mark.usefixtures("needs_build_tools")
def test_old_compiler(root: Path, tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho 'g++ (Ubuntu 7.5.0-3ubuntu1~18.04) 7.5.0'\n")
    old.chmod(0o755)
    message = _failing_build(root, tmp_path, CXX=str(old))
    assert "7.5.0" in message
    assert "GCC 11 or Clang 14 or later is needed" in message


@pytest.mark.usefixtures("needs_build_tools")
@pytest.mark.parametrize(
    ("name", "value"), [("EAMNET_SANITIZE", "everything"), ("EAMNET_BUILD_NATIVE", "maybe")]
)
def test_unknown_switch(name: str, value: str, root: Path, tmp_path: Path) -> None:
    message = _failing_build(root, tmp_path, **{name: value})
    assert f"{name} is '{value}'; accepted are" in message


def test_jobs_follow_the_memory(build: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= build.jobs() <= (os.cpu_count() or 1)
    monkeypatch.setattr(Path, "read_text", lambda self: "MemAvailable:    1500000 kB\n")
    assert build.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == 7
