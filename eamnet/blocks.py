"""Building blocks of EAM-Net: residual block, encoder and decoder stage, multi-scale head.

Shapes: ``B`` batch, ``C`` channels, ``H, W`` rows and columns of a feature map. Every block keeps
the dtype, the device and the memory format (contiguous or channels-last) of its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DecoderStage", "EncoderStage", "MultiScaleHead", "ResidualBlock", "pad_to_multiple"]


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad ``x (B, C, H, W)`` below and to the right until both sizes divide by ``multiple``.

    The edge is replicated: zeros would look like the black vignette of a dermatoscope and pull
    the gates' means down, and reflection is undefined for pictures smaller than the padding.
    Padding on one side only leaves the pooling grid where it is for the unpadded picture.
    """
    height, width = x.shape[-2:]
    # Written so that for symbolic sizes the compiler sees the padded size divide by `multiple`.
    right, below = ((s + multiple - 1) // multiple * multiple - s for s in (width, height))
    return F.pad(x, (0, right, 0, below), mode="replicate")


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    # No bias: a batch normalisation follows every one of these convolutions and removes it.
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut (He et al., 2016).

    ``ReLU(BN(conv(ReLU(BN(conv(x))))) + shortcut(x))``. The shortcut is a 1x1 convolution with
    batch normalisation where the channels differ and the identity elsewhere.

    The last normalisation starts with scale 1, not 0: ten blocks are few enough that none needs to
    start as its shortcut, and at 0 the convolutions before it get no gradient in the first step.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3)
        self.bn1: nn.Module = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        self.bn2: nn.Module = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, out_channels, H, W)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def _residual_blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(
        *(ResidualBlock(out_channels if i else in_channels, out_channels) for i in range(count))
    )


class EncoderStage(nn.Module):
    """Residual blocks and then the multi-resolution fusion, all at one resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, fusion: nn.Module) -> None:
        super().__init__()
        self.blocks = _residual_blocks(in_channels, out_channels, blocks)
        self.mrcf = fusion

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W) -> (B, out_channels, H, W)``."""
        fused: Tensor = self.mrcf(self.blocks(x))
        return fused


class DecoderStage(nn.Module):
    """Double the resolution, attend at the fusion point, join the bridged skip.

    A 2x2 transposed convolution with stride 2 brings the coarser features to the skip's shape,
    ``attention`` reads the sum of the two, and the residual blocks read its result concatenated
    with the skip.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        blocks: int,
        attention: nn.Module,
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, skip_channels, 2, stride=2)
        # Windows do not overlap, so an output sees in_channels values. Nothing rectifies it:
        # gain 1. Torch's own fan count would be wrong by the kernel's area for this layer.
        nn.init.normal_(self.up.weight, std=in_channels**-0.5)
        nn.init.zeros_(self.up.get_parameter("bias"))
        self.attention = attention
        self.blocks = _residual_blocks(2 * skip_channels, out_channels, blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join features with the skip of twice their size.

        ``x (B, in_channels, H, W), skip (B, skip_channels, 2H, 2W)`` ->
        ``(B, out_channels, 2H, 2W)``.
        """
        fused = self.attention(self.up(x) + skip)
        decoded: Tensor = self.blocks(torch.cat((fused, skip), dim=1))
        return decoded


class MultiScaleHead(nn.Module):
    """One 1x1 head per scale, brought to full size bilinearly and fused by a 1x1 convolution.

    With a single scale there is nothing to fuse: head only. The fusion starts as the mean over the
    scales, so that every scale is supervised from the first step.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in widths)
        self.fuse: nn.Module = nn.Identity()
        if len(widths) > 1:
            self.fuse = nn.Conv2d(len(widths) * num_classes, num_classes, 1)
            mean = torch.eye(num_classes).repeat(1, len(widths)) / len(widths)
            with torch.no_grad():
                self.fuse.weight.copy_(mean[:, :, None, None])
            nn.init.zeros_(self.fuse.get_parameter("bias"))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """``features[i] (B, widths[i], H_i, W_i)`` -> logits ``(B, num_classes, H_0, W_0)``."""
        size = features[0].shape[-2:]
        # The head comes before the upsampling: the two commute, and it is the cheaper order.
        maps = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        logits: Tensor = self.fuse(torch.cat([_resize(m, size) for m in maps], dim=1))
        return logits


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
