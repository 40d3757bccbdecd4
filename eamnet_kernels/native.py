"""Loads the compiled operators, `_C.so` and `_C_cuda.so`, once, and keeps the reason if it cannot.

`setup.py` builds the libraries beside this file. Importing the package never fails for lack of it:
the operators then run on their other backends, and `error()` says why and what to do.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).with_name("_C.so")
_FACTS = Path(__file__).with_name("_C.json")
_BUILD = "pip install . (in a checkout: pip install -e . --no-build-isolation)"


class NativeLibraryError(ImportError):
    """The compiled library is missing or does not fit; the message says what to do."""


@cache
def facts() -> dict[str, Any] | None:
    """What the library was built from: versions, compiler, flags, levels, date, commit.

    None where there is no readable record, which goes with a library that is not there.
    """
    try:
        record = json.loads(_FACTS.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


@cache
def _load() -> BaseException | None:
    try:
        _check()
        torch.ops.load_library(_LIBRARY)
    except (OSError, RuntimeError, ImportError) as cause:
        if isinstance(cause, NativeLibraryError):
            return cause
        # torch wraps the dynamic linker's message, which says what is wrong.
        said = str(cause.__cause__ or cause)
        error = NativeLibraryError(f"{_LIBRARY} could not be loaded: {said}\n{_remedy(said)}")
        error.__cause__ = cause
        return error
    return None


def load() -> bool:
    """Load the library if that has not been tried yet; whether it is loaded."""
    return _load() is None


def error() -> BaseException | None:
    """Why the library is not loaded, or None if it is."""
    return _load()


def cpu_level() -> str:
    """The instruction set the CPU kernels use: "baseline", "avx2", "avx512" or "amx_bf16".

    The environment variable EAMNET_CPU_LEVEL forces one; an unknown or unsupported one raises
    RuntimeError here and in every kernel. Raises NativeLibraryError where nothing is loaded.
    """
    reason = error()
    if reason is not None:
        raise reason
    return str(torch.ops.eamnet_kernels_native.cpu_level())


@cache
def _load_cuda() -> str | None:
    major = (torch.version.cuda or "").partition(".")[0]
    if not major:
        return f"torch {torch.__version__} is a build without CUDA"
    library = _LIBRARY.with_name("_C_cuda.so")
    try:
        record = json.loads(library.with_suffix(".json").read_text())
    except (OSError, ValueError):
        record = None
    if record is None or not library.exists():
        return f"the CUDA kernels are not built. It needs nvcc: EAMNET_CUDA=1 {_BUILD}"
    if record["cuda_version"].partition(".")[0] != major:
        return f"{library} was built with CUDA {record['cuda_version']}, torch has {major}"
    if not load():  # it defines what the other implements
        return f"the compiled library did not load: {error()}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as cause:
        return f"{library} could not be loaded: {cause}"
    return None


def cuda_error() -> str | None:
    """Why the CUDA kernels, `_C_cuda.so`, are not loaded, or None if they are; loads them."""
    return _load_cuda()


def _check() -> None:
    """Refuse, with a reason, what would fail to load or, loaded, would not fit the Python files."""
    from eamnet_kernels.ops.schemas import NATIVE_SCHEMAS, SCHEMAS

    if not _LIBRARY.exists():
        if sys.platform != "linux":
            reason = f"it is written for Linux and this is {sys.platform}"
        else:
            reason = f"{_LIBRARY} does not exist. To build it, which needs a C++ compiler: {_BUILD}"
        raise NativeLibraryError(f"The compiled operators are not built: {reason}")
    record = facts()
    if record is None:
        raise NativeLibraryError(
            f"{_FACTS}, the record that belongs to {_LIBRARY.name}, is missing or unreadable, so "
            f"nobody can tell whether the library fits. Build both again: {_BUILD}"
        )
    if record.get("machine") != platform.machine():
        raise NativeLibraryError(
            f"{_LIBRARY} was built for {record.get('machine')}, this is {platform.machine()}. "
            f"Build it here: {_BUILD}"
        )
    target = str(record.get("torch_target"))
    installed = ".".join(torch.__version__.split(".")[:2])
    if [int(part) for part in installed.split(".")] < [int(part) for part in target.split(".")]:
        raise NativeLibraryError(
            f"{_LIBRARY} needs torch {target} or later, installed is {torch.__version__}. "
            f"pip install 'torch>={target}'"
        )
    tables = json.dumps([SCHEMAS, NATIVE_SCHEMAS], sort_keys=True)
    digest = hashlib.sha256(tables.encode()).hexdigest()
    if record.get("schemas_sha256") != digest:
        raise NativeLibraryError(
            f"{_LIBRARY}, built {record.get('date')}, does not fit these Python files: it has "
            f"other schemas than those of eamnet_kernels/ops/schemas.py. Build it again: {_BUILD}"
        )


def _remedy(message: str) -> str:
    if "GLIBC" in message or "GLIBCXX" in message:
        return f"It was built on a newer system than this one. Build it here: {_BUILD}"
    if "undefined symbol" in message:
        return (
            f"torch {torch.__version__} lacks a symbol of the stable ABI that the library uses. "
            f"Install torch>=2.10, or build the library with the torch you have: {_BUILD}"
        )
    return f"The file is damaged or not a library for this system. Build it again: {_BUILD}"
