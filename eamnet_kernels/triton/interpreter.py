"""Corrections to Triton's interpreter (3.6 to 3.8), which keeps bfloat16 as its bits in uint16.

It rounds float32 to bfloat16 towards zero, where the hardware rounds to nearest even, and `tl.dot`
multiplies the bits as integers. Arithmetic on bfloat16 outside of `tl.dot` stays wrong there:
kernels convert to float32 when they load. Only `launch` imports this, and only when interpreting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_float32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: Any) -> Any:
    values = np.ascontiguousarray(values)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def correct() -> None:
    """Give the interpreter bfloat16 as the hardware has it."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        given, wanted = src.dtype.scalar, dst_type.scalar
        if given == wanted or tl.bfloat16 not in (given, wanted):
            return cast(self, src, dst_type)
        if given == tl.bfloat16:
            widened = handle(_to_float32(src.data), tl.float32)
            return widened if wanted == tl.float32 else cast(self, widened, dst_type)
        if given != tl.float32:
            src = cast(self, src, tl.float32)
        return handle(_to_bfloat16(src.data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(_to_float32(m.data), tl.float32) for m in (a, b))
        return dot(self, a, b, *rest)

    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
