"""`gate_statistics` in C++: `csrc/cpu/gate_statistics.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence, refuses


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    return refuses(arguments["x"] if "x" in arguments else arguments["grad_pixel_mean"])


def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over `x`, which is not copied if contiguous or channels-last."""
    return torch.ops.eamnet_kernels_native.gate_statistics(pixels_in_sequence(x))


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
