"""What kernels with matrix products share."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from eamnet_kernels.triton import interpreted
from eamnet_kernels.triton.configurations import Configuration, Table
from eamnet_kernels.triton.launch import blocks, power_of_two

_PROGRAMS = 1024

# The interpreter's time is that of statements, whatever the sizes: large blocks, but none that the
# conformance suite's cases do not go beyond.
_INTERPRETED = {
    "PIXELS": 256,
    "DEPTH": 64,
    "CHANNELS": 32,
    "ROWS": 32,
    "GROUP": 32,
    "QUERIES": 64,
    "KEYS": 64,
    "TILES": 2,
}


def precision(dtype: torch.dtype) -> str:
    """For `tl.dot`: products of float32 are exact unless torch is told to take TF32.

    Told for matrix products, also where the product is a convolution's: there torch takes TF32 by
    default, but cuDNN not for all of them, and rounds where `tl.dot` cuts digits off. Following it,
    errors were 1.02 to 1.34 times what is allowed beside cuDNN's, and far more where that stayed
    exact (H200, 2026-11-27).
    """
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked else "ieee"


def exact_float32(x: Tensor) -> bool:
    """Whether products of `x` are exact ones of float32, which matrix instructions do not make."""
    return x.dtype == torch.float32 and precision(x.dtype) == "ieee"


def configured(table: Table, x: Tensor, **key: int) -> Configuration:
    """A table's configuration for the width of the elements of `x`, by which tables tell matrix
    instructions from exact float32, and `key`.
    """
    found = table.configuration(x.device, bits=x.dtype.itemsize * 8, **key)
    if interpreted():
        sizes = {name: _INTERPRETED.get(name, size) for name, size in found.blocks.items()}
        found = replace(found, blocks=sizes)
    return found


def pixel_stride(x: Tensor) -> int:
    """Between neighbouring pixels of `x` (B,C,H,W), whose pixels are in sequence."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of samples, channels and pixels of `x` (B,C,H,W), whose pixels are in sequence."""
    return x.stride(0), x.stride(1), pixel_stride(x)


def run_length(
    samples: int, pixels: int, block: int, programs: int | None = None
) -> tuple[int, int]:
    """How many blocks of pixels a program sums over, and how many programs that makes a sample.

    Enough programs to fill a large card twice, or `programs` if that is less, but no more partial
    sums than that. It depends on the sizes alone, so that every card adds in the same order.
    """
    tiles = blocks(pixels, block)
    run = max(1, samples * tiles // min(_PROGRAMS, programs or _PROGRAMS))
    return run, blocks(tiles, run)


def parts_of_sum(tiles: int, programs: int) -> int:
    """Into how many parts, of `programs` programs each, a sum over `tiles` blocks of pixels is cut.

    As many programs as `run_length` aims at, also by the sizes alone.
    """
    return min(tiles, blocks(_PROGRAMS, programs))


def within(configuration: Configuration, channels: int, *names: str) -> dict[str, int]:
    """Blocks of channels that are no larger than the channels."""
    padded = power_of_two(max(16, channels))
    return {name: min(configuration.blocks[name], padded) for name in names}


@triton.jit
def tile(  # type: ignore[no-untyped-def]
    x,  # (C,N) of one sample
    c,
    n,
    C,
    N,
    stride_c,
    stride_n,
    WIDE: tl.constexpr,
):
    """Channels `c` of pixels `n`, zero beyond C and N."""
    index = tl.int64 if WIDE else tl.int32
    at = x + (c.to(index) * stride_c)[:, None] + (n.to(index) * stride_n)[None, :]
    return tl.load(at, (c < C)[:, None] & (n < N)[None, :], other=0.0)
