"""`external_memory` in C++ (`csrc/cpu/external_memory.cpp`), its small matrices in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence, refuses
from eamnet_kernels.ops.layout import accumulation_dtype, is_channels_last
from eamnet_kernels.reference.external_memory import kept_channels

_native = torch.ops.eamnet_kernels_native


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    return refuses(arguments["x"])


def forward(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result as `x` lies, the log-sum-exp of each slot, and which channels were kept."""
    dtype = accumulation_dtype(x.dtype)
    pixels, key = pixels_in_sequence(x), memory_key.to(dtype).contiguous()
    value = memory_value.to(dtype).t().contiguous()
    lse, logits = _native.external_memory_lse(pixels, key)
    if top_k == x.shape[1]:
        kept = torch.ones(x.shape[:2], dtype=torch.bool)
    else:
        scores = _native.external_memory_scores(pixels, key, value, lse, logits)
        kept = kept_channels(scores, top_k)
    # Small, and its errors would add up over the slots: in float64, then rounded once.
    readout = ((w_out.double() * kept.unsqueeze(1)) @ value.double()).to(dtype)
    out = _native.external_memory_read(pixels, key, readout, lse, logits, is_channels_last(x))
    return out, lse.to(dtype), kept


def backward(
    grad_out: Tensor,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    w_out: Tensor,
    lse: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the four inputs, that of `x` as `x` lies."""
    dtype = accumulation_dtype(x.dtype)
    grad, pixels = pixels_in_sequence(grad_out), pixels_in_sequence(x)
    key, value = memory_key.to(dtype).contiguous(), memory_value.to(dtype)
    w_kept = w_out.to(dtype) * kept.unsqueeze(1)
    readout = w_kept @ value.t()
    lse = lse.double()
    grad_readout, row = _native.external_memory_backward_sums(grad, pixels, key, readout, lse)
    grad_x, grad_key = _native.external_memory_backward(
        grad, pixels, key, readout, lse, row, is_channels_last(x)
    )
    grad_w_out = ((grad_readout @ value) * kept.unsqueeze(1)).sum(0)
    grad_value = (grad_readout.transpose(1, 2) @ w_kept).sum(0)
    return (
        grad_x,
        grad_key.to(memory_key.dtype),
        grad_value.to(memory_value.dtype),
        grad_w_out.to(w_out.dtype),
    )
