"""What every launch of a Triton kernel has in common: device, empty grids, wide offsets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from eamnet_kernels.triton import interpreted
from eamnet_kernels.triton.configurations import Configuration

if interpreted():
    from eamnet_kernels.triton import interpreter

    interpreter.correct()


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    configuration: Configuration

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the constants.

        Left alone, the assembler aims at a number of registers of its own, with which one more
        block would fit a multiprocessor. Where elements have an address each, because strides are
        odd, or addresses are long, it gets there by spilling what the card has registers for, and
        so it did with TF32; then it is told how many there are. Elsewhere its choice does no harm.
        Told so, it may also load more at once than there are registers for: what a rule of a table
        says with `all_registers=False`.
        """
        warps = self.configuration.num_warps
        found = {"num_warps": warps, "num_stages": self.configuration.num_stages}
        named = (self.arguments[place] for place in _places(tuple(self.kernel.arg_names)))
        odd = (v != 1 and v % 16 for v in named if type(v) is int)
        tf32 = self.constants.get("PRECISION") == "tf32"
        hard = tf32 or self.constants.get("WIDE") or any(odd)
        if hard and self.configuration.all_registers:
            found["maxnreg"] = min(255, _REGISTERS // (32 * warps))
        return found


_REGISTERS = 65536  # of a multiprocessor, on every card since compute capability 3.0
_STRIDE = re.compile("_(b|h|c|n|d|m[bcs])$")  # what kernels call the strides they are given


@cache
def _places(names: tuple[str, ...]) -> tuple[int, ...]:
    """Where the strides stand among a kernel's arguments, and tensors that are named alike."""
    return tuple(place for place, name in enumerate(names) if _STRIDE.search(name))


_record: list[Launch] | None = None


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    configuration: Configuration,
    **constants: Any,
) -> None:
    """Run `kernel` on the device of its first tensor, with the configuration's blocks as constants.

    The first dimension of a grid may have 2^31 - 1 programs, the others 65535.
    """
    constants = {**configuration.blocks, **constants}
    asked = Launch(kernel, tuple(grid), arguments, constants, configuration)
    if _record is not None:
        _record.append(asked)
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda":
        kernel[asked.grid](*arguments, **constants, **asked.options)
        return
    # Triton launches on the current device, whatever device the pointers belong to.
    with torch.cuda.device(device):
        kernel[asked.grid](*arguments, **constants, **asked.options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches are put on the list and not run: for looking at them, on meta tensors."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def wide(*tensors: Tensor) -> bool:
    """Whether an element of a sample lies 2^31 or more elements from the sample's first.

    Kernels take offsets of samples in 64 bits always, those within a sample only where this holds.
    """
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        >= 2**31
        for t in tensors
        if t.numel()
    )


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return triton.cdiv(size, block)


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`: what a whole dimension takes in a kernel."""
    return triton.next_power_of_2(max(1, size))
