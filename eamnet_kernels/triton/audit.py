"""Compile every Triton kernel that ships, for cards that are not there, and look at the result.

    python -m eamnet_kernels.triton.audit                 # compile, check, print the table
    python -m eamnet_kernels.triton.audit --write docs    # and write docs/triton-audit.{md,json}

The operators' modules run on meta tensors (`exercise`), their launches are recorded, and each is
compiled as Triton would compile it at that launch: the same specialisation, the same constants. It
is a fault if a kernel spills registers or uses local memory, if it wants more shared memory than
the card gives a block, if a product of bfloat16, float16 or TF32 became scalar arithmetic, if one
of float32 that was to be exact became TF32 or the other way round, or if a rule of a table met no
launch.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from eamnet_kernels import backends
from eamnet_kernels.triton import configurations
from eamnet_kernels.triton.launch import Launch, recorded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
_FORMS = (("nchw", "ieee"), ("channels-last", "ieee"), ("nchw", "tf32"))


@dataclass(frozen=True)
class Card:
    """What an architecture gives; CUDA C++ Programming Guide 13.0, table of technical data."""

    name: str
    shared_of_block: int
    shared_of_multiprocessor: int
    warps: int = 64
    registers: int = 65536
    blocks: int = 32


CARDS = {
    80: Card("A100", 163 << 10, 164 << 10),
    90: Card("H100", 227 << 10, 228 << 10),
    100: Card("B200", 227 << 10, 228 << 10),
}
_RESERVED_SHARED = 1 << 10  # of each block, by the system; same source


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched: what makes Triton compile it anew."""

    kernel: str
    dtype: str
    layout: str
    integers: str  # what Triton took to be known of them: 1, or divisible by 16
    constants: str
    launch: Launch

    @property
    def name(self) -> str:
        """One line that tells it from all others."""
        return " ".join((self.kernel, self.dtype, self.layout, self.integers, self.constants))


@dataclass(frozen=True)
class Row:
    """What became of a variant on an architecture."""

    kernel: str
    dtype: str
    layout: str
    integers: str
    constants: str
    architecture: int
    registers: int
    stack: int  # bytes of local memory of a thread
    spills: int  # loads from and stores to it
    shared: int  # bytes of a block
    occupancy: float  # warps that fit a multiprocessor at once, of those it can hold
    matrix: int  # matrix instructions
    fused: int  # scalar multiply-adds in float32
    wide_loads: int  # of 128 bits, from global memory
    loads: int
    wide_stores: int
    stores: int
    low_precision_dots: int  # products meant for matrix instructions, and
    exact_dots: int  # for scalar arithmetic, in Triton's own form of the kernel

    def faults(self) -> list[str]:
        """What is wrong with it."""
        card = CARDS[self.architecture]
        found = []
        if self.spills or self.stack:
            found.append(f"{self.stack} bytes of local memory, {self.spills} accesses")
        if self.shared > card.shared_of_block:
            found.append(f"{self.shared} bytes of shared memory; {card.shared_of_block} are there")
        if self.low_precision_dots and not self.matrix:
            found.append("a product became scalar arithmetic")
        if self.exact_dots and not self.low_precision_dots and self.matrix:
            found.append("a product of float32 became TF32")
        if self.exact_dots and "PRECISION=tf32" in self.constants:
            found.append("a product that was to be TF32 stayed exact")
        return [f"{self.name} sm_{self.architecture}: {fault}" for fault in found]

    @property
    def name(self) -> str:
        """That of the variant."""
        return " ".join((self.kernel, self.dtype, self.layout, self.integers, self.constants))


def _meta(dtype: torch.dtype, layout: str) -> Any:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device="meta")
        return made.contiguous(memory_format=LAYOUTS[layout]) if made.dim() == 4 else made

    return empty


