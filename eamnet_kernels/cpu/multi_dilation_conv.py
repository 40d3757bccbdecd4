"""`multi_dilation_conv` in C++: `csrc/cpu/multi_dilation_conv.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eamnet_kernels import native
from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence, refuses
from eamnet_kernels.ops.layout import is_channels_last


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    return refuses(arguments["x"])


def declines(arguments: Arguments) -> str | None:
    """Dense branches of many channels, where oneDNN was measured faster.

    bfloat16 in matrix tiles, forward and with backward, this kernel's speed over that of
    `reference`: 0.87 and 0.99 for 4x256x32x32 in channels-last and 1.9 and 1.6 in NCHW; 0.58 and
    0.51 for 4x512x16x16 and 1.1 and 0.73 in NCHW (`python -m bench --op multi_dilation_conv
    --dtype bfloat16 --no-compile --shape ...`, 2026-11-28, Sapphire Rapids class Xeon, two cores).
    float32 with C = 256 in channels-last: 0.96 and 0.99 with AVX-512, in NCHW 1.32 and 1.17
    (bench/results/xeon-2core/full); 0.90 and 0.99 with AVX2, in NCHW 1.30 and 1.22
    (bench/results/epyc-2core/dense-256), so that only inference is left out. Depthwise branches and
    other sizes are as fast or faster throughout.
    """
    x, w_branches = arguments["x"], arguments["w_branches"]
    depthwise = len(w_branches) == 0 or w_branches[0].shape[1] == 1
    if depthwise or x.shape[1] < 256:
        return None
    last = is_channels_last(x)
    if x.dtype == torch.bfloat16 and native.cpu_level() == "amx_bf16":
        if last or x.shape[1] >= 512:
            return "dense bfloat16 branches of so many channels: oneDNN's AMX was faster"
    elif x.dtype == torch.float32 and last and arguments.get("save_for_backward") is False:
        return "dense float32 branches of so many channels: faster in oneDNN for inference"
    return None


def forward(
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    activation: str,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """The result and, where asked for, the branches before the activation; both as `x` lies."""
    return torch.ops.eamnet_kernels_native.multi_dilation_conv(
        pixels_in_sequence(x),
        [w.contiguous() for w in w_branches],
        w_point.contiguous(),
        None if bias is None else bias.contiguous(),
        dilations,
        activation,
        save_for_backward,
        is_channels_last(x),
    )


def backward(
    grad_out: Tensor,
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    has_bias: bool,
    dilations: Sequence[int],
    activation: str,
    preactivation: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """The gradients of x (as `x` lies), the branches' weights, the 1x1's weight and its bias."""
    return torch.ops.eamnet_kernels_native.multi_dilation_conv_backward(
        pixels_in_sequence(grad_out),
        pixels_in_sequence(x),
        [w.contiguous() for w in w_branches],
        w_point.contiguous(),
        has_bias,
        dilations,
        activation,
        pixels_in_sequence(preactivation),
        is_channels_last(x),
    )
