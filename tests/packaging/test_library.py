"""The compiled library as it was built: what it needs, says of itself and registers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eamnet_kernels
from eamnet_kernels import native
from eamnet_kernels.ops.schemas import NATIVE_SCHEMAS, SCHEMAS

pytestmark = pytest.mark.usefixtures("loaded")
LIBRARY = Path(native.__file__).with_name("_C.so")


def _symbols(*options: str) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    return subprocess.run(
        [nm, "--dynamic", "--demangle", *options, str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def test_needs_nothing_but_the_stable_abi() -> None:
    needed = _symbols("--undefined-only")
    assert any("torch_library_impl" in line for line in needed), "nm shows what is needed"
    unstable = [s for s in needed if any(name in s for name in ("torch::", "at::", "c10::"))]
    assert not unstable, "these change from one torch to the next"
    assert not [s for s in needed if " Py" in s], "a Python C API would tie the library to a Python"


def test_exports_nothing_of_its_own() -> None:
    """Kernels of two levels with one name must not meet in the dynamic linker either."""
    assert not [s for s in _symbols("--defined-only") if "eamnet::" in s]


def test_knows_nothing_of_the_building_machine(root: Path) -> None:
    assert str(root).encode() not in LIBRARY.read_bytes()


def test_facts(build: SimpleNamespace) -> None:
    facts = native.facts()
    assert facts is not None
    assert facts["project_version"] == eamnet_kernels.__version__
    assert facts["project_version"] == importlib.metadata.version("eamnet-kernels")
    assert facts["machine"] == platform.machine()
    assert facts["torch_target"] == "2.10"
    assert facts["levels"] == build.LEVELS[platform.machine()]
    assert not any("native" in flag for flag in facts["flags"]), "built for one machine only"
    for key in ("torch_version", "compiler", "date"):
        assert facts[key]
    tables = json.dumps([SCHEMAS, NATIVE_SCHEMAS], sort_keys=True).encode()
    assert facts["schemas_sha256"] == hashlib.sha256(tables).hexdigest()


@pytest.mark.parametrize(
    ("namespace", "table"),
    [("eamnet_kernels", SCHEMAS), ("eamnet_kernels_native", NATIVE_SCHEMAS)],
)
def test_schemas_of_both_languages_agree(namespace: str, table: dict[str, str]) -> None:
    everything = torch._C._jit_get_all_schemas()
    registered = {s.name: s for s in everything if s.name.startswith(f"{namespace}::")}
    expected = {f"{namespace}::{name}" for name in table}
    assert registered.keys() == expected
    for name, text in table.items():
        assert registered[f"{namespace}::{name}"] == torch._C.parse_schema(f"{namespace}::{text}")


def test_every_kernel_is_called_and_every_call_has_a_kernel(root: Path) -> None:
    called = {"cpu_level"}
    for path in (root / "eamnet_kernels" / "cpu").glob("*.py"):
        called |= set(re.findall(r"(?:_native|eamnet_kernels_native)\.(\w+)", path.read_text()))
    assert called == NATIVE_SCHEMAS.keys()


def test_schemas_come_from_the_library(python) -> None:
    """Loading it alone defines them, so that a C++ program can run an exported network."""
    code = (
        f"import torch; torch.ops.load_library({str(LIBRARY)!r});"
        "print(torch.ops.eamnet_kernels.gate_statistics.default._schema)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("eamnet_kernels::gate_statistics(Tensor x")
