"""`external_memory` in Triton: three passes over x forward, two backward, nothing kept between.

Definition: `reference/external_memory.py`. With S slots and C channels, multiply-adds and numbers
read (r) or written (w) per pixel:

    lse      softmax over pixels, per slot         S C       C r
    scores   sum of |M_v^T A| per channel        2 S C       C r        not where all are kept
    output   R A, R = W_out diag(kept) M_v^T     2 S C       C r + C w
    sums     dR = dY A^T, row = sum of E dE      3 S C     2 C r
    gradient dX = K^T dL, dK = dL X^T            4 S C     2 C r + C w

Logits and attention are computed again in every pass: one that read them would read S/C of x
instead, which is the size of x or more, and another would have to write it. The division is over
slots, so that a program holds all slots of its pixels.

What is summed over pixels is summed by each program over a run of blocks, written, and added up in
a fixed order. Programs that sum a matrix of S x C do it for a group of channels, as many as
registers hold; each group computes the attention anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from eamnet_kernels.backends import Arguments
from eamnet_kernels.cpu import pixels_in_sequence
from eamnet_kernels.ops.layout import empty_like, is_channels_last
from eamnet_kernels.reference.external_memory import kept_channels
from eamnet_kernels.triton import declines as declined_by_all
from eamnet_kernels.triton import refuses
from eamnet_kernels.triton.configurations import Configuration, Rule, Table
from eamnet_kernels.triton.launch import blocks, launch, power_of_two, wide
from eamnet_kernels.triton.products import (
    configured,
    exact_float32,
    precision,
    run_length,
    strides,
    tile,
    within,
)

_EPSILON = tl.constexpr(1e-9)  # EANet's, added to the sum over slots
_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(1 / math.log(2))
_MOST_SLOTS = 128


def _configuration(warps: int, stages: int, **sizes: int) -> Configuration:
    return Configuration(sizes, warps, stages)


# Keyed by the padded number of slots, and the width of an element. PIXELS is a block's, CHANNELS
# those of x that one product takes, GROUP those whose sums a program holds. The next larger blocks
# spill, most of them on sm_80 only; in float32 so does loading ahead (two stages) in places.
NORMALIZE = Table(
    "external_memory.normalize",
    Rule({"bits": 16}, _configuration(4, 3, PIXELS=64, CHANNELS=64)),
    Rule({"slots": 64}, _configuration(8, 1, PIXELS=32, CHANNELS=16)),
    # Four warps take 120 registers at most; with eight the compiler stops at 64, and spills.
    Rule({}, _configuration(4, 1, PIXELS=16, CHANNELS=16)),
)
JOIN = Table("external_memory.join", Rule({}, _configuration(4, 2, TILES=16)))
READ = Table(
    "external_memory.read",
    Rule({"bits": 16}, _configuration(4, 3, PIXELS=64, CHANNELS=64)),
    Rule({}, _configuration(4, 2, PIXELS=32, CHANNELS=16)),
)
SUMS = Table(
    "external_memory.sums",
    # With 64 channels at a time it spills on sm_100.
    Rule({"bits": 16}, _configuration(8, 2, PIXELS=64, CHANNELS=32, GROUP=128)),
    Rule({}, _configuration(8, 1, PIXELS=32, CHANNELS=16, GROUP=32)),
)
GRADIENT = Table(
    "external_memory.gradient",
    # Four warps take 168 registers at most; with eight the compiler stops at 128, and spills.
    Rule({"bits": 16, "slots": 16}, _configuration(4, 1, PIXELS=32, CHANNELS=32, GROUP=32)),
    Rule({"bits": 16}, _configuration(8, 1, PIXELS=32, CHANNELS=32, GROUP=64)),
    Rule({"slots": 64}, _configuration(8, 1, PIXELS=32, CHANNELS=16, GROUP=32)),
    Rule({}, _configuration(8, 1, PIXELS=16, CHANNELS=16, GROUP=32)),
)


def can_run(arguments: Arguments) -> str | None:
    slots = arguments["memory_key"].shape[0]
    if slots > _MOST_SLOTS:
        return f"there are {slots} slots; it takes up to {_MOST_SLOTS}"
    return refuses(arguments)


def declines(arguments: Arguments) -> str | None:
    """Exact products of float32, which here run without matrix instructions, in two cases.

    Up to the sizes that were measured, because `reference` holds the attention of all pixels, often
    several times the size of x.

    Milliseconds of `reference` and of these kernels on an H200, batch 4, from 32 channels at
    256x256 to 256 at 32x32 (bench/results/nvidia-h200). Forward in channels-last: 0.60 and 0.71,
    0.23 and 0.38, 0.16 and 0.21, 0.13 and 0.16. Backward (with forward, less forward): with 64
    channels 1.25 and 0.63, with 128 0.38 and 0.45, with 256 0.16 and 0.35; in channels-last 1.37
    and 0.86, 0.42 and 0.72, 0.17 and 0.67.
    """
    reason = declined_by_all(arguments)
    x = arguments["x"]
    if reason is not None or not exact_float32(x):
        return reason
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if "grad_out" in arguments:
        slower = x.shape[1] >= 128 and pixels <= 4 * 64 * 64
    else:
        slower = is_channels_last(x) and pixels <= 4 * 256 * 256
    return "in exact float32 reference was measured faster" if slower else None


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    matrix,  # (S,C): element (s,c) at s*stride_s + c*stride_m
    x,  # (C,N) of one sample
    n,
    C,
    N,
    S,
    stride_s,
    stride_m,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """matrix x for pixels `n`: (SLOTS,PIXELS) float32; zero beyond S and N."""
    s = tl.arange(0, SLOTS)
    product = tl.zeros([SLOTS, PIXELS], tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        inside = (s < S)[:, None] & (c < C)[None, :]
        left = tl.load(matrix + s[:, None] * stride_s + c[None, :] * stride_m, inside, other=0.0)
        right = tile(x, c, n, C, N, stride_c, stride_n, WIDE)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["T", "run"])
def _normalize_kernel(  # type: ignore[no-untyped-def]
    x,  # (B,C,N)
    key,  # (S,C)
    partial_top,  # (B,T,S) float32: the largest logit of a run of blocks, times log2(e)
    partial_total,  # (B,T,S) float32: the sum of the exponentials relative to it
    C,
    N,
    S,
    T,
    run,
    stride_b,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t) does `run` blocks of pixels of sample b."""
    program = tl.program_id(0)
    b = (program // T).to(tl.int64)
    t = program % T
    x += b * stride_b
    top = tl.full([SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    for i in range(run):
        n = (t * run + i) * PIXELS + tl.arange(0, PIXELS)
        logits = _product(
            key, x, n, C, N, S, C, 1, stride_c, stride_n, PIXELS, CHANNELS, SLOTS, WIDE, PRECISION
        )
        logits = tl.where((n < N)[None, :], logits * _LOG2E, -float("inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = new
    s = tl.arange(0, SLOTS)
    to = (b * T + t) * S + s
    tl.store(partial_top + to, top, s < S)
    tl.store(partial_total + to, total, s < S)


@triton.jit(do_not_specialize=["T"])
def _join_kernel(  # type: ignore[no-untyped-def]
    partial_top,  # (B,T,S) float32
    partial_total,  # (B,T,S) float32
    top,  # (B,S) float32: the largest logit, times log2(e)
    inverse,  # (B,S) float32: one by the sum of the exponentials relative to it
    lse,  # (B,S) float32
    S,
    T,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program b joins the runs of sample b.

    A slot with an infinite logit has no softmax: NaN, where exp(x - inf) would say 0.
    """
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SLOTS)
    largest = tl.full([SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    for start in range(0, T, TILES):
        t = start + tl.arange(0, TILES)
        inside = (t < T)[:, None] & (s < S)[None, :]
        at = b * T * S + t[:, None] * S + s[None, :]
        tops = tl.load(partial_top + at, inside, other=-float("inf"))
        totals = tl.load(partial_total + at, inside, other=0.0)
        new = tl.maximum(largest, tl.max(tops, 0))
        base = tl.where(new == -float("inf"), 0.0, new)
        # A maximum may or may not pass NaN on; a total does.
        weights = totals * tl.exp2(tops - base[None, :])
        total = total * tl.exp2(largest - base) + tl.sum(weights, 0)
        largest = new
    largest = tl.where(largest == float("inf"), float("nan"), largest)
    to = b * S + s
    tl.store(top + to, largest, s < S)
    tl.store(inverse + to, 1.0 / total, s < S)
    tl.store(lse + to, (largest + tl.log2(total)) * _LN2, s < S)


@triton.jit
def _attention(  # type: ignore[no-untyped-def]
    x,  # (C,N) of one sample
    key,  # (S,C)
    top,  # (S) of one sample: subtracted from the logits, times log2(e)
    inverse,  # (S) of one sample, or None: multiplies the exponentials
    n,
    C,
    N,
    S,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax over pixels E and the attention A = E / (1e-9 + sum over slots of E).

    Zero beyond S and N, where the exponential of logits that are not there could be infinite.
    """
    logits = _product(
        key, x, n, C, N, S, C, 1, stride_c, stride_n, PIXELS, CHANNELS, SLOTS, WIDE, PRECISION
    )
    s = tl.arange(0, SLOTS)
    base = tl.load(top + s, s < S, other=0.0)
    weights = tl.exp2(logits * _LOG2E - base[:, None])
    if inverse is not None:
        weights *= tl.load(inverse + s, s < S, other=0.0)[:, None]
    weights = tl.where((s < S)[:, None] & (n < N)[None, :], weights, 0.0)
    total = _EPSILON + tl.sum(weights, 0)
    return weights, weights / total[None, :]


@triton.jit
def _attention_backward(  # type: ignore[no-untyped-def]
    attention,  # (SLOTS,PIXELS) float32
    grad,  # (C,N) of one sample
    readout,  # (C,S) of one sample
    n,
    C,
    N,
    S,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """E dE, which is A (dA - sum over slots of A dA) with dA = R^T dY."""
    grad_attention = _product(
        readout, grad, n, C, N, S, 1, S, stride_c, stride_n,
        PIXELS, CHANNELS, SLOTS, WIDE, PRECISION,
    )  # fmt: skip
    return attention * (grad_attention - tl.sum(grad_attention * attention, 0)[None, :])


@triton.jit(do_not_specialize=["T"])
def _read_kernel(  # type: ignore[no-untyped-def]
    x,  # (B,C,N)
    key,  # (S,C)
    matrix,  # (B,C,S), or (C,S) with stride_mb = 0
    top,  # (B,S) float32
    inverse,  # (B,S) float32
    out,  # (B,C,N); or (B,T,C) float32, the sums of absolute values over a block of pixels
    C,
    N,
    S,
    T,
    stride_b,
    stride_c,
    stride_n,
    stride_mb,
    stride_mc,
    stride_ms,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t) writes matrix A for block t of the pixels of sample b, or sums of it."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    b = (program // T).to(tl.int64)
    t = program % T
    n = t * PIXELS + tl.arange(0, PIXELS)
    s = tl.arange(0, SLOTS)
    _, attention = _attention(
        x + b * stride_b, key, top + b * S, inverse + b * S, n, C, N, S, stride_c, stride_n,
        PIXELS, CHANNELS, SLOTS, WIDE, PRECISION,
    )  # fmt: skip
    attention = attention.to(x.dtype.element_ty)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = b * stride_mb + c[:, None] * stride_mc + s[None, :] * stride_ms
        left = tl.load(matrix + at, (c < C)[:, None] & (s < S)[None, :], other=0.0)
        value = tl.dot(left, attention, input_precision=PRECISION)
        if SUMS:
            tl.store(out + (b * T + t) * C + c, tl.sum(tl.abs(value), 1), c < C)
        else:
            at = (c.to(index) * out_stride_c)[:, None] + (n.to(index) * out_stride_n)[None, :]
            inside = (c < C)[:, None] & (n < N)[None, :]
            tl.store(out + b * out_stride_b + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T", "run"])
def _sums_kernel(  # type: ignore[no-untyped-def]
    grad,  # (B,C,N)
    x,  # (B,C,N)
    key,  # (S,C)
    readout,  # (B,C,S)
    top,  # (B,S) float32: lse times log2(e)
    partial_readout,  # (B,T,C,S) float32: grad A^T over a run of blocks
    partial_row,  # (B,T,S) float32: likewise the sums of E dE
    C,
    N,
    S,
    T,
    run,
    grad_stride_b,
    grad_stride_c,
    grad_stride_n,
    stride_b,
    stride_c,
    stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t,g) does `run` blocks of pixels of sample b, for group g of the channels.

    The group that comes first does the sums over slots, too.
    """
    program = tl.program_id(0)
    groups = tl.cdiv(C, GROUP)
    g = program % groups
    t = program // groups % T
    b = (program // groups // T).to(tl.int64)
    x += b * stride_b
    grad += b * grad_stride_b
    s = tl.arange(0, SLOTS)
    of_group = g * GROUP + tl.arange(0, GROUP)
    result = tl.zeros([GROUP, SLOTS], tl.float32)
    row = tl.zeros([SLOTS], tl.float32)
    for i in range(run):
        n = (t * run + i) * PIXELS + tl.arange(0, PIXELS)
        _, attention = _attention(
            x, key, top + b * S, None, n, C, N, S, stride_c, stride_n,
            PIXELS, CHANNELS, SLOTS, WIDE, PRECISION,
        )  # fmt: skip
        if g == 0:
            weighted = _attention_backward(
                attention, grad, readout + b * C * S, n, C, N, S, grad_stride_c, grad_stride_n,
                PIXELS, CHANNELS, SLOTS, WIDE, PRECISION,
            )  # fmt: skip
            row += tl.sum(weighted, 1)
        outer = tile(grad, of_group, n, C, N, grad_stride_c, grad_stride_n, WIDE)
        result = tl.dot(
            outer, tl.trans(attention.to(outer.dtype)), result, input_precision=PRECISION
        )
    to = (b * T + t) * C * S + of_group[:, None] * S + s[None, :]
    tl.store(partial_readout + to, result, (of_group < C)[:, None] & (s < S)[None, :])
    tl.store(partial_row + (b * T + t) * S + s, row, (s < S) & (g == 0))


@triton.jit(do_not_specialize=["T", "run"])
def _gradient_kernel(  # type: ignore[no-untyped-def]
    grad,  # (B,C,N)
    x,  # (B,C,N)
    key,  # (S,C)
    readout,  # (B,C,S)
    top,  # (B,S) float32: lse times log2(e)
    row,  # (B,S) float32
    grad_x,  # (B,C,N)
    partial_key,  # (B,T,S,C) float32: dL x^T over a run of blocks
    C,
    N,
    S,
    T,
    run,
    grad_stride_b,
    grad_stride_c,
    grad_stride_n,
    stride_b,
    stride_c,
    stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (b,t,g) does `run` blocks of pixels of sample b, for group g of the channels."""
    index = tl.int64 if WIDE else tl.int32
    program = tl.program_id(0)
    groups = tl.cdiv(C, GROUP)
    g = program % groups
    t = program // groups % T
    b = (program // groups // T).to(tl.int64)
    x += b * stride_b
    grad += b * grad_stride_b
    grad_x += b * out_stride_b
    s = tl.arange(0, SLOTS)
    c = g * GROUP + tl.arange(0, GROUP)
    row_sum = tl.load(row + b * S + s, s < S, other=0.0)
    inside = (c < C)[:, None] & (s < S)[None, :]
    key_of_group = tl.load(key + s[None, :] * C + c[:, None], inside, other=0.0)
    result = tl.zeros([SLOTS, GROUP], tl.float32)
    for i in range(run):
        n = (t * run + i) * PIXELS + tl.arange(0, PIXELS)
        weights, attention = _attention(
            x, key, top + b * S, None, n, C, N, S, stride_c, stride_n,
            PIXELS, CHANNELS, SLOTS, WIDE, PRECISION,
        )  # fmt: skip
        grad_logits = _attention_backward(
            attention, grad, readout + b * C * S, n, C, N, S, grad_stride_c, grad_stride_n,
            PIXELS, CHANNELS, SLOTS, WIDE, PRECISION,
        )  # fmt: skip
        grad_logits -= weights * row_sum[:, None]
        of_group = tile(x, c, n, C, N, stride_c, stride_n, WIDE)
        grad_logits = grad_logits.to(of_group.dtype)
        result = tl.dot(grad_logits, tl.trans(of_group), result, input_precision=PRECISION)
        value = tl.dot(key_of_group, grad_logits, input_precision=PRECISION)
        at = (c.to(index) * out_stride_c)[:, None] + (n.to(index) * out_stride_n)[None, :]
        within = (c < C)[:, None] & (n < N)[None, :]
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), within)
    to = (b * T + t) * S * C + s[:, None] * C + c[None, :]
    tl.store(partial_key + to, result, (s < S)[:, None] & (c < C)[None, :])


def forward(
    x: Tensor, memory_key: Tensor, memory_value: Tensor, w_out: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result as `x` lies, the log-sum-exp of each slot, and which channels were kept."""
    out = empty_like(x)
    x, key = pixels_in_sequence(x), memory_key.contiguous()
    (batch, channels), pixels, slots = x.shape[:2], x.shape[2] * x.shape[3], key.shape[0]
    padded = power_of_two(max(16, slots))
    constants = {
        "SLOTS": padded,
        "WIDE": wide(x, out),
        "PRECISION": precision(x.dtype),
    }

    configuration = configured(NORMALIZE, x, slots=padded)
    run, runs = run_length(batch, pixels, configuration.blocks["PIXELS"])
    partials = [x.new_empty((batch, runs, slots), dtype=torch.float32) for _ in range(2)]
    launch(
        _normalize_kernel,
        (batch * runs,),
        x, key, *partials, channels, pixels, slots, runs, run, *strides(x),
        configuration=configuration,
        **constants,
        **within(configuration, channels, "CHANNELS"),
    )  # fmt: skip
    top, inverse, lse = (x.new_empty((batch, slots), dtype=torch.float32) for _ in range(3))
    launch(
        _join_kernel,
        (batch,),
        *partials, top, inverse, lse, slots, runs,
        configuration=configured(JOIN, x),
        SLOTS=padded,
    )  # fmt: skip

    configuration = configured(READ, x, slots=padded)
    tiles = blocks(pixels, configuration.blocks["PIXELS"])

    def read(matrix: Tensor, of_samples: bool, to: Tensor, *to_strides: int) -> None:
        launch(
            _read_kernel,
            (batch * tiles,),
            x, key, matrix, top, inverse, to, channels, pixels, slots, tiles, *strides(x),
            matrix.stride(0) if of_samples else 0, *matrix.stride()[-2:], *to_strides,
            configuration=configuration,
            SUMS=not of_samples,
            **constants,
            **within(configuration, channels, "CHANNELS"),
        )  # fmt: skip

    if top_k == channels:
        kept = x.new_ones((batch, channels), dtype=torch.bool)
    else:
        sums = x.new_empty((batch, tiles, channels), dtype=torch.float32)
        read(memory_value.t(), False, sums, 0, 0, 0)
        kept = kept_channels(sums.sum(1), top_k)
    readout = (w_out.float() * kept.unsqueeze(1)) @ memory_value.float().t()
    read(readout.to(x.dtype), True, out, *strides(out))
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
    """The gradients of the four inputs, that of `x` as `x` lies."""
    grad_x = empty_like(x)
    grad, x, key = pixels_in_sequence(grad_out), pixels_in_sequence(x), memory_key.contiguous()
    (batch, channels), pixels, slots = x.shape[:2], x.shape[2] * x.shape[3], key.shape[0]
    value = memory_value.float()
    w_kept = w_out.float() * kept.unsqueeze(1)
    readout = (w_kept @ value.t()).to(x.dtype)
    top = lse * _LOG2E.value
    padded = power_of_two(max(16, slots))
    constants = {
        "SLOTS": padded,
        "WIDE": wide(grad, x, grad_x),
        "PRECISION": precision(x.dtype),
    }

    configuration = configured(SUMS, x, slots=padded)
    cut = within(configuration, channels, "CHANNELS", "GROUP")
    groups = blocks(channels, cut["GROUP"])
    run, runs = run_length(batch * groups, pixels, configuration.blocks["PIXELS"])
    partial_readout = x.new_empty((batch, runs, channels, slots), dtype=torch.float32)
    partial_row = x.new_empty((batch, runs, slots), dtype=torch.float32)
    launch(
        _sums_kernel,
        (batch * runs * groups,),
        grad, x, key, readout, top, partial_readout, partial_row,
        channels, pixels, slots, runs, run, *strides(grad), *strides(x),
        configuration=configuration,
        **constants,
        **cut,
    )  # fmt: skip
    grad_readout, row = partial_readout.sum(1), partial_row.sum(1)

    configuration = configured(GRADIENT, x, slots=padded)
    cut = within(configuration, channels, "CHANNELS", "GROUP")
    groups = blocks(channels, cut["GROUP"])
    run, runs = run_length(batch * groups, pixels, configuration.blocks["PIXELS"])
    partial_key = x.new_empty((batch, runs, slots, channels), dtype=torch.float32)
    launch(
        _gradient_kernel,
        (batch * runs * groups,),
        grad, x, key, readout, top, row, grad_x, partial_key,
        channels, pixels, slots, runs, run, *strides(grad), *strides(x), *strides(grad_x),
        configuration=configuration,
        **constants,
        **cut,
    )  # fmt: skip
    grad_w_out = ((grad_readout @ value) * kept.unsqueeze(1)).sum(0)
    grad_value = (grad_readout.transpose(1, 2) @ w_kept).sum(0)
    return (
        grad_x,
        partial_key.sum((0, 1)).to(memory_key.dtype),
        grad_value.to(memory_value.dtype),
        grad_w_out.to(w_out.dtype),
    )


def exercise(empty: Callable[..., Tensor]) -> None:
    """Forward and backward at shapes that meet every rule of the tables, for the audit."""
    for (batch, channels, height, width), slots in (
        ((8, 256, 32, 32), 64),
        ((8, 256, 64, 64), 128),
        ((2, 20, 9, 11), 7),
        ((1, 64, 8192, 8192), 64),
    ):
        x = empty(batch, channels, height, width)
        memory, w_out = x.new_empty(slots, channels), x.new_empty(channels, channels)
        out, lse, kept = forward(x, memory, memory, w_out, channels // 2)
        backward(out, x, memory, memory, w_out, lse, kept)
