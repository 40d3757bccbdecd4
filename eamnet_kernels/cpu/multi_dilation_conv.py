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

    bfloat16 with matrix tiles, which these kernels do not use: 0.64 and 0.36 times plain PyTorch's
    speed with C = 128 and 256 on one core; 1.2 times with C = 64. float32 with C = 256 on AVX-512:
    0.90 times forward and 0.77 with backward (bench/results/xeon-2core/maps). On AVX2 it is 1.30
    and 1.22 times in NCHW, 0.90 and 0.99 in channels-last (bench/results/epyc-2core/dense-256), so
    that only inference in channels-last is left out. Depthwise branches and other sizes are as fast
    or faster throughout.
    """
    x, w_branches = arguments["x"], arguments["w_branches"]
    if len(w_branches) == 0 or w_branches[0].shape[1] == 1:
        return None
    if x.dtype == torch.bfloat16 and x.shape[1] >= 128 and torch.cpu._is_amx_tile_supported():
        return "dense bfloat16 branches were measured faster in oneDNN, which has AMX"
    if x.dtype == torch.float32:
        if x.shape[1] >= 256 and native.cpu_level() not in ("baseline", "avx2"):
            return "dense float32 branches of 64 channels and more: oneDNN's AVX-512 was faster"
        inference = arguments.get("save_for_backward") is False
        if inference and is_channels_last(x) and x.shape[1] >= 256:
            return "dense float32 branches of 64 channels and more: faster in oneDNN for inference"
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
