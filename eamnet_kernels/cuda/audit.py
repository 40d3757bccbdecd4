"""What the compiler made of the CUDA kernels: `python -m eamnet_kernels.cuda.audit [--write docs]`.

Reads the machine code in `_C_cuda.so` with the tools in the Triton wheel; needs no GPU. Per kernel
and architecture: registers, shared memory, how many threads fit on a multiprocessor, and how often
the instructions that matter stand in the code. It fails where a kernel uses local memory (which is
where registers spill), where a product in a 16-bit type is not made of matrix instructions, where
one in float32 is, where a kernel on feature maps lacks 16-byte accesses, or where a block takes
more shared memory than a card has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eamnet_kernels import native

SHAPE = (4, 64, 128, 128)
DILATIONS = (3, 5, 7)
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # Type of csrc/cuda/launch.h


@dataclass(frozen=True)
class Card:
    """From the CUDA programming guide: of a multiprocessor, except as named."""

    multiprocessors: int
    shared_bytes: int
    shared_bytes_of_a_block: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


CARDS = {
    "sm_80": Card(108, 164 << 10, 163 << 10),  # A100
    "sm_90": Card(132, 228 << 10, 227 << 10),  # H100
}
PRODUCTS = (
    "conv_forward",
    "stencil_backward, dense",
    "point_backward",
    "dense_gradient",
    "point_gradient",
)
LOADS = (*PRODUCTS, "stencil_backward, depthwise", "depthwise_gradient", "gate_tiles")
STORES = (
    "conv_forward",
    "point_backward",
    "stencil_backward, dense",
    "stencil_backward, depthwise",
    "gate_backward",
)
LAUNCHES = {  # in the order of launch_forward and launch_backward of csrc/cuda/*_host.h
    ("multi_dilation_conv", False): ("pack_weights", "conv_forward"),
    ("multi_dilation_conv", True): (
        "pack_weights, backward",
        "point_backward",
        "stencil_backward",
        "gradient",
        "point_gradient",
        "sum_partials",
    ),
    ("gate_statistics", False): ("gate_tiles", "gate_channels"),
    ("gate_statistics", True): ("gate_backward",),
}


@dataclass
class Row:
    """One kernel on one architecture. `threads_per_multiprocessor` at SHAPE, by all limits."""

    architecture: str
    kernel: str
    dtype: str
    registers: int
    local_bytes: int
    threads: int
    shared_bytes: int
    threads_per_multiprocessor: int
    matrix: int
    loads_16: int
    async_copies_16: int
    stores_16: int
    local: int

    def faults(self) -> list[str]:
        """What the module's docstring forbids."""
        product = self.kernel.startswith(PRODUCTS)
        found = {
            "uses local memory: registers spill": self.local or self.local_bytes,
            "has a product without matrix instructions": (
                product and self.dtype != "float32" and not self.matrix
            ),
            "multiplies float32 by matrix instructions": self.dtype == "float32" and self.matrix,
            "has no 16-byte loads": (
                self.kernel.startswith(LOADS) and not self.loads_16 + self.async_copies_16
            ),
            "has no 16-byte stores": self.kernel.startswith(STORES) and not self.stores_16,
            "takes more shared memory than a block can have": (
                self.shared_bytes > CARDS[self.architecture].shared_bytes_of_a_block
            ),
        }
        name = f"{self.kernel} ({self.dtype}, {self.architecture})"
        return [f"{name} {fault}" for fault, there in found.items() if there]


def cuobjdump() -> Path:
    """The disassembler of the Triton wheel; RuntimeError where that is not installed."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"the audit uses the tools in the Triton wheel: {error}") from error
    assert triton.__file__ is not None
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _dump(library: Path, *options: str) -> str:
    # nvdisasm, which it calls, stands beside it.
    tool = cuobjdump()
    return subprocess.run(
        [tool, *options, str(library)],
        env={"PATH": f"{tool.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _readable(mangled: str) -> tuple[str, str]:
    """The kernel's name and dtype from a mangled template instance."""
    match = re.match(r"_ZN6eamnet4cuda\d+([a-z_]+)I(f|NS0_\d+(\w+?)E)((?:Lb[01]E)*)E", mangled)
    if match is None:
        raise ValueError(f"{mangled} is not a kernel of csrc/cuda")
    flags = re.findall(r"Lb([01])E", match[4])
    name = match[1]
    if flags:
        name += ", depthwise" if flags[0] == "1" else ", dense"
    if flags[1:] == ["1"]:
        name += ", backward"
    return name, "float32" if match[2] == "f" else match[3]


@cache
def _launches(operator: str, backward: bool, depthwise: bool, dtype: str, card: Card) -> list[int]:
    limits = (card.shared_bytes_of_a_block, card.multiprocessors)
    ops: Any = torch.ops.eamnet_kernels_native
    if operator == "gate_statistics":
        return list(ops.gate_statistics_launches(SHAPE, TYPES[dtype], backward, *limits))
    return list(
        ops.multi_dilation_conv_launches(
            SHAPE, DILATIONS, TYPES[dtype], depthwise, True, backward, *limits
        )
    )


