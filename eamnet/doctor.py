"""``eamnet doctor``: what is installed, what would run where, and why the rest cannot."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

from eamnet.versions import cpu_model, git_commit, package_versions

__all__ = ["doctor"]

MINIMUM_TORCH = (2, 10)
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile")


def doctor(arguments: list[str]) -> int:
    """``eamnet doctor``: print the state of the installation.

    Returns:
        0 if everything that is needed works, else 1; the problems stand at the end.
    """
    # The only command without jsonargparse: it must run where packages are missing.
    parser = argparse.ArgumentParser(
        prog="eamnet doctor",
        description="Show versions, the compiled library, the machine, and which backend runs "
        "each operator and why not the others. The exit code is 1 if something needed is broken.",
    )
    parser.parse_args(arguments)
    problems: list[str] = []
    print("software")
    _line("python", platform.python_version())
    for name, version in package_versions().items():
        _line(name, version or "not installed")
    _line("commit", git_commit() or "none: an installed package")
    # The project itself may run from a checkout, uninstalled.
    missing = [n for n, v in package_versions().items() if v is None and n != "eamnet-kernels"]
    if missing:
        problems.append(f"missing: {', '.join(missing)}; pip install 'eamnet-kernels[train]'")
    print("\nmachine")
    for name, value in _machine().items():
        _line(name, value)
    try:
        problems += _torch()
    except Exception as error:  # whatever is wrong is what doctor is here to tell
        problems.append(f"{type(error).__name__}: {error}")
    if not problems:
        print("\nEverything that is needed works.")
        return 0
    print("\nproblems")
    for problem in problems:
        print(f"  - {problem}")
    return 1


def _line(name: str, value: object) -> None:
    print(f"  {name:<18} {value}")


def _machine() -> dict[str, str]:
    """Processor, its vector units, threads and memory."""
    found: dict[str, str] = {"system": platform.platform(), "cpu": cpu_model()}
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
        found["vector units"] = " ".join(f for f in _FLAGS if f in words) or "none of interest"
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory = {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in lines)}
        found["memory"] = (
            f"{memory['MemAvailable'] / 2**20:.1f} of {memory['MemTotal'] / 2**20:.1f} GiB free"
        )
    except (OSError, KeyError, ValueError, IndexError):
        found["vector units"] = "unknown: no /proc"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["cores"] = f"{usable} usable of {os.cpu_count()}"
    return found


def _torch() -> list[str]:
    """Print what needs torch; return the problems."""
    import torch

    problems: list[str] = []
    _line("torch threads", torch.get_num_threads())
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        problems.append(f"torch {torch.__version__} is too old; pip install -U 'torch>=2.10'")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            _line(f"gpu {index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    else:
        built = torch.version.cuda
        _line("gpu", f"none found (torch is built for {'CUDA ' + built if built else 'the CPU'})")

    from eamnet_kernels import backends, native

    print("\ncompiled library")
    if native.load():
        _line("state", "loaded")
        _line("instruction set", native.cpu_level())
    else:
        _line("state", "not loaded; the operators run on their other backends")
        problems.append(str(native.error()))
    record = native.facts() or {}
    for name in ("project_version", "torch_version", "torch_target", "compiler", "date"):
        if name in record:
            _line(name, record[name])

    print(f"\nbackends (asked for: {backends.selected()})")
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            print(f"\n  on {device}, {str(dtype).removeprefix('torch.')}:")
            for operator, (call, extra) in _samples(device, dtype).items():
                explanation = backends.explain(operator, **call, **extra)
                print("    " + str(explanation).replace("\n", "\n    "))
                problems += _check(operator, call, device, dtype)
    return problems


def _samples(device: str, dtype: Any) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """A small call of each operator: its arguments, and what its schema takes beside them."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.rand(shape, generator=generator).to(device, dtype)

    batch, channels, side, heads, slots = 1, 16, 16, 2, 8
    pixels, c = side * side, channels // 4
    x = random(batch, channels, side, side)
    square = random(channels, channels)
    tokens = ("q_s", "k_s", "v_s", "q_c", "k_c", "v_c")
    return {
        "gate_statistics": ({"x": x}, {}),
        "cross_mix_pixels": (
            {
                **{t: random(batch, heads, pixels, channels // heads) for t in tokens},
                "spatial_gate": random(batch, pixels),
                "scale": 0.25,
            },
            {"save_for_backward": False},
        ),
        "cross_mix_channels": (
            {
                "x": x,
                "spatial_gate": random(batch, 1, side, side),
                "channel_gate": random(batch, channels),
                "w_spatial": random(3 * channels, channels),
                "w_channel": random(3 * channels, channels),
                "w_out": square,
                "temperature": random(2, heads),
            },
            {},
        ),
        "external_memory": (
            {
                "x": x,
                "memory_key": random(slots, channels),
                "memory_value": random(slots, channels),
                "w_out": square,
                "top_k": channels,
            },
            {},
        ),
        "multi_dilation_conv": (
            {
                "x": x,
                "w_branches": [random(c, c, 3, 3) for _ in range(3)],
                "w_point": square,
                "bias": None,
                "dilations": (3, 5, 7),
                "activation": "relu",
            },
            {"save_for_backward": False},
        ),
    }


def _check(operator: str, call: dict[str, Any], device: str, dtype: Any) -> list[str]:
    """Run a call as it would run and compare it with the reference in float64."""
    import torch

    from eamnet_kernels import functional, use_backend

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(v) for v in value]
        return value.double() if isinstance(value, torch.Tensor) else value

    where = f"{operator} on {device}, {dtype}"
    try:
        with torch.inference_mode():
            found = getattr(functional, operator)(**call)
            with use_backend("reference"):
                expected = getattr(functional, operator)(**{k: wide(v) for k, v in call.items()})
    except Exception as error:  # whatever is wrong is what doctor is here to tell
        return [f"{where} fails: {type(error).__name__}: {error}"]
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    # Coarse on purpose: a broken build is wrong by more than bfloat16's rounding of a few sums.
    # How exact the operators are is what the test suite is about.
    for value, truth in pairs:
        deviation = (value.double() - truth).norm() / truth.norm()
        if not deviation < 0.05:
            return [f"{where} is wrong: its relative error is {float(deviation):.2g}"]
    return []
