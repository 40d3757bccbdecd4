"""MRCF, the multi-resolution multi-channel fusion of EAM-Net (arXiv:2512.07275, section II.C)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eamnet_kernels.functional import multi_dilation_conv


class MRCF(nn.Module):
    """Groups of channels at several dilations, mixed by a 1x1 convolution, batch norm, ReLU.

    Args:
        channels: C of the input and the output; divisible by the number of dilations plus one.
        dilations: of the 3x3 branches; the first group of channels passes unchanged.
        depthwise: one filter per channel (cheap) instead of dense filters inside each group.
        activation: after each branch, "relu", "silu" or "identity".

    `bias` (C) of the 1x1 convolution is None, because the batch norm would remove it; a network
    folded for inference, whose norm is the identity, has one.

    Shapes: (B,C,H,W) -> (B,C,H,W); any dtype and layout the operators take.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (3, 5, 7),
        depthwise: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        if min(self.dilations, default=0) < 1:
            raise ValueError(f"dilations={self.dilations}; accepted: one or more, at least 1 each")
        if channels % (len(self.dilations) + 1):
            raise ValueError(
                f"channels={channels} do not divide into {len(self.dilations) + 1} equal groups "
                f"for dilations={self.dilations}"
            )
        group = channels // (len(self.dilations) + 1)
        self.channels = channels
        self.depthwise = depthwise
        self.activation = activation
        shape = (group, 1 if depthwise else group, 3, 3)
        self.w_branches = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in self.dilations)
        self.w_point = nn.Parameter(torch.empty(channels, channels))
        self.register_parameter("bias", None)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Conv2d` draws its own: uniform within 1/sqrt(fan in)."""
        for weight in self.w_branches:
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(weight, -bound, bound)
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.w_point, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W)."""
        mixed = multi_dilation_conv(
            x,
            list(self.w_branches),
            self.w_point,
            self.bias,
            dilations=self.dilations,
            activation=self.activation,
        )
        return torch.relu(self.norm(mixed))

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"{self.channels}, dilations={self.dilations}, depthwise={self.depthwise}, "
            f"activation={self.activation!r}"
        )
