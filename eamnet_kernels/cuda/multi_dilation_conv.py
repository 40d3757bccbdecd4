"""`multi_dilation_conv` in CUDA C++: `csrc/cuda/multi_dilation_conv.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cuda import refuses
from eamnet_kernels.ops.layout import is_channels_last

MAX_BRANCHES = 8  # kMaxBranches of csrc/cuda/multi_dilation_conv_kernels.h


def can_run(arguments: Arguments) -> str | None:
    """None, or why these arguments of the forward or the backward are not for this backend."""
    x: Tensor = arguments["x"]
    reason = refuses(x)
    if reason is None:
        properties: Any = torch.cuda.get_device_properties(x.device)
        limit = properties.shared_memory_per_block_optin
        reason = refuses_shape(x, len(arguments["w_branches"]), limit)
    return reason


def refuses_shape(x: Tensor, branches: int, shared_bytes: int) -> str | None:
    """Why a block with `shared_bytes` of shared memory cannot take the call, or None."""
    if branches > MAX_BRANCHES:
        return f"it takes up to {MAX_BRANCHES} branches, these are {branches}"
    size = x.element_size()
    group = -(-(x.shape[1] // (branches + 1) * size) // 16) * 16
    # The smallest tile: 64 pixels of all channels, and the largest window, 24 x 24 pixels.
    needed = 64 * (-(-(branches + 1) * group // 32) * 32 + 16) + 24 * 24 * 48
    if needed > shared_bytes:
        return (
            f"{x.shape[1]} channels of {size} bytes take {needed} bytes of shared memory, "
            f"a block of this card has {shared_bytes}"
        )
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
        x,
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
        grad_out,
        x,
        [w.contiguous() for w in w_branches],
        w_point.contiguous(),
        has_bias,
        dilations,
        activation,
        preactivation,
        is_channels_last(x),
    )
