"""Attention of every pixel to a small external memory, then the channels with the largest L1 norm.

Source: EANet (Guo et al., arXiv:2105.02358), section 3: softmax over the pixels of each slot, then
division by the sum over slots; channel selection: EAM-Net (arXiv:2512.07275), section II.D.

`memory_key` is `M_k W_in`: a bias before it cancels in the softmax over pixels. The folded form
never writes F = M_v^T A for the output: that is one C x S matrix per sample, W_out diag(kept)
M_v^T, times A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.ops.layout import accumulation_dtype, memory_format, times_pixels

EPSILON = 1e-9  # EANet's, added to the sum over slots


def can_run(arguments: Arguments) -> str | None:
    return None


def kept_channels(scores: Tensor, top_k: int) -> Tensor:
    """scores (B,C) -> mask (B,C) of the `top_k` largest; ties go to the lower index, NaN is
    largest.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :top_k], True)


def direct(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int | Tensor
) -> Tensor:
    """x (B,C,H,W), memory_key and memory_value (S,C), w_out (C,C) -> (B,C,H,W).

    `top_k`: how many channels to keep, or which, as a mask (B,C).
    """
    attention = torch.softmax(times_pixels(memory_key, x.flatten(2)), -1)
    attention = attention / (EPSILON + attention.sum(1, keepdim=True))
    features = times_pixels(memory_value.t(), attention)
    if isinstance(top_k, Tensor):
        kept = top_k
    else:
        kept = kept_channels(features.detach().abs().sum(2), top_k)
    features = torch.where(kept.unsqueeze(2), features, 0.0)
    return times_pixels(w_out, features).view_as(x)


def slot_normalizers(pixels: Tensor, key: Tensor) -> Tensor:
    """The log-sum-exp over the pixels of each slot, (B,S); NaN where a logit is infinite.

    There a softmax is NaN for all pixels; `logsumexp` would say inf, and `exp(x - inf)` hide it.
    """
    lse = torch.logsumexp(times_pixels(key, pixels), -1)
    return torch.where(lse == torch.inf, torch.nan, lse)


def _slot_weights(pixels: Tensor, key: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over pixels (B,S,N), and one plus-epsilon sum over slots (B,1,N)."""
    weights = torch.exp(times_pixels(key, pixels) - lse.unsqueeze(2))
    return weights, EPSILON + weights.sum(1, keepdim=True)


def forward(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    pixels = x.flatten(2).to(dtype)
    key, value = memory_key.to(dtype), memory_value.to(dtype)
    lse = slot_normalizers(pixels, key)
    weights, total = _slot_weights(pixels, key, lse)
    attention = weights / total
    kept = kept_channels(times_pixels(value.t(), attention).abs().sum(2), top_k)
    out = ((w_out.to(dtype) * kept.unsqueeze(1)) @ value.t()) @ attention
    out = out.to(x.dtype).view(x.shape).contiguous(memory_format=memory_format(x))
    return out, lse, kept


def backward(
    grad_out: Tensor,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    w_out: Tensor,
    lse: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = lse.dtype
    pixels, grad = x.flatten(2).to(dtype), grad_out.flatten(2).to(dtype)
    key, value = memory_key.to(dtype), memory_value.to(dtype)
    w_kept = w_out.to(dtype) * kept.unsqueeze(1)  # (B,C,C)
    readout = w_kept @ value.t()  # (B,C,S)
    weights, total = _slot_weights(pixels, key, lse)
    attention = weights / total

    grad_readout = grad @ attention.transpose(1, 2)
    grad_attention = readout.transpose(1, 2) @ grad
    # Through a = w / (eps + sum of w over slots), then through the softmax over pixels.
    grad_weights = (grad_attention - (grad_attention * attention).sum(1, keepdim=True)) / total
    row = (grad_weights * weights).sum(2, keepdim=True)
    grad_logits = weights * (grad_weights - row)

    grad_x = times_pixels(key.t(), grad_logits).to(x.dtype).view(x.shape)
    grad_w_out = ((grad_readout @ value) * kept.unsqueeze(1)).sum(0)
    grad_value = (grad_readout.transpose(1, 2) @ w_kept).sum(0)
    grad_key = (grad_logits @ pixels.transpose(1, 2)).sum(0)
    return (
        grad_x.contiguous(memory_format=memory_format(x)),
        grad_key.to(memory_key.dtype),
        grad_value.to(memory_value.dtype),
        grad_w_out.to(w_out.dtype),
    )
