"""CMAM, the cross-mix attention module of EAM-Net (arXiv:2512.07275, section II.B)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from eamnet_kernels.functional import cross_mix_channels, cross_mix_pixels, gate_statistics
from eamnet_kernels.modules.gates import ChannelGate, SpatialGate

HEAD_CHANNELS = 32  # per head where `heads` is not given


class CMAM(nn.Module):
    """Two attentions between a spatially gated and a channel-gated copy of the input, added to it.

    With CBAM's gates, `X_s = g_s X` and `X_c = g_c X`, the module computes
    `X + W_o (softmax(Q_s K_c^T) V_c + softmax(Q_c K_s^T) V_s)`. Neither gated copy is ever made:
    `W (g_s X) = g_s (W X)` and `W (g_c X) = (W diag(g_c)) X`.

    Args:
        channels: C of the input and the output.
        attend: what the tokens are. "channels": those of a head, with normalised rows and a learned
            temperature, linear in the pixels, for large maps. "pixels": scale 1/sqrt(d), quadratic
            in time and linear in memory, for small maps.
        heads: h, dividing C; by default one per 32 channels.
        reduction: of the channel gate's MLP.
        fusion: "cross" as above, or one of the plain ways to join the two gates, for comparison:
            "serial" (channel gate, then spatial gate of the result: CBAM) or "parallel"
            (`g_s X + g_c X`).

    Shapes: (B,C,H,W) -> (B,C,H,W); any dtype and layout the operators take.
    """

    def __init__(
        self,
        channels: int,
        attend: Literal["channels", "pixels"] = "channels",
        heads: int | None = None,
        reduction: int = 16,
        fusion: Literal["cross", "serial", "parallel"] = "cross",
    ) -> None:
        super().__init__()
        if attend not in ("channels", "pixels"):
            raise ValueError(f"attend={attend!r}; accepted: 'channels', 'pixels'")
        if fusion not in ("cross", "serial", "parallel"):
            raise ValueError(f"fusion={fusion!r}; accepted: 'cross', 'serial', 'parallel'")
        if heads is None:
            heads = max(1, channels // HEAD_CHANNELS)
            while channels % heads:
                heads -= 1
        if heads < 1 or channels % heads:
            raise ValueError(f"heads={heads}; accepted: a divisor of channels={channels}")
        self.channels = channels
        self.attend = attend
        self.heads = heads
        self.fusion = fusion
        self.channel_gate = ChannelGate(channels, reduction)
        self.spatial_gate = SpatialGate()
        if fusion == "cross":
            self.w_spatial = nn.Parameter(torch.empty(3 * channels, channels))
            self.w_channel = nn.Parameter(torch.empty(3 * channels, channels))
            self.w_out = nn.Parameter(torch.empty(channels, channels))
            if attend == "channels":
                self.temperature = nn.Parameter(torch.empty(2, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections as `nn.Linear` draws its own, uniform within 1/sqrt(C); 1 as
        temperatures.
        """
        if self.fusion != "cross":
            return
        if self.attend == "channels":
            nn.init.ones_(self.temperature)
        bound = 1 / math.sqrt(self.channels)
        for weight in (self.w_spatial, self.w_channel, self.w_out):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,H,W) -> (B,C,H,W)."""
        statistics = gate_statistics(x)
        channel_gate = self.channel_gate(statistics)
        if self.fusion == "serial":
            x = x * channel_gate[:, :, None, None]
            return x * self.spatial_gate(gate_statistics(x))
        spatial_gate = self.spatial_gate(statistics)
        if self.fusion == "parallel":
            return x * spatial_gate + x * channel_gate[:, :, None, None]
        if self.attend == "channels":
            return cross_mix_channels(
                x,
                spatial_gate,
                channel_gate,
                self.w_spatial,
                self.w_channel,
                self.w_out,
                self.temperature,
            )
        return x + self._mix_pixels(x, spatial_gate, channel_gate)

    def _mix_pixels(self, x: Tensor, spatial_gate: Tensor, channel_gate: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pixels = x.flatten(2).transpose(1, 2)  # (B,N,C)
        # One product for all six projections: the channel gate is folded into a weight per sample.
        gated = self.w_channel * channel_gate[:, None, :]
        shared = self.w_spatial.to(gated.dtype).expand(batch, -1, -1)
        projected = pixels @ torch.cat((shared, gated), 1).transpose(1, 2)  # (B,N,6C)
        tokens = projected.view(batch, height * width, 6, self.heads, channels // self.heads)
        q_s, k_s, v_s, q_c, k_c, v_c = tokens.permute(2, 0, 3, 1, 4)
        mixed = cross_mix_pixels(q_s, k_s, v_s, q_c, k_c, v_c, spatial_gate.flatten(1))
        out = mixed.transpose(1, 2).flatten(2) @ self.w_out.t()  # (B,N,C)
        return out.transpose(1, 2).reshape(batch, channels, height, width)

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"{self.channels}, attend={self.attend!r}, heads={self.heads}, fusion={self.fusion!r}"
        )
