"""What kernels with matrix products share."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.triton.launch import blocks

_PROGRAMS = 1024


def precision(dtype: torch.dtype) -> str:
    """For `tl.dot`: products of float32 are exact unless torch is told to take TF32."""
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked else "ieee"


def bits(dtype: torch.dtype) -> int:
    """The width of an element, by which tables tell matrix instructions from exact float32."""
    return dtype.itemsize * 8


def pixel_stride(x: Tensor) -> int:
    """Between neighbouring pixels of `x` (B,C,H,W), whose pixels are in sequence."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def run_length(samples: int, pixels: int, block: int) -> tuple[int, int]:
    """How many blocks of pixels a program sums over, and how many programs that makes a sample.

    Enough programs to fill a large card twice, but no more partial sums than that. It depends on
    the sizes alone, so that every card adds in the same order.
    """
    tiles = blocks(pixels, block)
    run = max(1, samples * tiles // _PROGRAMS)
    return run, blocks(tiles, run)
