"""`cross_mix_channels` in C++: the passes over pixels are native, the C x C algebra between is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments, cpu_tensors_reason
from eamnet_kernels.ops.layout import is_channels_last
from eamnet_kernels.reference.cross_mix_channels import mixing_matrices, mixing_matrices_backward

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_native = torch.ops.eamnet_kernels_native


def can_run(arguments: Arguments) -> str | None:
    return cpu_tensors_reason(arguments, _DTYPES)


def forward(
    x: Tensor,
    spatial_gate: Tensor,
    channel_gate: Tensor,
    w_spatial: Tensor,
    w_channel: Tensor,
    w_out: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    gate = spatial_gate.contiguous()
    grams = _native.cross_mix_channels_grams(x, gate)
    matrices = mixing_matrices(grams, channel_gate, w_spatial, w_channel, w_out, temperature)
    out = _native.cross_mix_channels_apply(x, gate, matrices.contiguous(), is_channels_last(x))
    return out, grams


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
    gate = spatial_gate.contiguous()
    weights = (channel_gate, w_spatial, w_channel, w_out, temperature)
    grad_matrices = _native.cross_mix_channels_grad_matrices(grad_out, x, gate)
    grad_grams, *grad_weights = mixing_matrices_backward(grad_matrices, grams, *weights)
    matrices = mixing_matrices(grams, *weights)
    grad_x, grad_gate = _native.cross_mix_channels_apply_backward(
        grad_out, x, gate, matrices, 2 * grad_grams, is_channels_last(x)
    )
    return grad_x, grad_gate, *grad_weights
