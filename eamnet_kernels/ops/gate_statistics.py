"""Dispatcher entry of `gate_statistics`: shapes, what is saved, autograd.

Definition: `reference/gate_statistics.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eamnet_kernels.ops.layout import is_channels_last
from eamnet_kernels.ops.registration import call, register, vjp
from eamnet_kernels.reference import gate_statistics as reference


def _fake(x: Tensor) -> tuple[Tensor, ...]:
    batch, channels, height, width = x.shape
    return (
        x.new_empty(batch, 1, height, width),
        x.new_empty(batch, 1, height, width),
        x.new_empty(batch, channels),
        x.new_empty(batch, channels),
        x.new_empty((batch, 1, height, width), dtype=torch.int32),
        x.new_empty((batch, channels), dtype=torch.int64),
    )


def _fake_backward(
    grad_pixel_mean: Tensor,
    grad_pixel_max: Tensor,
    grad_channel_mean: Tensor,
    grad_channel_max: Tensor,
    pixel_argmax: Tensor,
    channel_argmax: Tensor,
    channels_last: bool,
) -> Tensor:
    batch, channels = grad_channel_mean.shape
    return torch.empty(
        (batch, channels, *grad_pixel_mean.shape[2:]),
        dtype=grad_pixel_mean.dtype,
        device=grad_pixel_mean.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Saving the positions of the maxima (1/C of x and less) lets the backward write without
    # reading x.
    ctx.save_for_backward(output[4], output[5])
    ctx.mark_non_differentiable(output[4], output[5])
    ctx.dtype = output[0].dtype
    ctx.channels_last = is_channels_last(inputs[0])


def _backward(ctx: Any, *grads: Tensor | None) -> Tensor:
    pixel_argmax, channel_argmax = ctx.saved_tensors
    like = (pixel_argmax, pixel_argmax, channel_argmax, channel_argmax)
    return call(
        "gate_statistics_backward",
        *(
            torch.zeros_like(a, dtype=ctx.dtype) if g is None else g.contiguous()
            for g, a in zip(grads[:4], like, strict=True)
        ),
        pixel_argmax,
        channel_argmax,
        ctx.channels_last,
        backend=ctx.backend,
    )


def _double_backward(args: Any, grads: tuple[Tensor]) -> tuple[Tensor | None, ...]:
    *values, pixel_argmax, channel_argmax, channels_last = args

    def linear(pm: Tensor, px: Tensor, cm: Tensor, cx: Tensor) -> Tensor:
        return reference.backward(pm, px, cm, cx, pixel_argmax, channel_argmax, channels_last)

    return *vjp(linear, *values)(grads[0]), None, None, None


register(
    "gate_statistics",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    backward=_backward,
    double_backward=_double_backward,
)
