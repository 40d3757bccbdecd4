"""Mean and maximum of a feature map over channels and over pixels: what CBAM's two gates are fed.

Source: CBAM (Woo et al., ECCV 2018, arXiv:1807.06521), equations 2 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.ops.layout import accumulation_dtype


def can_run(arguments: Arguments) -> str | None:
    return None


def direct(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B,C,H,W) -> pixel mean and maximum (B,1,H,W), channel mean and maximum (B,C).

    A maximum's gradient goes to the first maximal element; a NaN is larger than every number.
    """
    pixels = x.flatten(2)
    return (
        x.mean(1, keepdim=True),
        _first_max(x, 1)[0].unsqueeze(1),
        pixels.mean(2),
        _first_max(pixels, 2)[0],
    )


def _first_max(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum over `dim` and the index of the first maximal element.

    `torch.max(x, dim)` leaves open which of several equal elements it reports; here it is the first
    on every device, so the index is looked up.
    """
    value = x.amax(dim, keepdim=True).detach()
    is_maximal = (x == value) | (x.isnan() & value.isnan())
    index = is_maximal.to(torch.uint8).argmax(dim, keepdim=True)
    return x.gather(dim, index).squeeze(dim), index.squeeze(dim)


def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulate = accumulation_dtype(x.dtype)
    pixels = x.flatten(2)
    pixel_max, pixel_argmax = _first_max(x, 1)
    channel_max, channel_argmax = _first_max(pixels, 2)
    return (
        x.mean(1, keepdim=True, dtype=accumulate).to(x.dtype),
        pixel_max.unsqueeze(1),
        pixels.mean(2, dtype=accumulate).to(x.dtype),
        channel_max,
        pixel_argmax.unsqueeze(1).to(torch.int32),
        channel_argmax,
    )


def backward(
    grad_pixel_mean: Tensor,
    grad_pixel_max: Tensor,
    grad_channel_mean: Tensor,
    grad_channel_max: Tensor,
    pixel_argmax: Tensor,
    channel_argmax: Tensor,
    channels_last: bool,
) -> Tensor:
    batch, channels = grad_channel_mean.shape
    height, width = grad_pixel_mean.shape[2:]
    dtype = accumulation_dtype(grad_pixel_mean.dtype)
    grad = grad_pixel_mean.to(dtype) / channels + (
        grad_channel_mean.to(dtype)[:, :, None, None] / (height * width)
    )
    grad = grad.scatter_add(1, pixel_argmax.long(), grad_pixel_max.to(dtype))
    grad = grad.flatten(2).scatter_add(
        2, channel_argmax.unsqueeze(2), grad_channel_max.to(dtype).unsqueeze(2)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad = grad.view(batch, channels, height, width).to(grad_pixel_mean.dtype)
    return grad.contiguous(memory_format=layout)
