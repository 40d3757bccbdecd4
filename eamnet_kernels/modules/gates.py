"""CBAM's two gates, fed by `gate_statistics` (Woo et al., arXiv:1807.06521, equations 2, 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eamnet_kernels.functional import GateStatistics

MIN_HIDDEN = 4  # of the channel gate's MLP, so that narrow maps keep a usable bottleneck


class ChannelGate(nn.Module):
    """`sigmoid(MLP(channel mean) + MLP(channel max))`, one shared MLP C -> C/reduction -> C.

    Args:
        channels: C.
        reduction: of the hidden layer, which has at least 4 units.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(
                f"channels={channels}, reduction={reduction}; accepted: at least 1 each"
            )
        hidden = max(channels // reduction, MIN_HIDDEN)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, statistics: GateStatistics) -> Tensor:
        """-> (B,C) in (0, 1)."""
        return torch.sigmoid(self.mlp(statistics.channel_mean) + self.mlp(statistics.channel_max))


class SpatialGate(nn.Module):
    """`sigmoid(conv([pixel mean; pixel max]))`, one convolution of an odd size over two maps.

    Args:
        kernel_size: of the convolution; 7 in CBAM.
    """

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}; accepted: odd numbers")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, statistics: GateStatistics) -> Tensor:
        """-> (B,1,H,W) in (0, 1)."""
        return torch.sigmoid(
            self.conv(torch.cat((statistics.pixel_mean, statistics.pixel_max), dim=1))
        )
