"""What kernels with matrix products share."""

from __future__ import annotations

import torch


def precision(dtype: torch.dtype) -> str:
    """For `tl.dot`: products of float32 are exact unless torch is told to take TF32."""
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked else "ieee"


def bits(dtype: torch.dtype) -> int:
    """The width of an element, by which tables tell matrix instructions from exact float32."""
    return dtype.itemsize * 8
