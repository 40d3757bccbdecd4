"""`gate_statistics` in Triton: four reductions in one read of x, their backward in one write.

Forward: a program takes a block of pixels and goes through all channels. Its statistics per pixel
are complete then; those per channel are partial, one per block of pixels (2 of every PIXELS
elements), and a second kernel joins them in a fixed order, so that results repeat bit for bit.

Maxima are taken over integers that are ordered as the numbers are, NaN on top. Which pixel of a
channel's first largest block is the maximum, the second kernel finds by reading that block of x
again: to carry positions through the first one would cost a third more instructions per element,
and at two bytes per element those, not memory, bound it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence
from eamnet_kernels.ops.layout import is_channels_last
from eamnet_kernels.triton import declines as declines
from eamnet_kernels.triton import refuses
from eamnet_kernels.triton.configurations import Configuration, Rule, Table
from eamnet_kernels.triton.launch import blocks, launch, wide

_LEAST = tl.constexpr(-(2**31))
_LARGEST = tl.constexpr(2**31 - 1)

PARTIAL = Table(
    "gate_statistics.partial",
    # A row of a block is what lies in sequence: 128 bits of it are one thread's.
    Rule(
        {"layout": "channels-last", "pixels": 4096}, Configuration({"PIXELS": 32, "CHANNELS": 32})
    ),
    Rule({"layout": "channels-last"}, Configuration({"PIXELS": 64, "CHANNELS": 32})),
    # Small maps have few blocks of pixels; short ones give every multiprocessor something to do.
    Rule({"pixels": 4096}, Configuration({"PIXELS": 128, "CHANNELS": 8})),
    Rule({"pixels": 16384}, Configuration({"PIXELS": 256, "CHANNELS": 8})),
    Rule({}, Configuration({"PIXELS": 512, "CHANNELS": 4}, num_warps=8)),
)
JOIN = Table(
    "gate_statistics.join",
    Rule({"tiles": 64}, Configuration({"TILES": 64, "CHANNELS": 4})),
    Rule({}, Configuration({"TILES": 256, "CHANNELS": 4})),
)
BACKWARD = Table(
    "gate_statistics.backward",
    Rule({"layout": "channels-last"}, Configuration({"PIXELS": 64, "CHANNELS": 32})),
    Rule({}, Configuration({"PIXELS": 256, "CHANNELS": 8})),
)


def can_run(arguments: Arguments) -> str | None:
    return refuses(arguments)


@triton.jit
def _ordered(value):  # type: ignore[no-untyped-def]
    """float32 -> int32 of the same order: both zeros equal, every NaN above infinity."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(value != value, 0x7FFFFFFF, bits)


