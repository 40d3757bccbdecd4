"""`gate_statistics` in CUDA C++: `csrc/cuda/gate_statistics.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cuda import refuses


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    return refuses(arguments["x"] if "x" in arguments else arguments["grad_pixel_mean"])


def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over `x`, read where it lies whatever its strides."""
    return torch.ops.eamnet_kernels_native.gate_statistics(x)


def backward(
    grad_pixel_mean: Tensor,
    grad_pixel_max: Tensor,
    grad_channel_mean: Tensor,
    grad_channel_max: Tensor,
    pixel_argmax: Tensor,
    channel_argmax: Tensor,
    channels_last: bool,
) -> Tensor:
    """The gradient of `x`, written in one pass, in the layout that `x` had."""
    return torch.ops.eamnet_kernels_native.gate_statistics_backward(
        grad_pixel_mean.contiguous(),
        grad_pixel_max.contiguous(),
        grad_channel_mean.contiguous(),
        grad_channel_max.contiguous(),
        pixel_argmax.contiguous(),
        channel_argmax.contiguous(),
        channels_last,
    )
