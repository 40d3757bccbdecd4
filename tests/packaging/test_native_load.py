"""When the compiled library is missing or does not fit: what works on, and what is said."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from eamnet_kernels import native
from eamnet_kernels.ops import schemas


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of the built library and its record, where `native` now looks."""
    built = Path(native.__file__).parent
    for name in ("_C.so", "_C.json"):
        if not (built / name).exists():
            pytest.skip("the compiled library is not built")
        shutil.copy(built / name, tmp_path / name)
    monkeypatch.setattr(native, "_LIBRARY", tmp_path / "_C.so")
    monkeypatch.setattr(native, "_FACTS", tmp_path / "_C.json")
    monkeypatch.setattr(native, "facts", native.facts.__wrapped__)
    return tmp_path


def _reason() -> str:
    error = native._load.__wrapped__()
    assert isinstance(error, native.NativeLibraryError)
    return str(error)


def _edit_record(folder: Path, **changes: str) -> None:
    record = json.loads((folder / "_C.json").read_text())
    (folder / "_C.json").write_text(json.dumps({**record, **changes}))


def test_missing(folder: Path) -> None:
    (folder / "_C.so").unlink()
    reason = _reason()
    assert "not built" in reason
    assert "pip install" in reason
    assert "C++ compiler" in reason


def test_not_written_for_this_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "_C.so").unlink()
    monkeypatch.setattr("sys.platform", "darwin")
    assert "darwin" in _reason()


def test_damaged(folder: Path) -> None:
    whole = (folder / "_C.so").read_bytes()
    (folder / "_C.so").write_bytes(whole[:100])
    reason = _reason()
    assert "damaged" in reason
    assert "Build it again" in reason


def test_without_record(folder: Path) -> None:
    (folder / "_C.json").write_text("not JSON")
    assert "_C.json" in _reason()


def test_built_for_another_machine(folder: Path) -> None:
    _edit_record(folder, machine="riscv64")
    reason = _reason()
    assert "riscv64" in reason
    assert platform.machine() in reason


def test_torch_too_old(folder: Path) -> None:
    _edit_record(folder, torch_target="99.0")
    assert "needs torch 99.0 or later" in _reason()


def test_other_schemas(folder: Path) -> None:
    _edit_record(folder, schemas_sha256="0" * 64)
    assert "other schemas" in _reason()


@pytest.mark.parametrize("table", ["SCHEMAS", "NATIVE_SCHEMAS"])
def test_older_than_the_python_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setitem(getattr(schemas, table), "new", "new(Tensor x) -> Tensor")
    reason = _reason()
    assert "does not fit these Python files" in reason
    assert "Build it again" in reason


def test_a_stale_library_is_passed_over(folder: Path, python) -> None:
    """A kernel that it lacks must not be missed in the middle of a call."""
    package = Path(native.__file__).parent
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(package, folder / "eamnet_kernels", ignore=ignored)
    for name in ("_C.so", "_C.json"):
        shutil.copy(folder / name, folder / "eamnet_kernels" / name)
    table = folder / "eamnet_kernels" / "ops" / "schemas.py"
    text = table.read_text()
    table.write_text(text.replace('"gate_statistics(Tensor x) ->', '"gate_statistics(Tensor y) ->'))
    assert table.read_text() != text
    code = """if True:
        import torch
        import eamnet_kernels as ek
        x = torch.randn(2, 4, 5, 6)
        assert torch.allclose(ek.functional.gate_statistics(x).pixel_mean, x.mean(1, keepdim=True))
        print(ek.explain("gate_statistics", x))
        with ek.use_backend("cpu"):
            ek.functional.gate_statistics(x)
    """
    done = python("-c", code, PYTHONPATH=str(folder))
    assert "gate_statistics: reference" in done.stdout
    assert "Build it again" in done.stdout
    assert "RuntimeError: backend 'cpu' cannot run gate_statistics here" in done.stderr


def test_symbol_missing(folder: Path, build: SimpleNamespace) -> None:
    """What a library looks like that a later torch was needed for."""
    command, _ = build.compiler()
    source = 'extern "C" void torch_of_the_future(); void (*use)() = torch_of_the_future;'
    subprocess.run(
        [*command, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(folder / "_C.so")],
        input=source,
        text=True,
        check=True,
    )
    reason = _reason()
    assert "torch_of_the_future" in reason
    assert "lacks a symbol" in reason


def test_package_works_without_the_library(python, tmp_path: Path) -> None:
    """Schemas are then defined in Python, the reference runs, and the reason is shown."""
    package = Path(native.__file__).parent
    shutil.copytree(
        package, tmp_path / "eamnet_kernels", ignore=shutil.ignore_patterns("_C.*", "__pycache__")
    )
    code = """if True:
        import torch
        import eamnet_kernels as ek
        x = torch.randn(2, 4, 5, 6, requires_grad=True)
        statistics = ek.functional.gate_statistics(x)
        assert torch.allclose(statistics.pixel_mean, x.mean(1, keepdim=True))
        sum(s.sum() for s in statistics).backward()
        assert x.grad is not None
        explanation = ek.explain("gate_statistics", x)
        assert explanation.chosen != "cpu", explanation
        print(explanation)
    """
    done = python("-c", code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
