"""`external_memory` in C++, `csrc/cpu/external_memory.cpp`; the C x S algebra backward in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence, refuses
from eamnet_kernels.ops.layout import accumulation_dtype, is_channels_last

_native = torch.ops.eamnet_kernels_native


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    return refuses(arguments["x"])


def forward(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result as `x` lies, the log-sum-exp of each slot, and which channels were kept."""
    weights = (_as_computed(w, x) for w in (memory_key, memory_value, w_out))
    return _native.external_memory(pixels_in_sequence(x), *weights, top_k, is_channels_last(x))


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
    grad, pixels = pixels_in_sequence(grad_out), pixels_in_sequence(x)
    key, value = _as_computed(memory_key, x), _as_computed(memory_value, x)
    w_kept = _as_computed(w_out, x) * kept.unsqueeze(1)
    readout = w_kept @ value.t()
    grad_x, grad_key, grad_readout = _native.external_memory_backward(
        grad, pixels, key, readout, lse.contiguous(), is_channels_last(x)
    )
    grad_w_out = ((grad_readout @ value) * kept.unsqueeze(1)).sum(0)
    grad_value = grad_readout.flatten(0, 1).t() @ w_kept.flatten(0, 1)
    return (
        grad_x,
        grad_key.to(memory_key.dtype),
        grad_value.to(memory_value.dtype),
        grad_w_out.to(w_out.dtype),
    )


def _as_computed(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(accumulation_dtype(x.dtype)).contiguous()