@contextmanager
def _precision(of_float32: str) -> Iterator[None]:
    """What torch asks of products of float32, within."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = of_float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def variants(
    operators: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = DTYPES
) -> Iterator[Variant]:
    """Every kernel of the operators in every form that the tables' rules lead to, once.

    With TF32, one layout; with offsets of 64 bits, no float16 and no TF32.
    """
    backend = backends.get("triton")
    seen = set()
    for operator in operators or backend.operators:
        module = backend.module(operator)
        for dtype in dtypes:
            for layout, precision in _FORMS:
                if precision == "tf32" and dtype != torch.float32:
                    continue
                with recorded() as launches, _precision(precision):
                    module.exercise(_meta(dtype, layout))
                for launch in launches:
                    lean = dtype == torch.float16 or precision == "tf32"
                    if launch.constants.get("WIDE") and lean:
                        continue
                    kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                    options = launch.options.items()
                    constants = " ".join(
                        f"{name.removeprefix('num_')}={_plain(value)}"
                        for name, value in (*launch.constants.items(), *options)
                    )
                    variant = Variant(
                        f"{operator}.{kernel}",
                        str(dtype).removeprefix("torch."),
                        layout,
                        _integers(launch),
                        constants,
                        launch,
                    )
                    # Shapes that specialise alike compile to the same.
                    if variant.name not in seen:
                        seen.add(variant.name)
                        yield variant


def _integers(launch: Launch) -> str:
    given = zip(launch.kernel.params, launch.arguments, strict=False)
    kinds = {
        p.name: 1 if v == 1 else 16
        for p, v in given
        if type(v) is int and not p.do_not_specialize and (v == 1 or v % 16 == 0)
    }
    return " ".join(f"{name}:{kind}" for name, kind in kinds.items()) or "none"


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def unmet_rules(operators: Iterable[str] | None = None) -> list[str]:
    """The rules of the tables that no call of `exercise` leads to."""
    backend = backends.get("triton")
    names = tuple(operators or backend.operators)
    modules = {name: backend.module(name) for name in names}
    with configurations.watched() as seen:
        for module in modules.values():
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    with recorded():
                        module.exercise(_meta(dtype, layout))
    used: dict[str, list[configurations.Configuration]] = {}
    for (table, _), configuration in seen.items():
        used.setdefault(table, []).append(configuration)
    return [
        f"{name}: no launch meets the rule for {dict(rule.where) or 'the rest'}"
        for name, table in configurations.TABLES.items()
        if name.split(".")[0] in names
        for rule in table.rules
        if rule.configuration not in used.get(name, [])
    ]


def _source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile at a launch; the steps of `JITFunction.run` before it compiles."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.constants, **launch.options}
    bound, specialization, rest = bind(*launch.arguments, **given)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, {**given, **rest}, bound, specialization, rest
    )
    return ASTSource(kernel, signature, constants, attributes), parsed.__dict__


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_DOT = re.compile(r"tt\.dot .*")


def compile_variant(variant: Variant, architecture: int, **options: Any) -> Row:
    """Compile for `architecture` (80 for sm_80); `options` go to Triton."""
    target = GPUTarget("cuda", architecture, 32)
    source, parsed = _source(variant.launch, target)
    compiled = triton.compile(source, target=target, options={**parsed, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    codes = _INSTRUCTION.findall(text)

    def count(*starts: str) -> int:
        return sum(code.startswith(starts) for code in codes)

    def wide(*starts: str) -> int:
        return sum(code.startswith(starts) and ".128" in code for code in codes)

    dots = _DOT.findall(compiled.asm["ttir"])
    exact = [d for d in dots if re.search(r":.*xf32> \*", d) and "tf32" not in d]
    shared = int(compiled.metadata.shared)
    return Row(
        variant.kernel,
        variant.dtype,
        variant.layout,
        variant.integers,
        variant.constants,
        architecture,
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        spills=count("LDL", "STL"),
        shared=shared,
        occupancy=_occupancy(
            CARDS[architecture], used["REG"], variant.launch.configuration.num_warps, shared
        ),
        matrix=count("HMMA", "HGMMA", "UTCHMMA", "OMMA", "QMMA"),
        fused=count("FFMA"),
        wide_loads=wide("LDG", "LDGSTS"),
        loads=count("LDG"),
        wide_stores=wide("STG"),
        stores=count("STG"),
        low_precision_dots=len(dots) - len(exact),
        exact_dots=len(exact),
    )


def _occupancy(card: Card, registers: int, warps: int, shared: int) -> float:
    of_warp = -(-registers * 32 // 256) * 256  # registers are given out 256 at a time
    fitting = min(
        card.blocks,
        card.warps // warps,
        card.registers // (of_warp * warps),
        card.shared_of_multiprocessor // (shared + _RESERVED_SHARED),
    )
    return fitting * warps / card.warps


def versions() -> dict[str, str]:
    """What the table depends on beside the source."""
    return {"triton": triton.__version__}


def markdown(rows: list[Row]) -> str:
    """The table as a page."""
    head = (
        "# Compile audit of the Triton kernels\n\n"
        f"Written by `python -m eamnet_kernels.triton.audit --write docs` with Triton "
        f"{triton.__version__}; see [triton.md](triton.md). Nothing here was run: it is what the "
        "compiler made of every kernel and configuration that ships. *Integers* are the arguments "
        "known to be 1 or divisible by 16. *Occupancy* is the share of a multiprocessor's warps "
        "that fit at once; *matrix* counts matrix instructions, *FFMA* scalar multiply-adds; loads "
        "and stores are of global memory, *wide* are those of 128 bits.\n\n"
    )
    titles = (
        "kernel", "dtype", "layout", "integers", "constants", "sm", "registers", "spills", "shared",
        "occupancy", "matrix", "FFMA", "loads (wide)", "stores (wide)",
    )  # fmt: skip
    cells: list[Sequence[object]] = [titles, ["---"] * len(titles)]
    for r in rows:
        cells.append([
            f"`{r.kernel}`", r.dtype, r.layout, r.integers, r.constants, r.architecture,
            r.registers, r.spills, r.shared, f"{r.occupancy:.0%}", r.matrix, r.fused,
            f"{r.loads} ({r.wide_loads})", f"{r.stores} ({r.wide_stores})",
        ])  # fmt: skip
    return head + "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


def _others(file: Path, operators: list[str]) -> list[Row]:
    """The rows of a table for all but `operators`, which are written anew."""
    table = json.loads(file.read_text())
    if table["versions"] != versions():
        raise ValueError(f"{file} is of {table['versions']}: audit all operators")
    rows = (Row(**row) for row in table["rows"])
    return [row for row in rows if row.kernel.split(".")[0] not in operators]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 where there are faults."""
    parser = argparse.ArgumentParser(prog="python -m eamnet_kernels.triton.audit")
    parser.add_argument("--write", type=Path, help="folder of triton-audit.md and .json")
    parser.add_argument("--op", action="append", choices=backends.get("triton").operators)
    parser.add_argument("--architecture", type=int, action="append", choices=tuple(CARDS))
    options = parser.parse_args(arguments)
    rows, faults = [], unmet_rules(options.op)
    for variant in variants(options.op):
        for architecture in options.architecture or CARDS:
            if variant.dtype == "float16" and architecture != 90:
                continue  # it differs from bfloat16 in conversions only
            row = compile_variant(variant, architecture)
            rows.append(row)
            faults += row.faults()
            print(
                f"{variant.name} sm_{architecture}: {row.registers} registers, {row.spills} spills,"
                f" {row.shared} B shared, {row.occupancy:.0%}, {row.matrix} matrix,"
                f" {row.wide_loads}/{row.loads} loads wide, {row.wide_stores}/{row.stores} stores",
                flush=True,
            )
    if options.write:
        if options.op:
            rows += _others(options.write / "triton-audit.json", options.op)
            order = backends.get("triton").operators
            rows.sort(key=lambda row: order.index(row.kernel.split(".")[0]))
        (options.write / "triton-audit.md").write_text(markdown(rows))
        # A row in a line, so that a change shows as one.
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        content = f'{{"versions": {json.dumps(versions())}, "rows": [\n{lines}\n]}}\n'
        (options.write / "triton-audit.json").write_text(content)
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
