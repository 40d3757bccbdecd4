"""The operators on the CPU: C++ kernels for the instruction set at hand (`csrc/cpu/`)."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def refuses(x: Tensor) -> str | None:
    """Why the CPU kernels cannot take `x`, or None: the part that is the same for all operators."""
    if x.device.type != "cpu":
        return f"it runs on the CPU and the input is on {x.device}"
    if x.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        return f"it accepts {accepted} and the input is {str(x.dtype).removeprefix('torch.')}"
    return None


def pixels_in_sequence(x: Tensor) -> Tensor:
    """`x` (B,C,H,W) in a layout that the kernels read where it lies; copied only if need be.

    That is: the pixels of a sample follow each other at one stride, and either pixels or channels
    are adjacent. So are contiguous and channels-last tensors and slices of them over B and C.
    """
    _, channels, height, width = x.shape
    _, channel_stride, row_stride, column_stride = x.stride()
    pixel_stride = column_stride if width > 1 else row_stride if height > 1 else 1
    rows_join = height == 1 or width == 1 or row_stride == width * column_stride
    if rows_join and (pixel_stride == 1 or channel_stride == 1 or channels == 1):
        return x
    # Not contiguous(): it returns a view without elements as it is, whatever its strides.
    return x.clone(memory_format=torch.contiguous_format)