@triton.jit
def _number(key):  # type: ignore[no-untyped-def]
    """The inverse of `_ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _partial_kernel(  # type: ignore[no-untyped-def]
    x,  # (B,C,N)
    pixel_mean,  # (B,N)
    pixel_max,  # (B,N)
    pixel_argmax,  # (B,N) int32
    partial_sum,  # (B,C,T) float32: of a channel in a block of pixels
    partial_max,  # (B,C,T) int32, ordered
    C,
    N,
    T,
    stride_b,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (b,t) does pixels t*PIXELS and following of sample b, over all channels."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    b = (program // T).to(tl.int64)
    t = program % T
    n = t * PIXELS + tl.arange(0, PIXELS)
    row = tl.arange(0, CHANNELS)
    x += b * stride_b
    partial_sum += b * C * T + t
    partial_max += b * C * T + t
    at_n = n.to(index) * stride_n
    total = tl.zeros([CHANNELS, PIXELS], tl.float32)
    best = tl.full([CHANNELS, PIXELS], _LEAST, tl.int32)
    best_c = tl.zeros([CHANNELS, PIXELS], tl.int32)
    for start in range(0, C, CHANNELS):
        c = start + row
        inside = (c < C)[:, None] & (n < N)[None, :]
        value = tl.load(x + (c.to(index) * stride_c)[:, None] + at_n[None, :], inside, other=0.0)
        value = value.to(tl.float32)
        key = tl.where(inside, _ordered(value), _LEAST)
        total += value
        # Channels come in ascending order, so that only a larger one replaces the first largest.
        better = key > best
        best = tl.where(better, key, best)
        best_c = tl.where(better, c[:, None], best_c)
        tl.store(partial_sum + c.to(index) * T, tl.sum(value, 1), c < C)
        tl.store(partial_max + c.to(index) * T, tl.max(key, 1), c < C)
    key = tl.max(best, 0)
    first = tl.min(tl.where(best == key[None, :], best_c, _LARGEST), 0)
    mean = tl.div_rn(tl.sum(total, 0), tl.cast(C, tl.float32))
    to = b * N + n
    tl.store(pixel_mean + to, mean.to(pixel_mean.dtype.element_ty), n < N)
    tl.store(pixel_max + to, _number(key).to(pixel_max.dtype.element_ty), n < N)
    tl.store(pixel_argmax + to, first, n < N)


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    x,  # (B,C,N)
    partial_sum,  # (B,C,T) float32
    partial_max,  # (B,C,T) int32, ordered
    channel_mean,  # (B,C)
    channel_max,  # (B,C)
    channel_argmax,  # (B,C) int64
    C,
    N,
    T,
    stride_b,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,  # of the first kernel
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (b,i) joins the blocks of channels i*CHANNELS and following of sample b."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    groups = tl.cdiv(C, CHANNELS)
    b = (program // groups).to(tl.int64)
    c = (program % groups) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS, TILES], tl.float32)
    best = tl.full([CHANNELS, TILES], _LEAST, tl.int32)
    best_t = tl.zeros([CHANNELS, TILES], tl.int32)
    for start in range(0, T, TILES):
        t = start + tl.arange(0, TILES)
        inside = (c < C)[:, None] & (t < T)[None, :]
        at = ((b * C + c) * T)[:, None] + t[None, :]
        total += tl.load(partial_sum + at, inside, other=0.0)
        key = tl.load(partial_max + at, inside, other=_LEAST)
        better = key > best
        best = tl.where(better, key, best)
        best_t = tl.where(better, t[None, :], best_t)
    key = tl.max(best, 1)
    tile = tl.min(tl.where(best == key[:, None], best_t, _LARGEST), 1)
    n = tile[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = (c < C)[:, None] & (n < N)
    at = (c.to(index) * stride_c)[:, None] + n.to(index) * stride_n
    value = tl.load(x + b * stride_b + at, inside, other=0.0).to(tl.float32)
    found = inside & (_ordered(value) == key[:, None])
    first = tl.min(tl.where(found, n, _LARGEST), 1)
    mean = tl.div_rn(tl.sum(total, 1), tl.cast(N, tl.float32))
    to = b * C + c
    tl.store(channel_mean + to, mean.to(channel_mean.dtype.element_ty), c < C)
    tl.store(channel_max + to, _number(key).to(channel_max.dtype.element_ty), c < C)
    tl.store(channel_argmax + to, first.to(tl.int64), c < C)


def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = pixels_in_sequence(x)
    batch, channels, height, width = x.shape
    pixels = height * width
    pixel_mean, pixel_max = (x.new_empty((batch, 1, height, width)) for _ in range(2))
    channel_mean, channel_max = (x.new_empty((batch, channels)) for _ in range(2))
    pixel_argmax = x.new_empty((batch, 1, height, width), dtype=torch.int32)
    channel_argmax = x.new_empty((batch, channels), dtype=torch.int64)

    layout = "channels-last" if is_channels_last(x) else "nchw"
    configuration = PARTIAL.configuration(x.device, pixels=pixels, channels=channels, layout=layout)
    length = configuration.blocks["PIXELS"]
    tiles = blocks(pixels, length)
    partial_sum = x.new_empty((batch, channels, tiles), dtype=torch.float32)
    partial_max = x.new_empty((batch, channels, tiles), dtype=torch.int32)
    shape = (channels, pixels, tiles, x.stride(0), x.stride(1), _pixel_stride(x))
    launch(
        _partial_kernel,
        (batch * tiles,),
        x, pixel_mean, pixel_max, pixel_argmax, partial_sum, partial_max, *shape,
        configuration=configuration,
        WIDE=wide(x),
    )  # fmt: skip
    configuration = JOIN.configuration(x.device, tiles=tiles, channels=channels)
    launch(
        _join_kernel,
        (batch * blocks(channels, configuration.blocks["CHANNELS"]),),
        x, partial_sum, partial_max, channel_mean, channel_max, channel_argmax, *shape,
        configuration=configuration,
        PIXELS=length,
        WIDE=wide(x),
    )  # fmt: skip
    return pixel_mean, pixel_max, channel_mean, channel_max, pixel_argmax, channel_argmax


def _pixel_stride(x: Tensor) -> int:
    """Between neighbouring pixels of `x` (B,C,H,W), whose pixels are in sequence."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_pixel_mean,  # (B,N)
    grad_pixel_max,  # (B,N)
    grad_channel_mean,  # (B,C)
    grad_channel_max,  # (B,C)
    pixel_argmax,  # (B,N) int32
    channel_argmax,  # (B,C) int64
    grad_x,  # (B,C,N)
    C,
    N,
    stride_b,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (b,i,j) writes channels i*CHANNELS and pixels j*PIXELS and following of sample b."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    tiles = tl.cdiv(N, PIXELS)
    groups = tl.cdiv(C, CHANNELS)
    n = (program % tiles) * PIXELS + tl.arange(0, PIXELS)
    rest = program // tiles
    c = (rest % groups) * CHANNELS + tl.arange(0, CHANNELS)
    b = (rest // groups).to(tl.int64)
    at_n, at_c = b * N + n, b * C + c
    pixel_mean = tl.load(grad_pixel_mean + at_n, n < N, other=0.0).to(tl.float32)
    pixel_max = tl.load(grad_pixel_max + at_n, n < N, other=0.0).to(tl.float32)
    best_c = tl.load(pixel_argmax + at_n, n < N, other=-1)
    channel_mean = tl.load(grad_channel_mean + at_c, c < C, other=0.0).to(tl.float32)
    channel_max = tl.load(grad_channel_max + at_c, c < C, other=0.0).to(tl.float32)
    best_n = tl.load(channel_argmax + at_c, c < C, other=-1).to(tl.int32)
    pixel_mean = tl.div_rn(pixel_mean, tl.cast(C, tl.float32))
    channel_mean = tl.div_rn(channel_mean, tl.cast(N, tl.float32))
    grad = pixel_mean[None, :] + channel_mean[:, None]
    grad += tl.where(best_c[None, :] == c[:, None], pixel_max[None, :], 0.0)
    grad += tl.where(best_n[:, None] == n[None, :], channel_max[:, None], 0.0)
    at = (c.to(index) * stride_c)[:, None] + (n.to(index) * stride_n)[None, :]
    inside = (c < C)[:, None] & (n < N)[None, :]
    tl.store(grad_x + b * stride_b + at, grad.to(grad_x.dtype.element_ty), inside)


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
    _, _, height, width = grad_pixel_mean.shape
    pixels = height * width
    grad_x = torch.empty(
        (batch, channels, height, width),
        dtype=grad_pixel_mean.dtype,
        device=grad_pixel_mean.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    layout = "channels-last" if channels_last else "nchw"
    configuration = BACKWARD.configuration(
        grad_x.device, pixels=pixels, channels=channels, layout=layout
    )
    block = configuration.blocks
    launch(
        _backward_kernel,
        (batch * blocks(channels, block["CHANNELS"]) * blocks(pixels, block["PIXELS"]),),
        grad_pixel_mean.contiguous(),
        grad_pixel_max.contiguous(),
        grad_channel_mean.contiguous(),
        grad_channel_max.contiguous(),
        pixel_argmax.contiguous(),
        channel_argmax.contiguous(),
        grad_x, channels, pixels, grad_x.stride(0), grad_x.stride(1), _pixel_stride(grad_x),
        configuration=configuration,
        WIDE=wide(grad_x),
    )  # fmt: skip
    return grad_x


def exercise(empty: Callable[..., Tensor]) -> None:
    """Forward and backward at shapes that meet every rule of the tables, for the audit.

    The last has 2^32 elements in a sample, as it has for each operator.
    """
    for shape in (
        (8, 256, 32, 32),
        (8, 64, 128, 128),
        (8, 32, 256, 256),
        (2, 20, 9, 11),
        (1, 64, 8192, 8192),
    ):
        x = empty(*shape)
        backward(*forward(x), is_channels_last(x))
