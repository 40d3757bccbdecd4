"""What every launch of a Triton kernel has in common: device, empty grids, wide offsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    if _record is not None:
        _record.append(Launch(kernel, tuple(grid), arguments, constants, configuration))
        return
    if 0 in grid:
        return
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type != "cuda":
        kernel[tuple(grid)](*arguments, **constants, **options)
        return
    # Triton launches on the current device, whatever device the pointers belong to.
    with torch.cuda.device(device):
        kernel[tuple(grid)](*arguments, **constants, **options)


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
