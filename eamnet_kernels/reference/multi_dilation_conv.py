"""Parallel 3x3 convolutions of different dilation over groups of channels, then a 1x1 convolution.

The channels are split into n + 1 equal groups; the first passes unchanged, group i > 0 goes through
a 3x3 convolution of dilation and padding `dilations[i-1]` and the activation; the groups are
concatenated and mixed by a 1x1 convolution. Source: EAM-Net (arXiv:2512.07275), section II.C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

from eamnet_kernels.backends import Arguments
from eamnet_kernels.ops.layout import memory_format

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": silu,
    "identity": lambda z: z,
}


def can_run(arguments: Arguments) -> str | None:
    return None


def activation_backward(activation: str, preactivation: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the preactivation."""
    if activation == "relu":
        # As torch: nothing at zero and below, and a NaN preactivation lets the gradient through.
        return torch.ops.aten.threshold_backward(grad, preactivation, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, preactivation)
    return grad


def _without_fault(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """`x` in a layout for which oneDNN's gradient of the weight is right.

    That of dilated depthwise weights from a channels-last bfloat16 `x` is wrong, sometimes NaN, or
    ends the process, on processors that multiply bfloat16 (torch 2.14.1, pictures of 64x64).
    """
    fault = x.device.type == "cpu" and x.dtype == torch.bfloat16 and weight.shape[1] == 1 < dilation
    return x.contiguous() if fault else x


def _branch(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    groups = x.shape[1] // weight.shape[1]
    x = _without_fault(x, weight, dilation)
    return conv2d(x, weight, padding=dilation, dilation=dilation, groups=groups)


def direct(
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    activation: str,
) -> Tensor:
    """x (B,C,H,W); per branch (c,c,3,3) or (c,1,3,3); w_point (C,C); bias (C) or None."""
    first, *groups = x.chunk(len(dilations) + 1, dim=1)
    branches = [
        ACTIVATIONS[activation](_branch(group, weight, dilation))
        for group, weight, dilation in zip(groups, w_branches, dilations, strict=True)
    ]
    return conv2d(torch.cat((first, *branches), 1), w_point[:, :, None, None], bias)


def forward(
    x: Tensor,
    w_branches: Sequence[Tensor],
    w_point: Tensor,
    bias: Tensor | None,
    dilations: Sequence[int],
    activation: str,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    layout = memory_format(x)
    if not save_for_backward:
        out = direct(x, w_branches, w_point, bias, dilations, activation)
        return out.contiguous(memory_format=layout), out.new_empty(0)
    first, *groups = x.chunk(len(dilations) + 1, dim=1)
    branches = [
        _branch(group, weight, dilation)
        for group, weight, dilation in zip(groups, w_branches, dilations, strict=True)
    ]
    preactivation = torch.cat(branches, 1) if branches else x[:, :0]
    fused = torch.cat((first, *map(ACTIVATIONS[activation], branches)), 1)
    out = conv2d(fused, w_point[:, :, None, None], bias).contiguous(memory_format=layout)
    return out, preactivation.contiguous(memory_format=layout)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int, padding: int
) -> tuple[Tensor, Tensor]:
    groups = x.shape[1] // weight.shape[1]
    x = _without_fault(x, weight, dilation)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], groups,
        [True, True, False],
    )  # fmt: skip
    # cuDNN gives a weight's gradient as x lies.
    return grad_x, grad_weight.contiguous()


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
    layout = memory_format(x)
    first, *groups = x.chunk(len(dilations) + 1, dim=1)
    fused = torch.cat((first, ACTIVATIONS[activation](preactivation)), 1)
    grad_fused, grad_point = _conv_backward(grad_out, fused, w_point[:, :, None, None], 1, 0)
    channels = first.shape[1]
    grads_x, grads_w = [grad_fused[:, :channels]], []
    for i, (group, weight, dilation) in enumerate(zip(groups, w_branches, dilations, strict=True)):
        # Per branch: the convolution copies a gradient that is a slice of a larger one.
        grad = activation_backward(
            activation,
            preactivation[:, i * channels : (i + 1) * channels],
            grad_fused[:, (i + 1) * channels : (i + 2) * channels],
        )
        grad_group, grad_weight = _conv_backward(grad, group, weight, dilation, dilation)
        grads_x.append(grad_group)
        grads_w.append(grad_weight)
    grad_bias = grad_out.sum((0, 2, 3)) if has_bias else grad_out.new_empty(0)
    grad_x = torch.cat(grads_x, 1).contiguous(memory_format=layout)
    return grad_x, grads_w, grad_point.flatten(1), grad_bias
