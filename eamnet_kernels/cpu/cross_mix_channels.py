"""`cross_mix_channels` in C++ (`csrc/cpu/cross_mix_channels.cpp`), its C x C algebra in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence, refuses
from eamnet_kernels.mixing import mix, mix_backward
from eamnet_kernels.ops.layout import accumulation_dtype, is_channels_last
from eamnet_kernels.reference.cross_mix_channels import working_dtype

_native = torch.ops.eamnet_kernels_native


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    return refuses(arguments["x"])


def _for_kernels(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The operands as the kernels take them; in float64 where few pixels ask for it."""
    # Kernels compute in accumulation_dtype, so only the float64 of few pixels is a conversion.
    few = working_dtype(x) != accumulation_dtype(x.dtype)
    return tuple(pixels_in_sequence(t.double() if few else t) for t in (x, *others))


def forward(
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """The result as `x` lies, and the Gram matrices (3,B,C,C)."""
    pixels, gate = _for_kernels(x, spatial_gate.contiguous())
    grams = _native.cross_mix_channels_grams(pixels, gate)
    matrices = mix(grams, channel_gate, w_spatial, w_channel, w_out, temperature).matrices
    out = _native.cross_mix_channels_apply(pixels, gate, matrices, is_channels_last(x))
    return out.to(x.dtype), grams.to(accumulation_dtype(x.dtype))


def backward(
    grad_out: Tensor,
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
    grams: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of the seven inputs, that of `x` as `x` lies."""
    pixels, gate, grad = _for_kernels(x, spatial_gate.contiguous(), grad_out)
    weights = (channel_gate, w_spatial, w_channel, w_out, temperature)
    grad_matrices = _native.cross_mix_channels_grad_matrices(grad, pixels, gate)
    if grad_matrices.dtype != grams.dtype:
        grams = _native.cross_mix_channels_grams(pixels, gate)
    mixing = mix(grams, *weights)
    doubled, *grad_weights = mix_backward(grad_matrices, mixing, grams)
    grad_x, grad_gate = _native.cross_mix_channels_apply_backward(
        grad, pixels, gate, mixing.matrices, doubled, is_channels_last(x)
    )
    return (
        grad_x.to(x.dtype),
        grad_gate.to(spatial_gate.dtype),
        *(g.to(w.dtype) for g, w in zip(grad_weights, weights, strict=True)),
    )