def _block(kernel: str, dtype: str, card: Card) -> tuple[int, int]:
    """Threads and shared memory of a block of the kernel at SHAPE."""
    depthwise = "depthwise" in kernel
    for (operator, backward), names in LAUNCHES.items():
        numbers = _launches(operator, backward, depthwise, dtype, card)
        for i, name in enumerate(names):
            base, _, rest = kernel.partition(", ")
            turned = ", backward" if rest.endswith("backward") else ""
            if base.removeprefix("dense_").removeprefix("depthwise_") + turned == name:
                return numbers[3 * i + 1], numbers[3 * i + 2]
    raise ValueError(f"nothing launches {kernel}")


def resident_threads(registers: int, threads: int, shared_bytes: int, card: Card) -> int:
    """Threads of as many blocks as fit on a multiprocessor."""
    warps = threads // 32
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are given out by 256
    blocks = min(
        card.blocks,
        card.warps // warps,
        card.registers // (of_a_warp * warps),
        card.shared_bytes // (shared_bytes + 1024),  # the system keeps 1 KiB of each block's
    )
    return blocks * threads


def audit(library: Path) -> list[Row]:
    """A row per kernel and architecture in the library."""
    resources: dict[tuple[str, str], tuple[int, int]] = {}
    architecture = ""
    name = ""
    for line in _dump(library, "--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            resources[architecture, name] = (int(match[1]), int(match[2]) + int(match[3]))
    opcodes: dict[tuple[str, str], list[str]] = {}
    for line in _dump(library, "-sass").splitlines():
        if match := re.match(r"\s*code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            opcodes[architecture, match[1]] = current = []
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", line):
            current.append(match[1])
    rows = []
    for (architecture, mangled), codes in opcodes.items():
        kernel, dtype = _readable(mangled)
        card = CARDS[architecture]
        registers, local_bytes = resources[architecture, mangled]
        threads, shared_bytes = _block(kernel, dtype, card)

        def count(pattern: str, codes: list[str] = codes) -> int:
            return sum(re.match(pattern, code) is not None for code in codes)

        rows.append(
            Row(
                architecture,
                kernel,
                dtype,
                registers,
                local_bytes,
                threads,
                shared_bytes,
                resident_threads(registers, threads, shared_bytes, card),
                count(r"[HQIB]MMA|HGMMA"),
                count(r"LDG\..*128"),
                count(r"LDGSTS\..*128"),
                count(r"STG\..*128"),
                count(r"LDL|STL"),
            )
        )
    return sorted(rows, key=lambda r: (r.architecture, r.kernel, r.dtype))


def markdown(rows: list[Row], record: dict[str, Any]) -> str:
    """The table as docs/cuda-audit.md has it."""
    lines = [
        "# What the compiler made of the CUDA kernels",
        "",
        "Written by `python -m eamnet_kernels.cuda.audit --write docs`; a change to it belongs in",
        f"the same commit as the change that causes it. CUDA {record['cuda_version']}.",
        "",
        "Instructions are counted as they stand in the code, not as they are executed. Threads,",
        "shared memory (KiB per block) and occupancy are those of a channels-last call of shape",
        f"{SHAPE}, dilations {DILATIONS}; occupancy is the part of a multiprocessor's 2048",
        "threads that fits.",
        "",
        "| card | kernel | dtype | registers | local bytes | threads | shared | occupancy"
        " | matrix | 16-byte loads | asynchronous | 16-byte stores |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        cells = (
            r.architecture,
            r.kernel,
            r.dtype,
            r.registers,
            r.local_bytes,
            r.threads,
            f"{r.shared_bytes / 1024:.1f}",
            f"{r.threads_per_multiprocessor / 2048:.0%}",
            r.matrix,
            r.loads_16,
            r.async_copies_16,
            r.stores_16,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print or write the table; 1 where something in it is at fault."""
    parser = argparse.ArgumentParser(description="Audit the machine code of the CUDA kernels.")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write cuda-audit.{md,json}")
    parser.add_argument("--library", type=Path, help="another one than the installed _C_cuda.so")
    options = parser.parse_args(arguments)
    library = options.library or Path(native.__file__).with_name("_C_cuda.so")
    if options.library is not None and native.load():
        torch.ops.load_library(library)
    elif (reason := native.cuda_error()) is not None:
        print(reason, file=sys.stderr)
        return 2
    rows = audit(library)
    record = json.loads(library.with_suffix(".json").read_text())
    if options.write is None:
        print(markdown(rows, record))
    else:
        (options.write / "cuda-audit.md").write_text(markdown(rows, record))
        table = {"cuda_version": record["cuda_version"], "rows": [asdict(r) for r in rows]}
        (options.write / "cuda-audit.json").write_text(json.dumps(table, indent=1) + "\n")
    faults = [fault for row in rows for fault in row.faults()]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
